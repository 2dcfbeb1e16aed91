"""The outer loop on the host: restore -> blocks of steps on the devices -> what is due -> final save."""

import logging
from collections.abc import Callable
from contextlib import nullcontext

import tensorflow as tf

from trainer.errors import BucketAwayError, DataError, DivergedError, StoppedError, TrainerError
from trainer.runtime.ledger import Marker
from trainer.runtime.logs import Where
from trainer.runtime.preemption import StopSignal
from trainer.runtime.progress import Progress
from trainer.runtime.run_folder import RunFolder
from trainer.runtime.workers import Watchdog, meet, naming_lost_peers
from trainer.storage.bucket import BucketPath
from trainer.storage.service import Hurry, patience
from trainer.train.actions import Run
from trainer.train.begin import Order, Start, begin
from trainer.train.block import deal, make_block
from trainer.train.evaluate import InterruptedEvaluation
from trainer.train.state import TrainState

log = logging.getLogger(__name__)
LAST_SAVE_SECONDS = 10.0  # another bucket may be away too


def train(order: Order) -> str:
    """Train as ordered, going on from the newest whole checkpoint in the folder; return the closing lines.

    Raises:
        UserError: config, data, folder or environment must change first.
        DivergedError: a loss or gradient was not finite.
        PeerLostError: another worker went away.
        StoppedError: a signal asked for a stop; what was done is saved.
    """
    Hurry.forget()
    start = begin(order)
    if start.finished and start.newest:
        return "this run is finished; raise train.steps to go on\n" + closing_lines(start.folder, start.newest)
    strategy = start.build()
    with naming_lost_peers(order.cluster), StopSignal(Hurry.ask) as stop:
        watchdog = Watchdog(start.config.runtime.peer_timeout_seconds, lambda: stop.received is not None)
        with watchdog if order.cluster.size > 1 else nullcontext():
            state = TrainState(start.config, start.data.specs, strategy)
            workers = meet(strategy, order.cluster)
            run = Run(start.config, start.folder, start.data, state, strategy, workers, stop, watchdog)
            run_to_the_end(run, start)
    if not order.cluster.is_chief:
        return f"worker {order.cluster.index} is done; the chief has written everything to {start.folder.path}"
    return closing_lines(start.folder, run.checkpoints.markers()[-1])


def run_to_the_end(run: Run, start: Start) -> None:
    """Restore, train, and see that a failure that will come again is recorded."""
    try:
        restore(run, start.newest)
        train_to_the_end(run)
        run.workers.leave()
    except (DataError, DivergedError) as failure:
        record(start, failure)
        raise
    finally:
        run.summaries.close()
        start.folder.close()


def record(start: Start, failure: TrainerError) -> None:
    """Leave the marker of a failure; where that cannot be done, the failure itself is what counts."""
    try:
        start.folder.record_failure(str(failure), failure.exit_code, start.mark)
    except TrainerError as error:
        log.warning("%s; a restart will try again", error)


def restore(run: Run, newest: Marker | None) -> None:
    """Restore, and take back whatever was written after the restored step."""
    done = -1
    if newest:
        run.checkpoints.restore(run.state.checkpoint(), newest)
        run.saved_step, run.saved_pending = newest.step, newest.pending
        done = newest.step - 1 if newest.pending else newest.step
        Where.step = newest.step
        run.done_step = done
        log.info("going on from the checkpoint of step %d in %s", newest.step, run.checkpoints.folder)
    run.folder.cut_after(done)
    run.summaries.cut_after(done)
    run.checkpoints.forget_after(newest.step if newest else -1)
    run.find_best()
    run.mark_best()
    if newest and newest.pending:
        finish_step(run, newest.step)


def train_to_the_end(run: Run) -> None:
    """Blocks of steps, each followed by what is due, until the last step; then the test split."""
    state, train = run.state, run.config.train
    step = int(state.step.numpy())
    run.watchdog.follow(lambda: int(state.step.numpy()))
    block = make_block(run.strategy, state, run.config, run.stop, deal(run.strategy, run.data, run.config, step))
    progress = Progress(step, train.steps, train.batch_size)
    try:
        if run.stopping():
            save_and_stop(run, step, pending=False)
        while step < train.steps:
            step = run_block(run, block, step)
            losses = state.mean_losses() or state.latest_losses()
            progress.update(step, run.meter.images_per_second, losses, run.meter.fed)
            finish_step(run, step)
        measure_test(run, step)
    except BucketAwayError:
        save_what_was_done(run)
        if run.stop.received and run.workers.size == 1:
            raise stopped(run) from None
        raise
    finally:
        progress.close()


def save_what_was_done(run: Run) -> None:
    """The data's bucket is away: save the steps since the last checkpoint, if the run is kept elsewhere.

    A worker among others leaves it: the state could differ from what its peers have reached.
    """
    step, data, kept = int(run.state.step.numpy()), run.data.folder, run.checkpoints.folder
    elsewhere = isinstance(data, BucketPath) and not (isinstance(kept, BucketPath) and kept.bucket == data.bucket)
    if run.workers.size > 1 or not elsewhere or not step or run.saved_step == step:
        return
    try:
        with patience(LAST_SAVE_SECONDS):
            run.checkpoint(step, pending=run.pending(step))
    except TrainerError as error:
        log.warning("%s; the newest checkpoint is that of step %s", error, run.saved_step)


def run_block(run: Run, block: Callable[[tf.Tensor], None], step: int) -> int:
    """Run one block and return the step that was reached.

    Raises:
        DivergedError: a step was not finite; its update was not made.
        DataError: a record of the next batch is damaged.
    """
    until = min(step + run.steps_per_block(), *(action.every.next_after(step) for action in run.actions()))
    run.meter.start(*run.input_totals())
    with run.data.naming_damage(run.data.train, lambda: run.data.batch_records(int(run.state.step.numpy())).tolist()):
        block(tf.constant(until, tf.int64))
    reached = int(run.state.step.numpy())
    run.meter.stop(reached - step, *run.input_totals())
    run.watchdog.beat()
    if not run.state.healthy.numpy():
        raise diverged(run, reached + 1)
    return reached


def diverged(run: Run, step: int) -> DivergedError:
    """The line that names step and losses."""
    losses = ", ".join(f"{name} {value:g}" for name, value in run.state.latest_losses().items())
    kept = "no checkpoint was due yet" if run.saved_step is None else f"the checkpoint of step {run.saved_step} is kept"
    return DivergedError(
        f"step {step}: a loss or gradient is not finite ({losses}); the run stops before that update and {kept}; "
        "look at the pairs of this batch, or begin again with a lower optimizer.learning_rate and another --model_dir"
    )


def finish_step(run: Run, step: int) -> None:
    """Do what is due after a step, unless a stop was asked for; then save the step, marked as not finished.

    Raises:
        StoppedError: a stop was asked for.
    """
    if run.stopping():
        save_and_stop(run, step, pending=run.pending(step))
    try:
        run.act(step)
    except InterruptedEvaluation:
        save_and_stop(run, step, pending=True)
    if run.stopping():
        save_and_stop(run, step, pending=False)


def save_and_stop(run: Run, step: int, *, pending: bool) -> None:
    """Save unless it is saved already.

    Raises:
        StoppedError: always; it says what was saved.
    """
    run.watchdog.leave_time()
    if step and run.saved_step != step:
        run.checkpoint(step, pending=pending)
    run.workers.leave()
    raise stopped(run)


def stopped(run: Run) -> StoppedError:
    """The line that says who asked for the stop, and what is saved."""
    saved = f"step {run.saved_step} is saved in {run.folder.path}" if run.saved_step is not None else "nothing is saved yet"
    by = run.stop.received or "a signal to another worker"
    return StoppedError(f"{by}: stopped; {saved}; the same command goes on from there")


def measure_test(run: Run, step: int) -> None:
    """Measure the trained generator once on the test split, if there is one."""
    if not run.data.split("test").examples:
        return
    try:
        run.measure("test", step)
    except InterruptedEvaluation:
        save_and_stop(run, step, pending=False)


def closing_lines(folder: RunFolder, newest: Marker) -> str:
    """Where everything is, and the figure that the last measurement gave."""
    lines = [
        f"pictures    {folder.samples}",
        f"metrics     {folder.metrics_file}",
        f"checkpoint  {folder.checkpoints / newest.prefix}",
    ]
    scores = [entry for entry in folder.metrics() if entry["split"] == "val"]
    if scores:
        best = min(scores, key=lambda entry: (entry["l1"], entry["step"]))
        lines.append(f"best        step {best['step']}, val L1 {best['l1']:.1f} of 255; its checkpoint is kept")
    measured = [entry for entry in folder.metrics() if entry["step"] == newest.step]
    return "\n".join(lines + [f"{entry['split']} L1 {entry['l1']:.1f} of 255" for entry in measured])
