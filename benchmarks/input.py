"""Images per second of this project's training input beside other ways to the same batches, from a disk and from a slow bucket.

    python -m benchmarks.input [--source FOLDER] [--pairs 2000] [--rounds 3] [--harness FOLDER] [--output FOLDER]

Every contender gives float32 batches in [-1, 1] of both pictures of a pair: decoded, resized by `jitter` more than the side,
cropped at random and mirrored, both alike. Each runs in a process of its own, for some seconds after a warm-up; the rounds go
through all of them in turn, so that a busy machine is unkind to all, and the medians are compared.

The bucket is the one of the tests on loopback, every request 50 ms late and every connection at 40 MB/s.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARDS = 8
LATENCY, BYTES_PER_SECOND = 0.05, 40e6
SAMPLE = Path(__file__).parent.parent / "trainer" / "sample"
DATALOADER_WORKERS = 2
COPY_BLOCK, COPY_RANGE, COPY_THREADS = 1 << 20, 8 << 20, 16


@dataclass(frozen=True)
class Work:
    """What a contender is given: where the pairs are, and what to make of them."""

    shards: str
    files: str
    bucket: str
    bucket_files: int
    kind: str
    batch: int
    side: int
    jitter: int
    warm_seconds: float
    seconds: float


Contender = Callable[[Work, bool], Iterator[int]]  # (work, from the bucket) -> images in each batch, without end


# --------------------------------------------------------------------------------------------------------------- the contenders


def ours(work: Work, from_bucket: bool) -> Iterator[int]:
    """PairData.training_batches; nothing is kept, so that every epoch is read."""
    from trainer.startup import load_tensorflow

    load_tensorflow()
    from trainer.config import Config
    from trainer.data.pipeline import PairData
    from trainer.storage.places import place

    data = {"image_size": (work.side, work.side), "jitter": work.jitter, "cache": "none"}
    config = Config.model_validate({"data": data, "train": {"batch_size": work.batch}})
    pairs = PairData(place(f"{work.bucket}/shards" if from_bucket else work.shards, "--data_dir"), config)
    return (work.batch for _ in pairs.training_batches(0))


def plain_tf_data(work: Work, from_bucket: bool) -> Iterator[int]:
    """What the guide of tf.data recommends: shards interleaved, a shuffle buffer, decoding in parallel, autotuned."""
    from trainer.startup import load_tensorflow

    load_tensorflow()
    import tensorflow as tf

    options = tf.data.Options()
    options.deterministic = False
    names = tf.io.gfile.glob(f"{work.bucket}/shards/*.tfrecord" if from_bucket else f"{work.shards}/*.tfrecord")
    shards = tf.data.Dataset.from_tensor_slices(names).shuffle(len(names)).repeat()
    records_in = shards.interleave(tf.data.TFRecordDataset, cycle_length=SHARDS, num_parallel_calls=tf.data.AUTOTUNE)
    examples = records_in.shuffle(1000).map(plain_prepare(work), num_parallel_calls=tf.data.AUTOTUNE)
    batches = examples.batch(work.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE).with_options(options)
    return (work.batch for _ in batches)


def plain_prepare(work: Work) -> Callable[[Any], Any]:
    """A record -> both images by TensorFlow's own functions: the same decoder and filters, one random crop for both."""
    import tensorflow as tf

    larger = [work.side + work.jitter] * 2
    kinds = {"input": "nearest" if work.kind == "labels" else "bilinear", "target": "bilinear"}

    def prepare(record: Any) -> Any:
        parsed = tf.io.parse_single_example(record, {"pair/encoded": tf.io.FixedLenFeature([], tf.string)})
        pair = tf.io.decode_jpeg(parsed["pair/encoded"], channels=3, dct_method="INTEGER_ACCURATE")
        half = tf.shape(pair)[1] // 2
        sides = zip((pair[:, :half], pair[:, half:]), kinds.values(), strict=True)
        both = tf.stack([tf.cast(tf.image.resize(side, larger, method=method), tf.float32) for side, method in sides])
        crop = tf.image.random_crop(both, [2, work.side, work.side, 3])
        turned = tf.cond(tf.random.uniform([]) > 0.5, lambda: tf.reverse(crop, [2]), lambda: crop) / 127.5 - 1.0
        return turned[0], turned[1]

    return prepare


class Files:
    """The pairs as pictures in files or objects, for torch.utils.data.DataLoader; by Pillow, or by torchvision on tensors."""

    def __init__(self, work: Work, from_bucket: bool, by_pillow: bool) -> None:
        self.work, self.by_pillow = work, by_pillow
        self.paths = sorted(Path(work.files).iterdir())[: work.bucket_files if from_bucket else None]
        self.read = self.from_bucket if from_bucket else Path.read_bytes
        self.opened: Any = None

    def from_bucket(self, path: Path) -> bytes:
        """One object by google-cloud-storage, with a client for each worker."""
        if self.opened is None:
            from google.cloud import storage

            self.opened = storage.Client().bucket(self.work.bucket.removeprefix("gs://"))
        return bytes(self.opened.blob(f"files/{path.name}").download_as_bytes())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        import torch
        from torchvision.transforms.v2 import functional

        size, jitter = self.work.side, self.work.jitter
        top, left, mirrored = (int(torch.randint(0, top, ())) for top in (jitter + 1, jitter + 1, 2))
        done = []
        for side, half in enumerate(self.halves(self.read(self.paths[index]))):
            nearest = side == 0 and self.work.kind == "labels"
            mode = functional.InterpolationMode.NEAREST if nearest else functional.InterpolationMode.BILINEAR
            larger = functional.resize(half, [size + jitter, size + jitter], mode, antialias=True)
            crop = functional.crop(larger, top, left, size, size)
            image = functional.horizontal_flip(crop) if mirrored else crop
            done.append(functional.to_dtype(functional.to_image(image), torch.float32, scale=True) * 2 - 1)
        return tuple(done)

    def halves(self, encoded: bytes) -> list[Any]:
        """The two pictures of a pair."""
        if self.by_pillow:
            import io

            from PIL import Image

            image = Image.open(io.BytesIO(encoded)).convert("RGB")
            half = image.width // 2
            return [image.crop((left, 0, left + half, image.height)) for left in (0, half)]
        import numpy as np
        import torch
        from torchvision.io import decode_jpeg

        return list(decode_jpeg(torch.from_numpy(np.frombuffer(encoded, np.uint8).copy())).chunk(2, dim=2))


def dataloader(work: Work, from_bucket: bool, by_pillow: bool = True) -> Iterator[int]:
    """PyTorch's DataLoader with two workers."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(
        Files(work, from_bucket, by_pillow),
        work.batch,
        shuffle=True,
        num_workers=DATALOADER_WORKERS,
        drop_last=True,
        persistent_workers=True,
    )
    return (work.batch for _ in itertools.chain.from_iterable(itertools.repeat(loader)))


def dataloader_tensors(work: Work, from_bucket: bool) -> Iterator[int]:
    """The same with torchvision's own decoder and its resize of tensors."""
    return dataloader(work, from_bucket, by_pillow=False)


def copy(work: Work, from_bucket: bool) -> Iterator[float]:
    """The shards' bytes and nothing else, as the number of records that they would be."""
    from trainer.data import records

    shards = records.read_manifest(Path(work.shards)).splits["train"]
    mean = sum(shard.bytes for shard in shards) / sum(shard.examples for shard in shards)
    sizes = {shard.file: shard.bytes for shard in shards}
    parts = copied_from_bucket(work.bucket, sizes) if from_bucket else copied_from_disk(Path(work.shards), sizes)
    return (part / mean for part in parts)


def copied_from_disk(folder: Path, sizes: dict[str, int]) -> Iterator[int]:
    """Bytes of each read of a megabyte."""
    for name in itertools.cycle(sizes):
        with (folder / name).open("rb") as file:
            for offset in range(0, sizes[name], COPY_BLOCK):
                yield len(os.pread(file.fileno(), COPY_BLOCK, offset))


def copied_from_bucket(bucket: str, sizes: dict[str, int]) -> Iterator[int]:
    """Bytes of each ranged download, of which many run at the same time."""
    from trainer.storage.bucket import parse

    ranges = [(name, at, min(at + COPY_RANGE, size)) for name, size in sizes.items() for at in range(0, size, COPY_RANGE)]
    with ThreadPoolExecutor(COPY_THREADS) as threads:
        while True:
            for content in threads.map(lambda part: (parse(f"{bucket}/shards") / part[0]).read_range(*part[1:]), ranges * 4):
                yield len(content)


CONTENDERS: dict[str, Contender] = {
    "this project": ours,
    "tf.data, TFRecord interleave": plain_tf_data,
    "DataLoader, Pillow": dataloader,
    "DataLoader, torchvision": dataloader_tensors,
    "raw copy": copy,
}


def cpu_seconds() -> float:
    """What this process and its workers have used of all processors."""
    import psutil

    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def run_one(name: str, from_bucket: bool, work: Work) -> tuple[float, float]:
    """Images per second of one contender, in this process, and milliseconds of a processor that an image took."""
    batches = CONTENDERS[name](work, from_bucket)
    began = time.perf_counter()
    while time.perf_counter() - began < work.warm_seconds:
        next(batches)
    began, cpu, images, seconds = time.perf_counter(), cpu_seconds(), 0.0, 0.0
    while seconds < work.seconds:
        images += next(batches)
        seconds = time.perf_counter() - began
    return images / seconds, 1000.0 * (cpu_seconds() - cpu) / images


# --------------------------------------------------------------------------------------------------------------------- the work


def prepare(source: Path, kind: str, count: int, folder: Path) -> None:
    """`count` pairs, the pictures in `source` again and again, as shards with a manifest and as files."""
    from trainer.startup import load_tensorflow

    load_tensorflow()
    from trainer.data import records
    from trainer.data.sample import pair_example

    pictures = sorted([*source.rglob("*.jpg"), *source.rglob("*.jpeg")])
    if not pictures:
        sys.exit(f"{source}: no JPEG pictures of pairs, two in a row, in it")
    chosen = list(itertools.islice(itertools.cycle(pictures), count))
    for name in ("shards", "files"):
        (folder / name).mkdir()
    made = []
    for index in range(SHARDS):
        examples = (pair_example(f"{at:06d}", chosen[at]) for at in range(index, count, SHARDS))
        made.append(records.write_shard(folder / "shards" / records.shard_name("train", index, SHARDS), examples))
    specs = {side: records.ImageSpec(kind=of, channels=3, bit_depth=8) for side, of in (("input", kind), ("target", "photo"))}
    about = {"version": 1, "name": "benchmark", "source": str(source), "licence": "see there", "layout": "pair"}
    records.write_manifest(folder / "shards", records.Manifest(**about, **specs, splits={"train": made}))
    for at, picture in enumerate(chosen):
        (folder / "files" / f"{at:06d}.jpg").write_bytes(picture.read_bytes())


def upload(folder: Path, bucket: str, files: int) -> None:
    """Shards, and as many of the files as a slow contender can need, to the bucket that the environment leads to."""
    from trainer.storage.bucket import parse

    some = sorted((folder / "files").iterdir())[:files]
    for file in [*(folder / "shards").iterdir(), *some]:
        (parse(bucket) / file.parent.name / file.name).upload(file)


def in_a_process(environment: dict[str, str], *arguments: str) -> str:
    """The last line that this program printed when it was run with these arguments."""
    command = [sys.executable, "-m", "benchmarks.input", *arguments]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().rpartition("\n")[2]


@dataclass(frozen=True)
class Entry:
    """One line of the table: a contender, where it reads, and the environment that it needs for that."""

    name: str
    from_bucket: bool
    environment: dict[str, str]

    @property
    def where(self) -> str:
        """The table's word for it."""
        return "bucket" if self.from_bucket else "disk"


def open_bucket(stack: contextlib.ExitStack, folder: Path, bucket: str, files: int) -> dict[str, str]:
    """The tests' bucket service with the work in it, throttled from now on; its environment."""
    from tests.helpers.bucket.service import BucketService

    service = stack.enter_context(BucketService())
    service.bucket(bucket.removeprefix("gs://"))
    in_a_process(service.environment, "--upload", str(folder), bucket, str(files))
    service.throttle(LATENCY, BYTES_PER_SECOND)
    return service.environment


def open_harness(stack: contextlib.ExitStack, harness: Path, folder: Path, bucket: str) -> dict[str, str] | None:
    """A bucket that TensorFlow's own client can reach, if there is such a harness; its environment."""
    if not (harness / "gcs_harness.py").is_file():
        return None
    spec = importlib.util.spec_from_file_location("gcs_harness", harness / "gcs_harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    service = stack.enter_context(module.GcsHarness())
    service.bucket(bucket.removeprefix("gs://"))
    in_a_process(
        {"STORAGE_EMULATOR_HOST": service.url, "GOOGLE_CLOUD_PROJECT": "test-project"}, "--upload", str(folder), bucket, "0"
    )
    service.faults({"path": "", "delay": LATENCY, "rate": BYTES_PER_SECOND, "times": 10**9})
    environment: dict[str, str] = service.env
    return {name: value for name, value in environment.items() if not name.startswith("GCS_READ")}


def entries(stack: contextlib.ExitStack, options: argparse.Namespace, folder: Path, bucket: str) -> list[Entry]:
    """All contenders that can run here; a line for each one that cannot."""
    disk = [Entry(name, False, {}) for name in CONTENDERS]
    environment = open_bucket(stack, folder, bucket, options.bucket_files)
    remote = [Entry(name, True, environment) for name, contender in CONTENDERS.items() if contender is not plain_tf_data]
    proxied = open_harness(stack, Path(options.harness), folder, bucket) if options.harness else None
    if proxied:
        remote.insert(1, Entry("tf.data, TFRecord interleave", True, proxied))
    else:
        print("left out: tf.data from the bucket; its gs:// client needs the TLS proxy that --harness names", file=sys.stderr)
    found = [*disk, *remote]
    if not importlib.util.find_spec("torch"):
        print("left out: DataLoader; install the extra `bench`", file=sys.stderr)
        found = [entry for entry in found if "DataLoader" not in entry.name]
    return [entry for entry in found if options.only in f"{entry.name}, {entry.where}"]


# ------------------------------------------------------------------------------------------------------------------- the report


Results = dict[tuple[str, str], list[tuple[float, float]]]  # (from where, contender) -> images/s and CPU ms of each round


def table(results: Results, project: str = "this project") -> str:
    """Markdown: medians, the range, and how often this project's median is of the contender's."""
    lines = [
        "| from | contender | images/s | lowest to highest | CPU ms an image | this project is |",
        "|---|---|---:|---:|---:|---|",
    ]
    for (where, name), rounds in results.items():
        rates, cpu = ([one[column] for one in rounds] for column in (0, 1))
        own = results.get((where, project))
        ratio = ""
        if own and name not in (project, "raw copy"):
            faster = statistics.median(mine[0] / other[0] for mine, other in zip(own, rounds, strict=True))
            cheaper = statistics.median(other[1] / mine[1] for mine, other in zip(own, rounds, strict=True))
            ratio = f"{faster:.2f} times as fast, CPU {cheaper:.2f}"
        figures = f"{statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} | {statistics.median(cpu):.2f}"
        lines.append(f"| {where} | {name} | {figures} | {ratio} |")
    return "\n".join(lines)


def compete(found: Sequence[Entry], work: Work, rounds: int) -> Results:
    """Each contender once in every round, every other round in the opposite order."""
    results: Results = {(entry.where, entry.name): [] for entry in found}
    for number in range(rounds):
        for entry in found if number % 2 == 0 else reversed(found):
            said = in_a_process(entry.environment, "--run", entry.name, entry.where, json.dumps(asdict(work)))
            rate, cpu = json.loads(said)
            results[entry.where, entry.name].append((rate, cpu))
            print(f"round {number + 1}: {entry.where:6} {entry.name:30} {rate:9,.1f} images/s {cpu:8.3f} ms", file=sys.stderr)
    return results


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input", description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, default=SAMPLE, help="JPEG pictures, two in a row; the packaged sample")
    parser.add_argument("--kind", choices=("labels", "photo"), default="labels", help="of the inputs: how they are resized")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--jitter", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm_seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket_files", type=int, default=600, help="pictures that DataLoader finds in the bucket")
    parser.add_argument("--harness", default="", help="folder of gcs_harness.py, for TensorFlow's own gs:// client")
    parser.add_argument("--only", default="", help="a part of `CONTENDER, disk` or `CONTENDER, bucket`")
    parser.add_argument("--output", type=Path, help="folder for input.json and input.md")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--upload", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Prepare, run all, report; or be one of the processes of that."""
    options = arguments()
    if options.upload:
        upload(Path(options.upload[0]), options.upload[1], int(options.upload[2]))
    elif options.run:
        print(json.dumps(run_one(options.run[0], options.run[1] == "bucket", Work(**json.loads(options.run[2])))), flush=True)
        os._exit(0)  # a pipeline that is left before its end may wait long for its threads
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    """All rounds, and the table."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder, bucket = Path(temporary), "gs://input-benchmark"
        prepare(options.source, options.kind, options.pairs, folder)
        names = ("bucket_files", "kind", "batch", "side", "jitter", "warm_seconds", "seconds")
        given = {name: getattr(options, name) for name in names}
        work = Work(str(folder / "shards"), str(folder / "files"), bucket, **given)
        results = compete(entries(stack, options, folder, bucket), work, options.rounds)
    print(table(results))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        found = [
            {"from": where, "contender": name, "images_per_second_and_cpu_ms": rounds}
            for (where, name), rounds in results.items()
        ]
        (options.output / "input.json").write_text(
            json.dumps({"work": given | {"pairs": options.pairs}, "results": found}, indent=1)
        )
        (options.output / "input.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
