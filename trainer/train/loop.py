"""The outer loop on the host: restore -> blocks of steps on the device -> what is due -> final save."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import tensorflow as tf

from trainer.config import Config
from trainer.data.pipeline import PairData
from trainer.data.sample import ensure_sample
from trainer.errors import DataError, DivergedError, StoppedError, UserError
from trainer.runtime import strategy as devices
from trainer.runtime.checkpoints import Checkpoints, Marker
from trainer.runtime.meter import Meter
from trainer.runtime.preemption import StopSignal
from trainer.runtime.progress import Progress
from trainer.runtime.run_folder import RunFolder, fingerprint
from trainer.runtime.summaries import cut_events_after
from trainer.runtime.versions import run_notes, warn_of_changes
from trainer.train.actions import Run
from trainer.train.evaluate import InterruptedEvaluation
from trainer.train.state import TrainState
from trainer.train.step import train_step

log = logging.getLogger(__name__)
Batches = Iterator[Mapping[str, tf.Tensor]]


def make_block(
    strategy: tf.distribute.Strategy, state: TrainState, config: Config, stop: StopSignal, batches: Batches
) -> Callable[[tf.Tensor], None]:
    """A graph function: run steps until `state.step` is its argument, a stop is asked for, or one is not finite."""

    def block(until: tf.Tensor) -> None:
        while (state.step < until) & state.healthy & ~stop.flag:
            tf.autograph.experimental.set_loop_options(parallel_iterations=1)
            result = strategy.run(train_step, (state, config, next(batches)))
            state.record(result.losses, result.finite)

    compiled: Callable[[tf.Tensor], None] = tf.function(block)
    return compiled


def train(config: Config, model_dir: Path) -> str:
    """Train as the config says, going on from the newest whole checkpoint in `model_dir`; return the closing lines.

    Raises:
        UserError: config, data or folder must change first.
        DivergedError: a loss or gradient was not finite.
        StoppedError: a signal asked for a stop; what was done is saved.
    """
    threads = devices.configure_threads(config.runtime)
    strategy = devices.one_device()
    given = PairData(Path(config.data.dir), config).check_training() if config.data.dir else None
    folder = RunFolder(model_dir).claim()
    folder.check_config(config)
    data = given or PairData(ensure_sample(folder.sample_data), config).check_training()
    mark = fingerprint(config, data.folder)
    folder.check_failure(mark)
    newest = Checkpoints(folder.checkpoints, config.train.keep).newest_whole()
    if newest and is_finished(newest, folder, data, config):
        return "this run is finished; raise train.steps to go on\n" + closing_lines(folder, newest)
    note_what_runs(folder, config, threads, data)
    say_what_begins(config, data, folder, threads)
    with StopSignal() as stop:
        with strategy.scope():
            state = TrainState(config, data.specs)
        run = Run(config, folder, data, state, stop, Meter(config.train.batch_size))
        try:
            start(run, newest)
            train_to_the_end(run, strategy, stop)
        except (DataError, DivergedError) as failure:
            folder.record_failure(str(failure), failure.exit_code, mark)
            raise
        finally:
            run.summaries.close()
    return closing_lines(folder, run.checkpoints.markers()[-1])


def note_what_runs(folder: RunFolder, config: Config, threads: int, data: PairData) -> None:
    """Write config.yaml with the versions, threads and data; say what changed since the run began.

    Raises:
        UserError: the run was trained on other data.
    """
    before, now = folder.notes(), run_notes(threads, data.manifest.digest())
    if before.get("data", now["data"]) != now["data"]:
        raise UserError(f"{folder.path}: this run was trained on other data than {data.folder}; use another --model_dir")
    warn_of_changes(before, now)
    folder.write_config(config, now)
    folder.write_data(data.manifest.about())


def say_what_begins(config: Config, data: PairData, folder: RunFolder, threads: int) -> None:
    """One line, so that nobody trains for a day on the wrong thing."""
    where = data.folder if config.data.dir else "the packaged sample; --data_dir names another data set"
    device = devices.describe(threads)
    log.info("training on %s (%s), %d pairs, into %s, on %s", data.manifest.name, where, data.train.examples, folder.path, device)


def start(run: Run, newest: Marker | None) -> None:
    """Restore, and take back whatever was written after the restored step."""
    done = -1
    if newest:
        run.checkpoints.restore(run.state.checkpoint(), newest)
        run.saved_step, run.saved_pending = newest.step, newest.pending
        done = newest.step - 1 if newest.pending else newest.step
        log.info("going on from the checkpoint of step %d in %s", newest.step, run.checkpoints.folder)
    run.folder.cut_after(done)
    cut_events_after(run.folder.summaries, done)
    run.checkpoints.forget_after(newest.step if newest else -1)
    run.find_best()
    run.mark_best()
    if newest and newest.pending:
        finish_step(run, newest.step)


def train_to_the_end(run: Run, strategy: tf.distribute.Strategy, stop: StopSignal) -> None:
    """Blocks of steps, each followed by what is due, until the last step; then the test split."""
    state, train = run.state, run.config.train
    step = int(state.step.numpy())
    block = make_block(strategy, state, run.config, stop, iter(run.data.training_batches(step, train.steps)))
    progress = Progress(step, train.steps, train.batch_size)
    try:
        if stop.received:
            save_and_stop(run, step, pending=False)
        while step < train.steps:
            before, step = step, run_block(run, block, step)
            if step == before:  # a stop came between two blocks: what was due has been done
                save_and_stop(run, step, pending=False)
            progress.update(step, run.meter.images_per_second, state.mean_losses() or state.latest_losses())
            finish_step(run, step)
    finally:
        progress.close()
    measure_test(run, step)


def run_block(run: Run, block: Callable[[tf.Tensor], None], step: int) -> int:
    """Run one block and return the step that was reached.

    Raises:
        DivergedError: a step was not finite; its update was not made.
        DataError: a record of the next batch is damaged.
    """
    until = min(step + run.steps_per_block(), *(action.every.next_after(step) for action in run.actions()))
    run.meter.start()
    with run.data.naming_damage(run.data.train, lambda: run.data.batch_records(int(run.state.step.numpy())).tolist()):
        block(tf.constant(until, tf.int64))
    reached = int(run.state.step.numpy())
    run.meter.stop(reached - step)
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
    if run.stop.received:
        save_and_stop(run, step, pending=any(action.every.due(step) for action in run.actions()))
    try:
        run.act(step)
    except InterruptedEvaluation:
        save_and_stop(run, step, pending=True)
    if run.stop.received:
        save_and_stop(run, step, pending=False)


def save_and_stop(run: Run, step: int, *, pending: bool) -> None:
    """Save unless it is saved already.

    Raises:
        StoppedError: always; it says what was saved.
    """
    if step and run.saved_step != step:
        run.checkpoint(step, pending=pending)
    saved = f"step {run.saved_step} is saved in {run.folder.path}" if run.saved_step is not None else "nothing was trained yet"
    raise StoppedError(f"{run.stop.received}: stopped; {saved}; the same command goes on from there")


def measure_test(run: Run, step: int) -> None:
    """Measure the trained generator once on the test split, if there is one."""
    if not run.data.split("test").examples:
        return
    try:
        run.measure("test", step)
    except InterruptedEvaluation:
        save_and_stop(run, step, pending=False)


def is_finished(newest: Marker, folder: RunFolder, data: PairData, config: Config) -> bool:
    """Whether all steps are done, and the test split, if there is one, is measured."""
    measured = any(entry["split"] == "test" and entry["step"] == newest.step for entry in folder.metrics())
    return newest.step >= config.train.steps and not newest.pending and (measured or not data.split("test").examples)


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
