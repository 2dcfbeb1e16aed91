"""A run that is begun on two replicas goes on with any other number, on the same global batches."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.events import scalars
from tests.helpers.processes import run_trainer
from tests.helpers.settings import TINY, flags
from tests.helpers.workers import Workers

TWO = ("--strategy=mirrored", "--set=runtime.cpu_devices=2")


HALF, WHOLE = 10, 20
APART = 5e-6  # 2.3e-7 was measured


def arguments(folder: Path, steps: int) -> list[str]:
    settings = (
        *TINY, "train.batch_size=4", "train.summary_every=1", "train.evaluate_every=10", "train.sample_every=0",
        "train.checkpoint_every=10", "model.norm=sync_batch", "optimizer.learning_rate=0.002", f"train.steps={steps}",
    )  # fmt: skip
    return flags(folder, *settings)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on two replicas."""
    folder = tmp_path_factory.mktemp("elastic") / "half"
    done = run_trainer(*arguments(folder, HALF), *TWO)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(half: Path) -> Path:
    """Ten more on the same two."""
    folder = Path(shutil.copytree(half, half.with_name("whole")))
    done = run_trainer(*arguments(folder, WHOLE), *TWO)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "devices"),
    [(1, 1), (1, 4), (2, 1)],
)
def test_it_goes_on_with_another_number_of_replicas(workers: int, devices: int, half: Path, whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "run"))
    flags = [*arguments(folder, WHOLE), f"--set=runtime.cpu_devices={devices}"]
    if workers == 1:
        done = run_trainer(*flags)
        assert done.returncode == 0, done.stderr
        said = done.stderr
    else:
        several = Workers(tmp_path / "logs", *flags, count=workers)
        assert several.codes() == {0: 0, 1: 0}
        said = several.log(0)
    changed = f"replicas 2 -> {workers * devices}" if workers == 1 else "workers 1 -> 2"
    assert f"since the run began: {changed}; results will agree to rounding, not bit for bit" in said
    expected, found = scalars(whole), scalars(folder)
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    apart = max(abs(a - b) / max(abs(a), 1e-3) for (*_, a), (*_, b) in zip(expected, found, strict=True))
    print(f"{workers} workers of {devices}: losses and metrics differ by {apart:.1e} at most")
    assert apart < APART
    later = [value for step, tag, value in expected if tag == "loss/l1" and step > HALF]
    assert np.std(later) > 1000 * APART, "batches differ from each other by far more than that"
