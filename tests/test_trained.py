"""A run with everything that changes which weights are used, and how: average, mixed precision, norm over replicas."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.processes import run_trainer
from tests.helpers.settings import SMALL
from trainer.export import stock_model
from trainer.model.generators import translate
from trainer.train.evaluate import Evaluator
from trainer.trained import TrainedRun, open_run

pytestmark = pytest.mark.slow

SETTINGS = (
    *SMALL,
    "data.image_size=[32,32]",
    "train.steps=6",
    "train.batch_size=2",
    "train.ema_decay=0.9",
    "train.sample_every=0",
    "train.microbatches=1",
)
KINDS = ("model.norm=sync_batch", "model.precision=mixed_bfloat16", "optimizer.learning_rate=0.01", "train.evaluate_every=0")


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    flags = [f"--set={setting}" for setting in (*SETTINGS, *KINDS)]
    done = run_trainer(f"--model_dir={folder}", "--strategy=mirrored", "--set=runtime.cpu_devices=2", *flags)
    assert done.returncode == 0, done.stderr
    return open_run(folder)


def saved(run: TrainedRun, name: str) -> list[np.ndarray]:
    reader = tf.train.load_checkpoint(str(run.folder.checkpoints / run.marker.prefix))
    keys = sorted(key for key in reader.get_variable_to_shape_map() if key.startswith(f"{name}/") and "VARIABLE" in key)
    return [reader.get_tensor(key) for key in keys]


def test_the_average_is_what_is_used(averaged_run: TrainedRun) -> None:
    used = {array.tobytes() for array in averaged_run.generator().get_weights() if array.size > 8}
    averaged, newest = saved(averaged_run, "averaged"), saved(averaged_run, "generator")
    assert used <= {array.tobytes() for array in averaged}
    assert not used <= {array.tobytes() for array in newest}


def test_it_measures_what_the_run_measured(averaged_run: TrainedRun) -> None:
    """On one device here, on two replicas there: each picture weighs once, and its score is its own."""
    from trainer.data.pipeline import PairData

    data = PairData(averaged_run.folder.sample_data, averaged_run.config)
    evaluator = Evaluator(averaged_run.generator(any_size=False), data, averaged_run.config)
    here = evaluator.measure(data.split("test"), lambda: False)
    lines = [json.loads(line) for line in averaged_run.folder.metrics_file.read_text().splitlines()]
    (there,) = (line for line in lines if line["split"] == "test")
    assert here["images"] == there["images"] == 15
    for name in ("l1", "psnr", "ssim"):
        np.testing.assert_allclose(here[name], there[name], rtol=1e-4)


def in_float32(run: TrainedRun) -> TrainedRun:
    """The same run, generating in full precision."""
    model = run.config.model.model_copy(update={"precision": "float32"})
    return dataclasses.replace(run, config=run.config.model_copy(update={"model": model}))


def test_the_exported_copy_rounds_as_the_run_does(averaged_run: TrainedRun, tmp_path: Path) -> None:
    """What bfloat16 loses, measured against float32, is lost by both alike; in float32 they are one."""
    images = tf.constant(np.random.default_rng(0).uniform(-1, 1, (4, 32, 32, 3)), tf.float32)
    seed, exact_run = averaged_run.config.seed, in_float32(averaged_run)
    drawn, exact = (translate(run.generator(any_size=False), images, seed).numpy() for run in (averaged_run, exact_run))
    stock_model(averaged_run).save(tmp_path / "x.keras")
    loaded = keras.saving.load_model(tmp_path / "x.keras")(images).numpy()
    lost = np.abs(drawn - exact)
    assert 0 < lost.mean() < 0.01
    assert np.abs(loaded - exact).mean() < 1.05 * lost.mean()
    assert np.abs(loaded - drawn).mean() < 0.1 * lost.mean()
    assert np.abs(loaded - drawn).max() <= lost.max()
    np.testing.assert_allclose(stock_model(exact_run)(images), exact, atol=2e-6)
