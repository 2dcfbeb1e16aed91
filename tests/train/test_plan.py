"""What --dry_run prints, against numbers worked out here: from the settings, the list of layers and the manifest's JSON."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.settings import small_config
from trainer.cluster import Cluster, Container
from trainer.config import Config
from trainer.data.pipeline import PairData
from trainer.errors import UserError
from trainer.runtime import files
from trainer.train.begin import Order
from trainer.train.plan import describe_stop, dry_run

SETTINGS = (
    "train.batch_size=6", "train.steps=100", "train.checkpoint_every=25", "train.evaluate_every=50", "train.sample_every=20",
    "train.summary_every=10", "train.keep=4", "model.generator.filters=5", "model.discriminator.filters=6",
)  # fmt: skip
# 64x64 halves six times: 5, 10, 20, 40, 40, 40 channels; a receptive field of 16 has one stride of 2: 6 and 12.
ENCODER, UP_IN, UP_OUT = [3, 5, 10, 20, 40, 40, 40], [40, 80, 80, 40, 20], [40, 40, 20, 10, 5]
KERNELS_G = [16 * a * b for a, b in [*pairwise(ENCODER), *zip(UP_IN, UP_OUT, strict=True), (10, 3)]]
NORMED_G = [10, 20, 40, 40, *UP_OUT]
GENERATOR = sum(KERNELS_G) + 2 * sum(NORMED_G) + 5 + 40 + 3
DISCRIMINATOR = 16 * (6 * 6 + 6 * 12 + 12) + 2 * 12 + 6 + 1
MOVING = 2 * (sum(NORMED_G) + 12)
MEGABYTES = 4 * (3 * (GENERATOR + DISCRIMINATOR) + MOVING) / 1e6


@pytest.fixture(scope="module")
def report(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a run that has not begun, in a folder that is not there."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    text = dry_run(Order(small_config(*SETTINGS, f"data.dir={sample_folder}"), folder))
    assert not folder.exists()
    return text


def test_the_networks_are_those_of_the_settings(report: str) -> None:
    assert f"generator: {GENERATOR:,} parameters," in report
    assert f"discriminator: {DISCRIMINATOR:,} parameters, receptive field 16x16, 30x30 logits" in report
    first = re.search(r"^  generator_down1 +32x32x5 +([\d,]+)$", report, re.MULTILINE)
    assert first is not None
    assert first[1] == str(16 * 3 * 5 + 5)


def test_the_data_are_those_of_the_manifest(report: str, sample_folder: Path) -> None:
    manifest = json.loads((sample_folder / "dataset.json").read_text())
    for split, shards in manifest["splits"].items():
        pairs = sum(len(shard["offsets"]) for shard in shards)
        megabytes = sum((sample_folder / shard["file"]).stat().st_size for shard in shards) / 1e6
        assert f"  {split:6} {pairs:>9,} pairs, {megabytes:.1f} MB, shards: {len(shards)}\n" in report
    assert "  input  photo, 3 channels, 8 bits" in report or "  input  labels, 3 channels, 8 bits" in report


def test_the_plan_counts_steps_epochs_and_megabytes(report: str) -> None:
    """40 pairs in whole batches of 6 are 6 steps; beside the newest and the best, one is being written."""
    assert "plan: 100 steps of batch size 6\n  16.7 epochs of 6 steps\n" in report
    assert f"  checkpoint every 25 steps, {MEGABYTES:,.0f} MB each\n" in report
    assert f"  4 newest and the best kept: up to {MEGABYTES * 6:,.0f} MB while one is written\n" in report
    assert "  evaluation every 50, pictures every 20 steps\n  scalars every 10 steps" in report
    assert "strategy one_device (no GPU found): replicas: 1, pairs for each: 6" in report
    assert report.endswith("/run: no run is there yet")


SPEED = MEGABYTES / 8.0  # MB/s: a checkpoint takes 8 seconds


@pytest.mark.parametrize(("grace", "verdict"), [(17, "is too short"), (18, "is too short"), (19, "fits"), (11, "is too short")])
def test_a_stop_needs_two_seconds_and_twice_the_time_of_a_save(
    grace: int, verdict: str, small_data: PairData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk's speed is given, so that a second more or less can be told; test_main.py measures it."""
    monkeypatch.setattr(files, "write_speed", lambda folder: SPEED)
    order = Order(small_config(*SETTINGS), tmp_path, container=Container(grace_seconds=grace))
    line = describe_stop(order, order.config, small_data)
    assert line.startswith(f"  a stop saves {MEGABYTES:,.0f} MB: about 8.0 s at the {SPEED:,.0f} MB/s measured here; ")
    assert line.endswith(f"the grace period of {grace} s (TRAINER_GRACE_SECONDS) {verdict}")


def test_without_a_grace_period_the_usual_ones_are_named(small_data: PairData, tmp_path: Path) -> None:
    order = Order(small_config(*SETTINGS), tmp_path)
    line = describe_stop(order, order.config, small_data)
    assert line.endswith("; docker stop leaves 10 s, Kubernetes 30 s, unless they are told otherwise")


def test_a_batch_that_two_workers_cannot_share_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    cluster = Cluster("TF_CONFIG", ("127.0.0.1:1", "127.0.0.1:2"))
    with pytest.raises(UserError, match=r"^train\.batch_size: got 5, allowed: a multiple of 2 for 2 replicas"):
        dry_run(Order(small_config("train.batch_size=5"), tmp_path / "run", cluster=cluster))


def test_the_batch_of_the_sample_is_adapted_to_the_replicas(tmp_path: Path) -> None:
    """As a run would, where nobody asked for a size."""
    cluster = Cluster("TF_CONFIG", ("127.0.0.1:1", "127.0.0.1:2"))
    order = Order(small_config(*SETTINGS, "train.batch_size=1"), tmp_path / "run", cluster=cluster, adaptable=True)
    assert Config().data.dir == order.config.data.dir
    told = dry_run(order)
    assert "plan: 100 steps of batch size 2\n" in told
    assert "strategy multi_worker_mirrored (TF_CONFIG names 2 workers): replicas: 2, pairs for each: 1" in told
    assert "(the packaged sample)" in told
