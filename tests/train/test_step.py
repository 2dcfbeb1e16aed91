"""The whole step against a plain one written with two tapes and NumPy's Adam, in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.plain import PlainStep, cross_entropy, discriminator_loss, generator_losses
from tests.helpers.settings import small_config
from trainer.config import Config
from trainer.data.pipeline import Specs
from trainer.data.records import ImageSpec
from trainer.model.layers import example_keys
from trainer.train.optimizer import Clock, read_clock
from trainer.train.state import TrainState, trainable
from trainer.train.step import StepResult, all_finite, train_step, update

PHOTO = ImageSpec(kind="photo", channels=3, bit_depth=8)
SPECS = Specs(PHOTO, PHOTO)
RNG = np.random.default_rng(3)
BATCHES = [
    {
        "input": tf.constant(RNG.uniform(-1, 1, (2, 32, 48, 3))),
        "target": tf.constant(RNG.uniform(-1, 1, (2, 32, 48, 3))),
        "index": tf.constant([0, 1], tf.uint32),
    }
    for _ in range(3)
]

pytestmark = pytest.mark.usefixtures("float64")


def make(*overrides: str) -> tuple[Config, TrainState]:
    config = small_config("data.image_size=[32,48]", "train.batch_size=2", *overrides)
    return config, TrainState(config, SPECS)


def take_step(state: TrainState, config: Config, batch: dict[str, tf.Tensor]) -> StepResult:
    return train_step(state, config, batch, read_clock(config, state.step), tf.constant(False))


def examples(config: Config, state: TrainState, batch: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Inputs, targets and dropout keys of a batch."""
    return batch["input"], batch["target"], example_keys(config.seed, state.step, batch["index"])


@pytest.mark.parametrize(
    "norm", ["batch", "instance", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("sync_batch", "none"))]
)
def test_three_steps_give_the_plain_steps_losses_and_weights(norm: str) -> None:
    """The rate falls in the third step of three. Weights were measured to differ by 3e-15 at most."""
    config, ours = make(f"model.norm={norm}", "train.steps=3", "optimizer.schedule=linear_decay")
    _, theirs = make(f"model.norm={norm}")
    plain = PlainStep(theirs.generator, theirs.discriminator)
    for batch, rate in zip(BATCHES, (2e-4, 2e-4, 2e-4 / 1.5), strict=True):
        result = take_step(ours, config, batch)
        expected = plain.take(*examples(config, ours, batch), rate)
        np.testing.assert_allclose([float(value) for value in result.losses.values()], expected, rtol=1e-9)
        ours.record(result.losses, result.finite)
    for mine, other in zip(all_weights(ours), all_weights(theirs), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=3e-14)


def all_weights(state: TrainState) -> list[np.ndarray]:
    return [variable.numpy() for network in (state.generator, state.discriminator) for variable in trainable(network)]


def everything(state: TrainState) -> list[np.ndarray]:
    """All weights and all moments."""
    optimizers = (state.generator_optimizer, state.discriminator_optimizer)
    moments = [variable.numpy() for one in optimizers for variable in (*one.first_moments, *one.second_moments)]
    return all_weights(state) + moments


class Recorder:
    """Stands in the optimiser's place and keeps the gradients, so that no update hides their scale."""

    def __init__(self) -> None:
        self.gradients: list[np.ndarray] = []

    def apply(self, gradients: list[tf.Tensor], clock: Clock, allowed: tf.Tensor) -> None:
        self.gradients = [gradient.numpy() for gradient in gradients]


def enlarge(state: TrainState) -> None:
    """Weights that a small step moves far from no kink of the losses, and gradients that are not lost in rounding."""
    for variable in [*trainable(state.generator), *trainable(state.discriminator)]:
        variable.assign(6 * variable)


def recorded_gradients(*overrides: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    config, state = make("model.norm=none", *overrides)
    enlarge(state)
    recorders = Recorder(), Recorder()
    state.discriminator_optimizer, state.generator_optimizer = recorders  # type: ignore[assignment]
    take_step(state, config, BATCHES[0])
    return recorders[0].gradients, recorders[1].gradients


def numeric_gradient(loss: Callable[[], tf.Tensor], variable: tf.Variable, index: tuple[int, ...]) -> float:
    """Central difference of the loss in one weight."""
    value, step = variable.numpy(), 1e-5
    sides = []
    for sign in (1, -1):
        moved = value.copy()
        moved[index] += sign * step
        variable.assign(moved)
        sides.append(float(loss()))
    variable.assign(value)
    return (sides[0] - sides[1]) / (2 * step)


def test_gradients_are_the_slopes_of_the_papers_losses() -> None:
    """D halved, lambda 100: seen in gradients, which Adam would hide. They were measured to differ by 4e-9 at most."""
    _, state = make("model.norm=none")
    enlarge(state)
    g, d = state.generator, state.discriminator
    given = examples(Config(), state, BATCHES[0])

    def of_d() -> tf.Tensor:
        return discriminator_loss(d, g, *given)

    def of_g() -> tf.Tensor:
        gan, l1 = generator_losses(d, g, *given)
        return gan + 100 * l1

    by_d, by_g = recorded_gradients()
    for network, loss, gradients in ((d, of_d, by_d), (g, of_g, by_g)):
        for position in (0, len(gradients) // 2, len(gradients) - 1):
            index = np.unravel_index(np.argmax(np.abs(gradients[position])), gradients[position].shape)
            slope = numeric_gradient(loss, trainable(network)[position], index)
            np.testing.assert_allclose(gradients[position][index], slope, rtol=4e-8)


@pytest.mark.parametrize(("override", "network", "factor"), [("loss.discriminator_weight=1.0", 0, 2.0)])
def test_discriminator_weight_scales_its_gradient(override: str, network: int, factor: float) -> None:
    before, after = recorded_gradients()[network], recorded_gradients(override)[network]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, factor * old, rtol=1e-12)


def test_generator_is_judged_by_the_updated_discriminator() -> None:
    """With a large D step, the GAN term is that of the weights after it, not before."""
    config, state = make("model.norm=none", "optimizer.learning_rate=0.05")
    x, _, keys = examples(config, state, BATCHES[0])
    picture = state.generator([x, keys], training=True)
    before = float(cross_entropy(state.discriminator([x, picture]), 1.0))
    gan = float(take_step(state, config, BATCHES[0]).losses["generator_gan"])
    after = float(cross_entropy(state.discriminator([x, picture]), 1.0))
    assert abs(gan - after) < 1e-9
    assert abs(gan - before) > 0.1


def heavy_discriminator() -> tuple[Config, TrainState]:
    """Its loss and its gradients overflow; what it says of a picture does not."""
    return make("loss.discriminator_weight=1.7e308")


def overwhelmed_discriminator() -> tuple[Config, TrainState]:
    """It takes all for real beyond any doubt, so that its loss is infinite; its gradients are not, and G's loss is 0 of it."""
    config, state = make("model.norm=none")
    state.discriminator.get_layer("discriminator_logits").bias.assign([1e308])
    return config, state


@pytest.mark.parametrize("made", [heavy_discriminator, overwhelmed_discriminator], ids=lambda made: made.__name__)
def test_discriminator_alone_not_finite_changes_nothing_of_either_network(made: Callable[[], tuple[Config, TrainState]]) -> None:
    config, state = made()
    before = everything(state)
    result = take_step(state, config, BATCHES[0])
    losses = {name: float(value) for name, value in result.losses.items()}
    assert losses["discriminator"] == np.inf
    assert np.isfinite([losses["generator_gan"], losses["l1"]]).all()
    assert not bool(result.finite)
    for old, new in zip(before, everything(state), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_no_weight(value: float) -> None:
    config, state = make()
    spoilt = dict(BATCHES[0], target=tf.constant(np.full((2, 32, 48, 3), value)))
    before = everything(state)
    result = take_step(state, config, spoilt)
    state.record(result.losses, result.finite)
    assert not bool(result.finite)
    assert not bool(state.healthy)
    assert int(state.step) == 0
    for old, new in zip(before, everything(state), strict=True):
        np.testing.assert_array_equal(old, new)


def test_generator_alone_not_finite_keeps_the_generator() -> None:
    """lambda so large that only the generator's loss overflows."""
    config, state = make("loss.reconstruction_weight=1.0e308")
    before = [variable.numpy() for variable in trainable(state.generator)]
    result = take_step(state, config, dict(BATCHES[0], target=BATCHES[0]["target"] * 1000.0))
    assert np.isfinite(float(result.losses["discriminator"]))
    assert not bool(result.finite)
    for old, variable in zip(before, trainable(state.generator), strict=True):
        np.testing.assert_array_equal(old, variable)


def test_one_bad_element_is_seen() -> None:
    good = tf.ones((100, 100))
    assert bool(all_finite([good, good]))
    assert not bool(all_finite([good, tf.tensor_scatter_nd_update(good, [[50, 50]], [np.nan])]))


def test_losses_are_summed_over_steps_until_reset() -> None:
    _, state = make()
    for value in (1.0, 3.0):
        state.record(dict.fromkeys(("discriminator", "generator_gan", "l1"), tf.constant(value)), tf.constant(True))
    assert state.mean_losses() == {"discriminator": 2.0, "generator_gan": 2.0, "l1": 2.0}
    state.reset_losses()
    assert state.mean_losses() == {}
    assert state.latest_losses()["l1"] == 3.0
    assert int(state.step) == 2


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_microbatches_give_the_gradients_of_the_whole_batch(norm: str) -> None:
    whole = recorded_gradients(f"model.norm={norm}")
    parts = recorded_gradients(f"model.norm={norm}", "train.microbatches=2")
    for network_of_whole, network_of_parts in zip(whole, parts, strict=True):
        for expected, found in zip(network_of_whole, network_of_parts, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


def test_microbatches_move_the_generators_statistics_once() -> None:
    """Both halves of the batch equal: each half moves the statistics once, though the generator draws twice."""
    config, state = make("train.microbatches=2", "model.dropout=0.0")
    twice = {name: tf.repeat(value[:1], 2, axis=0) for name, value in BATCHES[0].items()}
    take_step(state, config, twice)
    _, plain = make("model.dropout=0.0")
    keys = example_keys(0, plain.step, twice["index"][:1])
    for _ in range(2):
        plain.generator([twice["input"][:1], keys], training=True)
    for mine, other in zip(state.generator.non_trainable_variables, plain.generator.non_trainable_variables, strict=True):
        np.testing.assert_allclose(mine.numpy(), other.numpy(), rtol=1e-9)


@pytest.mark.parametrize("network", [0, 1])
def test_clipping_keeps_the_direction_and_limits_the_norm(network: int) -> None:
    whole = recorded_gradients()[network]
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in whole))
    clipped = recorded_gradients(f"optimizer.clip_norm={norm / 4}")[network]
    for before, after in zip(whole, clipped, strict=True):
        np.testing.assert_allclose(after, before / 4, rtol=1e-9)
    untouched = recorded_gradients(f"optimizer.clip_norm={norm * 2}")[network]
    for before, after in zip(whole, untouched, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-12)


def test_the_average_follows_the_weights_by_its_formula() -> None:
    """Its decay is bound by what is allowed at the first step, and by the config from the second on."""
    config, state = make("train.ema_decay=0.2")
    assert state.averaged is not None
    expected = [weight.numpy() for weight in state.averaged.trainable_variables]
    for number, batch in enumerate(BATCHES, 1):
        result = take_step(state, config, batch)
        state.record(result.losses, result.finite)
        decay = [2 / 11, 0.2, 0.2][number - 1]
        weights = [variable.numpy() for variable in trainable(state.generator)]
        expected = [decay * mean + (1 - decay) * weight for mean, weight in zip(expected, weights, strict=True)]
    for mine, other in zip(state.averaged.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), other, rtol=1e-9)
    both = zip(state.averaged.non_trainable_variables, state.generator.non_trainable_variables, strict=True)
    assert all(np.array_equal(mine.numpy(), other.numpy()) for mine, other in both)
    assert state.drawer is state.averaged


def test_the_average_stays_where_a_step_is_not_finite() -> None:
    config, state = make("train.ema_decay=0.5")
    assert state.averaged is not None
    before = [weight.numpy() for weight in state.averaged.trainable_variables]
    take_step(state, config, dict(BATCHES[0], target=tf.constant(np.full((2, 32, 48, 3), np.nan))))
    for old, weight in zip(before, state.averaged.trainable_variables, strict=True):
        np.testing.assert_array_equal(old, weight.numpy())


def test_a_wish_to_stop_comes_back_from_the_step() -> None:
    config, state = make()
    clock = read_clock(config, state.step)
    assert not bool(train_step(state, config, BATCHES[0], clock, tf.constant(False)).stop)
    assert bool(train_step(state, config, BATCHES[0], clock, tf.constant(True)).stop)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_term_of_the_loss_that_is_not_finite_withholds_the_update(place: int, value: float) -> None:
    config, state = make()
    before = everything(state)
    gradients = [tf.ones(variable.shape, tf.float64) for variable in trainable(state.discriminator)]
    terms = [tf.constant(value if number == place else 1.0, tf.float64) for number in range(2)]
    clock = read_clock(config, state.step)
    assert not bool(update(state.discriminator_optimizer, gradients, terms, config, clock, tf.constant(True)))
    for old, new in zip(before, everything(state), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_gradient_whose_square_overflows_is_not_finite() -> None:
    """Clipping would make it NaN, and Adam's second moment would be infinite for ever."""
    config, state = make("optimizer.clip_norm=1.0")
    before = all_weights(state)
    huge = [tf.fill(variable.shape, tf.constant(1e200, tf.float64)) for variable in trainable(state.generator)]
    clock = read_clock(config, state.step)
    finite = update(state.generator_optimizer, huge, [tf.constant(0.0, tf.float64)], config, clock, tf.constant(True))
    assert not bool(finite)
    for old, new in zip(before, all_weights(state), strict=True):
        np.testing.assert_array_equal(old, new)
