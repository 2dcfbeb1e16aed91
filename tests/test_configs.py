"""The files in configs/: what their first lines say, what they set, and that each can be trained with."""

import re
import shlex
from pathlib import Path

import pytest

from trainer.arguments import parse
from trainer.cluster import Cluster
from trainer.commands import resolve
from trainer.config import SAMPLE_CONFIG, Config, leaves, load_config
from trainer.data.published import PUBLISHED
from trainer.train.begin import Order
from trainer.train.plan import dry_run

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.yaml"))
OF_SETS = [path for path in FILES if path.stem != "sample"]
MAY_DIFFER = {
    "seed", "data.direction", "data.image_size", "data.jitter", "data.mirror", "train.batch_size",
    "train.steps", "train.checkpoint_every", "train.evaluate_every", "train.sample_every", "train.summary_every",
}  # fmt: skip


def test_there_is_one_for_each_published_set_and_the_sample() -> None:
    assert {path.stem for path in FILES} == {*PUBLISHED, "sample"}
    assert load_config(str(ROOT / "configs" / "sample.yaml")) == load_config(str(SAMPLE_CONFIG))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_opens_with_a_command_that_works_a_time_and_a_metric(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert [head[0][:10], head[1][:7], head[2][:9]] == ["# Command:", "# Time:", "# Metric:"]
    command, values = parse(shlex.split(re.sub(r"\(.*", "", head[0][10:])))
    config, model_dir = resolve(values)
    assert (command, model_dir) == ("train", Path("runs") / path.stem)
    assert config == load_config(str(path), [f"data.dir={config.data.dir!r}"])


@pytest.mark.parametrize("path", OF_SETS, ids=lambda path: path.stem)
def test_the_networks_losses_and_optimiser_are_the_papers(path: Path) -> None:
    default = dict(leaves(Config()))
    other = {key for key, value in leaves(load_config(str(path))) if value != default[key]}
    assert other <= MAY_DIFFER
    stated = re.search(r"([\d,]+) steps", path.read_text())
    assert stated
    assert int(stated[1].replace(",", "")) == load_config(str(path)).train.steps


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dry_run_with_a_file_plans_its_steps(path: Path, sample_folder: Path, tmp_path: Path) -> None:
    """On the sample, with narrow networks."""
    narrow = ("model.generator.filters=2", "model.discriminator.filters=2")
    config = load_config(str(path), [*narrow, f"data.dir={str(sample_folder)!r}"])
    report = dry_run(Order(config, tmp_path / "run", "one_device", Cluster()))
    assert f"plan: {config.train.steps:,} steps of batch size {config.train.batch_size}" in report
    sides = [line.split() for line in report.splitlines() if line.startswith(("  input  ", "  target "))]
    kinds = ["labels,", "photo,"] if config.data.direction == "forward" else ["photo,", "labels,"]
    assert [side[1] for side in sides] == kinds
    assert list(tmp_path.iterdir()) == []
