"""Each command: its flags -> one call. TensorFlow and the rooms that need it are loaded only when a command begins."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from absl import flags

from trainer.arguments import need
from trainer.cluster import Cluster, VertexFolders, check_environment, read_cluster, read_container
from trainer.config import SAMPLE_CONFIG, Config, load_config
from trainer.errors import StoppedError, TrainerError, UserError
from trainer.runtime.logs import Where, configure_logs
from trainer.startup import load_tensorflow

if TYPE_CHECKING:
    from trainer.storage.places import Place

Command = Callable[[flags.FlagValues], str]

# google-cloud-storage would look at each bucket itself in the background, which takes a permission that training has no need of.
os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


def _place(text: str, flag: str) -> "Place":
    """The place that a flag names. Google's libraries are loaded for it, so not before the config has been found sound."""
    from trainer.storage.places import place

    return place(text, flag)


def _begin(values: flags.FlagValues) -> None:
    check_environment(os.environ)
    load_tensorflow()
    configure_logs(values.log_format)


def _read_config(path: str | None, overrides: list[str]) -> Config:
    """The config file of this machine or of a bucket."""
    if path is None or not path.startswith("gs://"):
        return load_config(path, overrides)
    try:
        return load_config(path, overrides, _place(path, "--config").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such config file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot read the config file: it is not UTF-8 text") from error


def resolve(values: flags.FlagValues) -> "tuple[Config, Place]":
    """The config that the flags ask for, and the run's folder.

    Raises:
        UserError: a wrong setting or place.
    """
    path = values.config
    if path == "":
        raise UserError("--config=: allowed: a YAML file, or no --config at all")
    if path is None and values.data_dir is None:
        path = str(SAMPLE_CONFIG)
    overrides = list(values.set)
    if values.data_dir is not None:
        overrides.append(f"data.dir={values.data_dir!r}")
    config = _read_config(path, overrides)
    from trainer.storage.service import Patience

    Patience.seconds = config.runtime.bucket_patience_seconds
    _place(config.data.dir, "data.dir" if values.data_dir is None else "--data_dir")
    return config, _model_dir(values.model_dir, Path(path).stem if path else "run")


_SIGNS_OF_VERTEX = ("CLUSTER_SPEC", "CLOUD_ML_JOB_ID")


def _model_dir(named: str | None, run: str) -> "Place":
    """--model_dir; without it the folder that Vertex AI's folders lie in; without that, runs/NAME here.

    Raises:
        UserError: the run would be kept in a container that goes away with it.
    """
    cluster = read_cluster(os.environ)
    if not named and cluster.folders.model:
        return _place(cluster.folders.model, "AIP_MODEL_DIR").parent
    if not named and any(os.environ.get(name) for name in _SIGNS_OF_VERTEX):
        raise UserError(
            "--model_dir: allowed on Vertex AI: a folder, or a job with baseOutputDirectory; else the run is lost with it"
        )
    return _place(named or f"runs/{run}", "--model_dir")


def _is_untouched_sample(values: flags.FlagValues) -> bool:
    """Whether the sample's own config counts, with its own batch size."""
    chosen = any(override.startswith("train.batch_size=") for override in values.set)
    return values.config is None and values.data_dir is None and not chosen


def train(values: flags.FlagValues) -> str:
    """trainer train"""
    config, model_dir = resolve(values)
    cluster = _with_folders_of_the_run(read_cluster(os.environ), values.model_dir)
    Where.worker, Where.workers = cluster.index, cluster.size
    if cluster.role == "evaluator":
        return "this process is an evaluator, and there is nothing for it to do: the workers measure between their steps"
    configure_logs(values.log_format)
    failure = _preflight(config, model_dir, cluster)
    _begin(values)
    from trainer.train.begin import Order

    container = read_container(os.environ)
    container = replace(container, job="/".join(part for part in (container.job, cluster.trial) if part))
    order = Order(config, model_dir, values.strategy, cluster, container, adaptable=_is_untouched_sample(values), failure=failure)
    if values.dry_run:
        if failure:
            raise failure
        from trainer.train.plan import dry_run

        return dry_run(order)
    from trainer.runtime.lease import release_all
    from trainer.train.loop import train as run

    try:
        closing = run(order)
    finally:
        release_all()
    return closing + (_export_for_vertex(model_dir, cluster) if cluster.folders.model and cluster.is_chief else "")


def _with_folders_of_the_run(cluster: Cluster, named: str | None) -> Cluster:
    """A run that has a folder of its own keeps checkpoints and summaries there: Vertex AI gives each job other folders."""
    return replace(cluster, folders=VertexFolders(model=cluster.folders.model)) if named else cluster


def _preflight(config: Config, model_dir: "Place", cluster: Cluster) -> TrainerError | None:
    """Look at the places that a run needs; what that needs is loaded only where there are buckets, or folders of Vertex AI.

    Returns:
        what is wrong, for a worker among others, which has to tell them.

    Raises:
        TrainerError: what is wrong, in a process alone.
    """
    data = _place(config.data.dir, "--data_dir") if config.data.dir else None
    vertex = _folders_of_vertex(cluster.folders)
    if not vertex and all(isinstance(where, Path) for where in (data, model_dir) if where):
        return None
    from trainer.preflight import check_model_folder, preflight

    try:
        if served := vertex.get("AIP_MODEL_DIR"):
            check_model_folder(served, [model_dir, *(folder for folder in vertex.values() if folder != served)])
        preflight(data, [model_dir, *vertex.values()])
    except TrainerError as failure:
        if cluster.size == 1:
            raise
        return failure
    return None


def _folders_of_vertex(folders: VertexFolders) -> "dict[str, Place]":
    named = {
        "AIP_MODEL_DIR": folders.model,
        "AIP_CHECKPOINT_DIR": folders.checkpoints,
        "AIP_TENSORBOARD_LOG_DIR": folders.summaries,
    }
    return {name: _place(folder, name) for name, folder in named.items() if folder}


def _try_out(place: "Place") -> "Place":
    """The place that a command writes to; a bucket that refuses is named before the work is done, not after it."""
    if not isinstance(place, Path):
        from trainer.preflight import preflight

        preflight(None, [place])
    return place


def _export_for_vertex(model_dir: "Place", cluster: Cluster) -> str:
    """Vertex AI takes a trained model from AIP_MODEL_DIR: a SavedModel lies there when the job ends."""
    from trainer.export import export_for_serving
    from trainer.trained import open_run

    to = _place(cluster.folders.model or "", "AIP_MODEL_DIR")
    return "\n" + export_for_serving(open_run(model_dir, folders=cluster.folders), to)


def percentages(text: str) -> tuple[int, ...]:
    """`90,5,5` as numbers.

    Raises:
        UserError: they are not three that make 100.
    """
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts) or sum(int(part) for part in parts) != 100:
        raise UserError(f"--split_percent={text}: allowed: three whole numbers that make 100, such as 90,5,5")
    return tuple(int(part) for part in parts)


def stop_at(signum: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM where nothing better is installed; process 1 of a container would not be ended without one.

    Raises:
        StoppedError: always.
    """
    raise StoppedError(f"{signal.Signals(signum).name}: stopped; the same command begins again, or goes on from what is saved")


def prepare(values: flags.FlagValues) -> str:
    """trainer prepare"""
    source, output = need(values, "prepare", "source", "output")
    percent = percentages(values.split_percent)
    to = _try_out(_place(output, "--output"))
    _begin(values)
    from trainer.data.prepare import Options
    from trainer.data.prepare import prepare as run
    from trainer.data.published import PUBLISHED, fetch

    options = Options(
        source, values.layout, to.absolute() if isinstance(to, Path) else to, values.labels, percent, values.shard_mb * 10**6
    )
    if source in PUBLISHED and not Path(source).exists():
        return fetch(source, options, values.base_url, values.processes, values.skip_bad)
    return run(options, values.processes, values.skip_bad)


def check(values: flags.FlagValues) -> str:
    """trainer check"""
    (data_dir,) = need(values, "check", "data_dir")
    where, thumbnails = _place(data_dir, "--data_dir"), values.thumbnails
    sheet = _try_out(_place(thumbnails, "--thumbnails")) if thumbnails else None
    _begin(values)
    from trainer.check import check as run

    return run(where, sheet)


def _hurrying(values: flags.FlagValues, command: Command) -> str:
    """Do what is asked for; after a signal, do not wait long for a bucket that is away."""
    from trainer.runtime.hearing import Ears

    def hurry(_: signal.Signals) -> None:
        if "trainer.storage.service" in sys.modules:
            sys.modules["trainer.storage.service"].Hurry.ask()

    with Ears(hurry):
        return command(values)


def _in_one_process(values: flags.FlagValues, command: Command) -> str:
    """Only training is shared among workers; of all that run another command, the chief does it."""
    cluster = read_cluster(os.environ)
    if not cluster.is_chief:
        return f"worker {cluster.index}: this command works in one process, the chief's; nothing to do here"
    return command(values)


def _trained(values: flags.FlagValues, command: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - it would load TensorFlow
    (model_dir,) = need(values, command, "model_dir")
    where = _place(model_dir, "--model_dir")
    _begin(values)
    from trainer.trained import open_run

    folders = _with_folders_of_the_run(read_cluster(os.environ), model_dir).folders
    return open_run(where, values.checkpoint, values.inference, folders)


def evaluate(values: flags.FlagValues) -> str:
    """trainer evaluate"""
    (model_dir,) = need(values, "evaluate", "model_dir")
    _try_out(_place(model_dir, "--model_dir"))
    run = _trained(values, "evaluate")
    from trainer.evaluate import evaluate as measure

    return measure(run, values.data_dir or "", values.split)


def predict(values: flags.FlagValues) -> str:
    """trainer predict"""
    given, output = need(values, "predict", "input", "output")
    to = _try_out(_place(output, "--output"))
    run = _trained(values, "predict")
    from trainer.predict import predict as draw

    return draw(run, _place(given, "--input"), to, values.seed)


def export(values: flags.FlagValues) -> str:
    """trainer export"""
    (output,) = need(values, "export", "output")
    to = _try_out(_place(output, "--output"))
    run = _trained(values, "export")
    from trainer.export import export as write

    return write(run, to, [name for name in values.formats.split(",") if name])


_ALONE: dict[str, Command] = {
    "prepare": prepare,
    "check": check,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
}


def _tidily(values: flags.FlagValues, command: Command) -> str:
    """Do what is asked for, and leave nothing in TMPDIR."""
    try:
        return command(values)
    finally:
        if "trainer.runtime.files" in sys.modules:
            sys.modules["trainer.runtime.files"].remove_scratch()


COMMANDS: dict[str, Command] = {
    "train": partial(_tidily, command=train),
    **{
        name: partial(_tidily, command=partial(_hurrying, command=partial(_in_one_process, command=command)))
        for name, command in _ALONE.items()
    },
}
