"""XLA: networks compiled on one device and two, and the whole step as a TPU would have to compile it."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.settings import small_config
from tests.helpers.topologies import Topologies
from tests.train.test_replicas import assert_equal_in_float64
from trainer.config import Config
from trainer.data.pipeline import PairData
from trainer.errors import UserError
from trainer.train.block import check_replicas
from trainer.train.optimizer import Clock, read_clock
from trainer.train.state import TrainState
from trainer.train.step import StepResult, train_step

COMMON = ("train.batch_size=2", "train.steps=50")


def losses_after(steps: int, data: PairData, *overrides: str, whole: bool = False) -> list[np.ndarray]:
    """The losses of some steps on one device, in float32; `whole` compiles all of the step."""
    config = small_config(*COMMON, *overrides)
    state = TrainState(config, data.specs)

    def step(batch: dict[str, tf.Tensor], clock: Clock, stop: tf.Tensor) -> StepResult:
        return train_step(state, config, batch, clock, stop)

    compiled, found = tf.function(step, jit_compile=whole, autograph=False), []
    for batch in data.training_batches(0, steps):
        result = compiled(batch, read_clock(config, state.step), tf.constant(False))
        state.record(result.losses, result.finite)
        found.append(state.latest.numpy())
    return found


@pytest.mark.parametrize(
    "norm", ["batch", pytest.param("sync_batch", marks=pytest.mark.slow), pytest.param("instance", marks=pytest.mark.slow)]
)
def test_the_whole_step_compiles_and_agrees(norm: str, small_data: PairData) -> None:
    """What a TPU needs: no host call, no dynamic shape, both updates and the dropout inside one compiled program."""
    plain = losses_after(3, small_data, f"model.norm={norm}")
    compiled = losses_after(3, small_data, f"model.norm={norm}", "train.ema_decay=0.9", whole=True)
    np.testing.assert_allclose(compiled, plain, rtol=1e-3)


def test_the_compiled_step_has_nothing_that_a_tpu_lacks(small_data: PairData) -> None:
    """float64, strings, host calls and stateful random numbers."""
    config = small_config(*COMMON)
    state = TrainState(config, small_data.specs)
    batch = next(iter(small_data.training_batches(0, 1)))
    step = tf.function(lambda *given: train_step(state, config, *given), autograph=False)
    graph = step.get_concrete_function(batch, read_clock(config, state.step), tf.constant(False)).graph
    operations = [*graph.get_operations(), *(op for inner in graph._functions.values() for op in inner.graph.get_operations())]
    kinds = {operation.type for operation in operations}
    assert len(operations) > 1000
    assert kinds.isdisjoint(
        {"PyFunc", "EagerPyFunc", "NumpyFunction", "RandomUniform", "RandomStandardNormal", "Print", "PrintV2"}
    )
    dtypes = {tensor.dtype.base_dtype for operation in operations for tensor in operation.outputs}
    assert dtypes.isdisjoint({tf.float64, tf.string})


def test_the_switch_compiles_forward_and_backward_passes(small_data: PairData) -> None:
    plain = losses_after(3, small_data)
    switched = losses_after(3, small_data, "runtime.jit=true")
    np.testing.assert_allclose(switched, plain, rtol=1e-3)
    config = small_config(*COMMON, "runtime.jit=true")
    state = TrainState(config, small_data.specs)
    batch = next(iter(small_data.training_batches(0, 1)))
    graph = tf.function(lambda *given: train_step(state, config, *given)).get_concrete_function(
        batch, read_clock(config, state.step), tf.constant(False)
    )
    jitted = [op for op in graph.graph.get_operations() if "PartitionedCall" in op.type and op.get_attr("_XlaMustCompile")]
    assert len(jitted) >= 4, "drawing and its gradient, D's turn, the judging"


@pytest.mark.slow
def test_replicas_with_compiled_networks_take_the_step_of_one_device(topologies: Topologies) -> None:
    case = "model.norm=instance;runtime.jit=true"
    (one,) = topologies.run(1, 1, "float64", case)
    assert_equal_in_float64(one, topologies.run(1, 2, "float64", case))
    assert_equal_in_float64(one, topologies.run(2, 1, "float64", case))


def test_compiling_is_refused_where_a_norm_reduces_over_replicas() -> None:
    config = Config.model_validate({"model": {"norm": "sync_batch"}, "runtime": {"jit": True}, "train": {"batch_size": 2}})
    check_replicas(config, 1)
    with pytest.raises(UserError, match=r"^runtime.jit: got true, allowed: false with model.norm=sync_batch on 2 replicas"):
        check_replicas(config, 2)


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_and_losses_in_float32(small_data: PairData) -> None:
    config = small_config(*COMMON, "model.precision=mixed_bfloat16")
    state = TrainState(config, small_data.specs)
    for network in (state.generator, state.discriminator):
        convolutions = [layer for layer in network.layers if "Conv2D" in type(layer).__name__]
        assert {layer.compute_dtype for layer in convolutions} == {"bfloat16"}
        assert {variable.dtype for variable in network.variables} == {"float32"}
        assert network.output.dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    "norm", ["batch", pytest.param("instance", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)]
)
def test_mixed_precision_has_the_losses_of_full_precision_to_two_digits(norm: str, small_data: PairData) -> None:
    exact = losses_after(3, small_data, f"model.norm={norm}")
    mixed = losses_after(3, small_data, f"model.norm={norm}", "model.precision=mixed_bfloat16")
    np.testing.assert_allclose(mixed, exact, rtol=0.05)


def test_networks_of_both_precisions_begin_with_the_same_weights(small_data: PairData, tmp_path: Path) -> None:
    states = [
        TrainState(small_config(*COMMON, f"model.precision={precision}"), small_data.specs)
        for precision in ("float32", "mixed_bfloat16")
    ]
    for mine, other in zip(states[0].generator.weights, states[1].generator.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), other.numpy())
    saved = states[1].checkpoint().write(str(tmp_path / "x"))
    states[0].checkpoint().read(saved).assert_consumed()
