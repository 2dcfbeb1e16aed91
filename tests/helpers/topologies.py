"""The inner loop over some number of workers and devices, as real processes of `tests.helpers.equality`."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from tests.helpers.ports import held_ports
from tests.helpers.processes import start_module
from tests.helpers.workers import tf_config

Found = dict[str, np.ndarray]


class Topologies:
    """Runs the program once for each topology and set of cases."""

    def __init__(self, folder: Path, data: Path) -> None:
        self._folder, self._data = folder, data

    @lru_cache  # noqa: B019 - lives as long as the session
    def run(self, workers: int, devices: int, precisions: str, *cases: str) -> list[Found]:
        """What each worker wrote down, tensor by tensor."""
        stem = self._folder / f"{workers}x{devices}-{abs(hash((precisions, cases)))}"
        with held_ports(workers) as ports:
            running = []
            for index in range(workers):
                arguments = [f"{stem}-{index}.npz", str(self._data), "|".join(cases), precisions, str(devices)]
                environment = {"TF_CONFIG": tf_config(ports, index)} if workers > 1 else {}
                running.append(start_module("tests.helpers.equality", *arguments, **environment))
            errors = [process.communicate(timeout=600)[1] for process in running]
        assert [process.returncode for process in running] == [0] * workers, errors
        return [dict(np.load(f"{stem}-{index}.npz")) for index in range(workers)]
