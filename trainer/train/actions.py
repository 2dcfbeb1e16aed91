"""What happens at intervals between blocks of steps: evaluation, scalars, sample pictures, checkpoints."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.config import Config
from trainer.data.pipeline import PairData
from trainer.runtime.checkpoints import Checkpoints
from trainer.runtime.meter import Fed, InputWatch, Meter
from trainer.runtime.preemption import StopSignal
from trainer.runtime.run_folder import RunFolder
from trainer.runtime.summaries import open_summaries
from trainer.runtime.workers import Watchdog, Workers
from trainer.train.evaluate import Evaluator
from trainer.train.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Every:
    """Every so many steps, and at the last step; 0 means never."""

    steps: int
    last: int

    def due(self, step: int) -> bool:
        """Whether it happens after this step."""
        return self.steps > 0 and (step % self.steps == 0 or step == self.last)

    def next_after(self, step: int) -> int:
        """The first step after `step` at which it happens."""
        if not self.steps:
            return self.last
        return min(self.last, step + self.steps - step % self.steps)


@dataclass(frozen=True)
class Action:
    """Something that happens at intervals; it is called with the step."""

    every: Every
    call: Callable[[int], None]


class Run:
    """The parts of a run that actions work on, and the actions themselves, one method each."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        data: PairData,
        state: TrainState,
        strategy: tf.distribute.Strategy,
        workers: Workers,
        stop: StopSignal,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.folder, self.data, self.state = config, folder, data, state
        self.strategy, self.workers, self.stop, self.watchdog = strategy, workers, stop, watchdog
        self.meter, self.input_watch = Meter(config.train.batch_size), InputWatch()
        writes = workers.index == 0
        self.checkpoints: Checkpoints = folder.store(config.train.keep)
        self.summaries = open_summaries(folder.summaries, folder.confirm_claim, writes=writes)
        self.evaluator = Evaluator(state.drawer, data, config, strategy, workers)
        self.done_step: int | None = None
        self.saved_step: int | None = None
        self.saved_pending = False
        self._best_step: int | None = None
        self._best_l1: float | None = None

    def stopping(self) -> bool:
        """Whether any worker was asked to stop; all of them must ask at the same moments."""
        return self.workers.any(self.stop.received is not None)

    def actions(self) -> list[Action]:
        """What happens at intervals, in order: the evaluation first, because it alone can be interrupted; the checkpoint
        last, so that all that was written for a step is on disk before the step counts as done."""
        train, last = self.config.train, self.config.train.steps
        return [
            Action(Every(train.evaluate_every, last), self.evaluate),
            Action(Every(train.summary_every, last), self.summarise),
            Action(Every(train.sample_every, last), self.sample),
            Action(Every(train.checkpoint_every, last), self.checkpoint),
        ]

    def act(self, step: int) -> None:
        """Do what is due after a step; the best step so far and the last one are saved in any case.

        Raises:
            InterruptedEvaluation: a stop was asked for; nothing has been done for this step.
            TrainerError: one of them failed; the means of the losses are as before, so that all can be done again.
        """
        self.folder.check_claim()
        with self.state.keeping_sums():
            self._do(step)
        self.done_step = step

    def pending(self, step: int) -> bool:
        """Whether something that is due after a step has not been done."""
        return self.done_step != step and bool(due(self.actions(), step))

    def _do(self, step: int) -> None:
        for action in due(self.actions(), step):
            action.call(step)
        wanted = step in (self._best_step, self.config.train.steps) or self.saved_step == step
        if wanted and (self.saved_step != step or self.saved_pending):
            self.checkpoint(step)
        if step == self._best_step:
            self.mark_best()

    def steps_per_block(self) -> int:
        """Steps that the devices do before the hosts look again; the chief's clock counts for all."""
        wanted = self.config.train.steps_per_loop
        return self.workers.of_chief(self.meter.steps_per_block() if wanted == "auto" else wanted)

    def evaluate(self, step: int) -> None:
        """Measure on val; note the best so far and save it."""
        val = self.data.split("val")
        if not val.examples:
            return
        scores = self.measure("val", step)
        self.summaries.scalars("val", {name: scores[name] for name in ("l1", "psnr", "ssim")}, step)
        self.find_best()

    def measure(self, split: str, step: int) -> dict[str, float | int]:
        """Measure on a split and add the line to metrics.jsonl."""
        scores = self.evaluator.measure(self.data.split(split), self._interrupted)
        self.folder.add_metrics({"step": step, "split": split, **scores})
        log.info("step %d: %s L1 %.2f of 255, PSNR %.2f dB, SSIM %.4f", step, split, *list(scores.values())[1:])
        return scores

    def _interrupted(self) -> bool:
        self.watchdog.beat()
        return self.stop.received is not None

    def find_best(self) -> None:
        """Work out from metrics.jsonl which evaluation on val had the lowest L1."""
        entries = [entry for entry in self.folder.metrics() if entry["split"] == "val"]
        best = min(entries, key=lambda entry: (entry["l1"], entry["step"]), default=None)
        self._best_step, self._best_l1 = (best["step"], best["l1"]) if best else (None, None)

    def mark_best(self) -> None:
        """Note the best step, whose checkpoint is whole by now; the one that was best before is no longer kept for it."""
        self.checkpoints.mark_best(self._best_step, self._best_l1)
        self.checkpoints.clean()

    def summarise(self, step: int) -> None:
        """Write the losses' means since the last time, the speed and how the input kept up, and begin new means."""
        losses = {f"loss/{name}": value for name, value in self.state.mean_losses().items()}
        speed = {"images_per_second": self.meter.images_per_second}
        self.summaries.scalars("train", losses | speed | self.judge_input(), step)
        self.state.reset_losses()

    def input_totals(self) -> tuple[float, int]:
        """Seconds that this worker's devices have waited for input, and bytes that it has read."""
        return float(self.state.waited.numpy()), self.data.bytes_read

    def judge_input(self) -> dict[str, float]:
        """The input's scalars since the last time: of the worker that waited most, which all others wait for; all that was read.

        Empty before the second block. The chief says it when the input is too slow.
        """
        rows = np.zeros((self.workers.size, len(Fed._fields)))
        rows[self.workers.index] = self.meter.end_interval()
        workers = [Fed(*row) for row in self.workers.add_up(rows.ravel()).reshape(rows.shape).tolist()]
        slowest = max(range(len(workers)), key=lambda index: workers[index].wait_share)
        whole = workers[slowest]._replace(read=sum(worker.read for worker in workers))
        if not whole.seconds:
            return {}
        if self.workers.index == 0:
            self.input_watch.look(whole, "the devices" if len(workers) == 1 else f"worker {slowest}")
        return {"input/wait_share": whole.wait_share, "input/mb_per_second": whole.mb_per_second}

    def sample(self, step: int) -> None:
        """Draw the same validation pairs as every time."""
        self.folder.save_sample(step, self.evaluator.sample_columns)

    def checkpoint(self, step: int, *, pending: bool = False) -> None:
        """Save everything; what was logged before is handed to the file system first."""
        with self.watchdog.busy():
            self.summaries.flush()
            self.checkpoints.save(self.state.checkpoint(), step, pending=pending)
        self.saved_step, self.saved_pending = step, pending


def due(actions: Sequence[Action], step: int) -> list[Action]:
    """The actions that happen after this step."""
    return [action for action in actions if action.every.due(step)]
