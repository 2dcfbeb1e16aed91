"""XLA: networks compiled on one device and two, and the whole step as a TPU would have to compile it."""

from functools import cache
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.settings import small_config
from trainer.data.pipeline import PairData
from trainer.train.optimizer import Clock, read_clock
from trainer.train.state import TrainState
from trainer.train.step import StepResult, train_step

COMMON = ("data.image_size=[32,48]", "train.batch_size=2", "train.steps=50")
STEPS = 3


@cache
def losses_of(folder: Path, *overrides: str, whole: bool = False) -> np.ndarray:
    """The losses of three steps on one device, in float32; `whole` compiles all of the step."""
    config = small_config(*COMMON, *overrides)
    data = PairData(folder, config)
    state = TrainState(config, data.specs)

    def step(batch: dict[str, tf.Tensor], clock: Clock, stop: tf.Tensor) -> StepResult:
        return train_step(state, config, batch, clock, stop)

    compiled, found = tf.function(step, jit_compile=whole, autograph=False), []
    for batch in data.training_batches(0, STEPS):
        result = compiled(batch, read_clock(config, state.step), tf.constant(False))
        state.record(result.losses, result.finite)
        found.append(state.latest.numpy())
    return np.array(found)


@cache
def graph_of_step(folder: Path, *overrides: str) -> tf.Graph:
    """The graph of one step."""
    config = small_config(*COMMON, *overrides)
    data = PairData(folder, config)
    state = TrainState(config, data.specs)
    batch = next(iter(data.training_batches(0, 1)))
    step = tf.function(lambda *given: train_step(state, config, *given), autograph=False)
    return step.get_concrete_function(batch, read_clock(config, state.step), tf.constant(False)).graph


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "sync_batch", "instance"])
def test_the_whole_step_compiles_and_agrees(norm: str, sample_folder: Path) -> None:
    """What a TPU needs: no host call, no dynamic shape, both updates and the dropout inside one compiled program."""
    plain = losses_of(sample_folder, f"model.norm={norm}")
    compiled = losses_of(sample_folder, f"model.norm={norm}", "train.ema_decay=0.9", whole=True)
    np.testing.assert_allclose(compiled, plain, rtol=6e-6)  # 6.0e-7 was measured


def test_the_compiled_step_has_nothing_that_a_tpu_lacks(sample_folder: Path) -> None:
    """float64, strings, host calls and stateful random numbers."""
    graph = graph_of_step(sample_folder)
    operations = [*graph.get_operations(), *(op for inner in graph._functions.values() for op in inner.graph.get_operations())]
    kinds = {operation.type for operation in operations}
    assert len(operations) > 1000
    assert kinds.isdisjoint(
        {"PyFunc", "EagerPyFunc", "NumpyFunction", "RandomUniform", "RandomStandardNormal", "Print", "PrintV2"}
    )
    dtypes = {tensor.dtype.base_dtype for operation in operations for tensor in operation.outputs}
    assert dtypes.isdisjoint({tf.float64, tf.string})


@pytest.mark.parametrize(("settings", "count"), [(("runtime.jit=true",), 4), ((), 0)])
def test_the_switch_compiles_forward_and_backward_passes(settings: tuple[str, ...], count: int, sample_folder: Path) -> None:
    """Drawing and its gradient, D's turn, the judging; and without the switch nothing."""
    operations = graph_of_step(sample_folder, *settings).get_operations()
    compiled = [op for op in operations if "PartitionedCall" in op.type and op.get_attr("_XlaMustCompile")]
    assert len(compiled) == count


@pytest.mark.slow
def test_compiled_passes_have_the_losses_of_plain_ones(sample_folder: Path) -> None:
    switched, plain = (
        losses_of(sample_folder, "runtime.jit=true", "model.norm=batch"),
        losses_of(sample_folder, "model.norm=batch"),
    )
    np.testing.assert_allclose(switched, plain, rtol=2.5e-6)  # 2.5e-7 was measured


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_and_losses_in_float32(small_data: PairData) -> None:
    config = small_config(*COMMON, "model.precision=mixed_bfloat16")
    state = TrainState(config, small_data.specs)
    for network in (state.generator, state.discriminator):
        convolutions = [layer for layer in network.layers if "Conv2D" in type(layer).__name__]
        assert {layer.compute_dtype for layer in convolutions} == {"bfloat16"}
        assert {variable.dtype for variable in network.variables} == {"float32"}
        assert network.output.dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "bound"), [("batch", 2e-2), ("instance", 2e-3), ("none", 2.8e-3)])
def test_mixed_precision_has_the_losses_of_full_precision_to_two_digits(norm: str, bound: float, sample_folder: Path) -> None:
    """Measured: 2.1e-3, 2.1e-4 and 2.8e-4; and some difference there must be."""
    exact = losses_of(sample_folder, f"model.norm={norm}")
    mixed = losses_of(sample_folder, f"model.norm={norm}", "model.precision=mixed_bfloat16")
    np.testing.assert_allclose(mixed, exact, rtol=bound)
    assert np.abs(mixed / exact - 1).max() > 1e-5


def test_networks_of_both_precisions_begin_with_the_same_weights(small_data: PairData, tmp_path: Path) -> None:
    states = [
        TrainState(small_config(*COMMON, f"model.precision={precision}"), small_data.specs)
        for precision in ("float32", "mixed_bfloat16")
    ]
    for mine, other in zip(states[0].generator.weights, states[1].generator.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), other.numpy())
    saved = states[1].checkpoint().write(str(tmp_path / "x"))
    states[0].checkpoint().read(saved).assert_consumed()
