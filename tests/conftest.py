"""What every test may use. TensorFlow is loaded with the first test module that needs it, not here."""

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from tests.helpers.bucket.fixtures import bucket, bucket_service, empty_working_folder
from tests.helpers.clock import OffTimeError
from tests.helpers.settings import small_config

if TYPE_CHECKING:
    from trainer.data.pipeline import PairData
    from trainer.trained import TrainedRun

__all__ = ["bucket", "bucket_service", "empty_working_folder"]

# A shell gives what it starts in the background an ignored Ctrl-C, and nohup an ignored SIGHUP; children inherit them.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

CLOCK_TRIES = 3
TF220 = (
    "tests/model/", "tests/data/test_end_to_end.py", "tests/data/test_pairs.py", "tests/data/test_pipeline.py",
    "tests/runtime/test_checkpoints.py", "tests/runtime/test_strategy.py", "tests/runtime/test_summaries.py",
    "tests/runtime/test_workers.py", "tests/test_export.py", "tests/test_predict.py", "tests/test_relay.py",
    "tests/train/test_block.py", "tests/train/test_compiled.py", "tests/train/test_evaluate.py", "tests/train/test_loop.py",
    "tests/train/test_optimizer.py", "tests/train/test_replicas.py", "tests/train/test_step.py",
)  # fmt: skip
DURATIONS = Path(__file__).parent / "durations.json"
NEEDS_TENSORFLOW = re.compile(
    r"tensorflow|keras|trainer\.(data|model|runtime|train)|trainer import (data|model|runtime|train)|helpers\.(runs|damage)"
)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Load TensorFlow as the trainer does, with its defaults and without its noise, before a test module imports it."""
    if NEEDS_TENSORFLOW.search(module_path.read_text(encoding="utf-8")):
        from trainer.startup import load_tensorflow

        load_tensorflow()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store_durations", action="store_true", help=f"write how long each file took into {DURATIONS.name}")


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what depends on TensorFlow's release: the quick tests of these files."""
    if item.nodeid.startswith(TF220) and not item.get_closest_marker("slow"):
        item.add_marker(pytest.mark.tf220)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that two workers end together; what compares times gets three tries, if that alone fails."""
    known = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
    parts: dict[str, set[str]] = {}
    for item in items:
        parts.setdefault(file_of(item), set()).add(part_of(item))
    seconds = {file: sum(known.get(part, 10.0) for part in of_file) for file, of_file in parts.items()}
    items.sort(key=lambda item: -seconds[file_of(item)])
    for item in items:
        if item.get_closest_marker("clock") and item.config.pluginmanager.hasplugin("rerunfailures"):
            item.add_marker(pytest.mark.flaky(reruns=CLOCK_TRIES - 1, only_rerun=OffTimeError.__name__))


def file_of(test: pytest.Item | pytest.TestReport) -> str:
    """The file that a test stands in."""
    return test.nodeid.split("::")[0]


def part_of(test: pytest.Item | pytest.TestReport) -> str:
    """The quick or the slow tests of a file, as durations.json calls them."""
    return file_of(test) + (" slow" if "slow" in test.keywords else "")


class Durations:
    """Sums up the seconds of each file's quick and slow tests, and says which tests were tried again."""

    def __init__(self, store: bool) -> None:
        self._store, self._seconds, self._again = store, {}, []  # type: ignore[var-annotated]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        part = part_of(report)
        self._seconds[part] = self._seconds.get(part, 0.0) + report.duration
        if report.outcome == "rerun":  # type: ignore[comparison-overlap]
            self._again.append(report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for report in self._again:
            terminalreporter.write_line(f"RETRIED {report.nodeid}: {str(report.longrepr).strip().splitlines()[-1]}")
        if self._store:
            known = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
            known |= {part: round(seconds, 1) for part, seconds in self._seconds.items()}
            DURATIONS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(config.getoption("--store_durations")), "durations")


Make = Callable[[Path], object]
Shared = Callable[[str, Make], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Shared:
    """Make a folder once for all worker processes of a test run: `shared(name, make)` calls `make(folder)` or waits."""
    base = tmp_path_factory.getbasetemp()
    root = base if worker_id == "master" else base.parent

    def get(name: str, make: Make) -> Path:
        folder, done = root / "shared" / name, root / "shared" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def sample_folder(shared: Shared) -> Path:
    """The packaged sample as shards; read it, or copy it, but leave it as it is."""
    from trainer.data.sample import ensure_sample

    return shared("sample", ensure_sample)


@pytest.fixture
def small_data(sample_folder: Path) -> "PairData":
    from trainer.data.pipeline import PairData

    return PairData(sample_folder, small_config("train.batch_size=2"))


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks, losses and updates in double precision, where equality means more."""
    import keras

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def trained_run(shared: Shared) -> "TrainedRun":
    """A run of 24 steps on the sample, its best evaluation at step 20 by decree; leave it as it is."""
    from tests.helpers.runs import train_a_little
    from trainer.trained import open_run

    return open_run(shared("trained", train_a_little))


@pytest.fixture(scope="session")
def exported(shared: Shared, trained_run: "TrainedRun") -> Path:
    """Both exports of that run; read them, or copy them, but leave them as they are."""
    from trainer.export import export

    return shared("exported", lambda folder: export(trained_run, folder, ["saved_model", "keras"]))
