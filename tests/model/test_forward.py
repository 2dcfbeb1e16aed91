"""Both networks against NumPy: random images, random weights, in training and at inference, with every norm."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import reference
from tests.helpers.reference import Mode, Weights
from tests.helpers.settings import small_config
from trainer.config import ModelConfig
from trainer.model.discriminators import patchgan
from trainer.model.generators import translate, unet

NORMS = ("batch", "sync_batch", "instance", "none")
KEYS = np.array([7, 4_000_000_000, 12345], np.uint32)

pytestmark = pytest.mark.usefixtures("float64")


def model(*overrides: str) -> ModelConfig:
    return small_config("model.generator.filters=2", "model.discriminator.filters=2", *overrides).model


def randomised(network: keras.Model) -> Weights:
    """Give a network random weights and moving statistics, far from those that it begins with; what they are."""
    random, weights = np.random.default_rng(11), {}
    for layer in network.layers:
        for variable in layer.weights:
            value = random.normal(0, 0.3, variable.shape)
            if variable.name in ("gamma", "moving_variance"):
                value = 0.2 + np.abs(1 + value)
            variable.assign(value)
            weights[f"{layer.name.removeprefix(f'{network.name}_')}/{variable.name}"] = value
    return weights


def pictures(channels: int, height: int, width: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (len(KEYS), height, width, channels))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("training", "inference"), [(True, "paper"), (False, "paper"), (False, "frozen")])
def test_the_generator_draws_what_numpy_draws(norm: str, training: bool, inference: str) -> None:
    """Five levels of 32x64: one decoder level has no dropout, and the two deepest are as wide as each other."""
    settings = model(f"model.norm={norm}", f"model.inference={inference}", "model.dropout=0.3")
    network = unet(settings, (32, 64), 1, 4, 0)
    weights, image = randomised(network), pictures(1, 32, 64)
    expected = reference.generator(image, KEYS, weights, Mode(norm, training, inference, dropout=0.3))
    assert expected.std() > 0.1
    np.testing.assert_allclose(network([image, KEYS], training=training), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_the_discriminator_judges_as_numpy_does(norm: str, training: bool) -> None:
    """Four convolutions over 36x44, whose sides become odd on the way."""
    network = patchgan(model(f"model.norm={norm}", "model.discriminator.receptive_field=70"), (36, 44), 1, 3, 0)
    weights, source, target = randomised(network), pictures(1, 36, 44), pictures(3, 36, 44, seed=6)
    expected = reference.discriminator(source, target, weights, Mode(norm, training))
    assert expected.shape == (len(KEYS), 2, 3, 1)
    np.testing.assert_allclose(network([source, target], training=training), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("field", [1, 16, 34])
def test_discriminators_of_other_fields_judge_as_numpy_does(field: int) -> None:
    network = patchgan(model(f"model.discriminator.receptive_field={field}"), (24, 16), 3, 3, 0)
    weights, source, target = randomised(network), pictures(3, 24, 16), pictures(3, 24, 16, seed=6)
    expected = reference.discriminator(source, target, weights, Mode("batch", training=True))
    np.testing.assert_allclose(network([source, target], training=True), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("norm", ["batch", "sync_batch"])
def test_a_pass_in_training_moves_the_statistics_a_tenth_of_the_way(norm: str) -> None:
    network = patchgan(model(f"model.norm={norm}", "model.discriminator.receptive_field=16"), (24, 16), 1, 3, 0)
    weights, source, target = randomised(network), pictures(1, 24, 16), pictures(3, 24, 16, seed=6)
    network([source, target], training=True)
    pair = np.concatenate([source, target], -1)
    first = reference.leaky(reference.convolution(pair, weights["conv1/kernel"], 2, 1) + weights["conv1/bias"])
    x = reference.convolution(first, weights["conv2/kernel"], 1, 1)
    layer = network.get_layer("discriminator_conv2_norm")
    for name, value in (("moving_mean", x.mean((0, 1, 2))), ("moving_variance", x.var((0, 1, 2)))):
        expected = 0.9 * weights[f"conv2_norm/{name}"] + 0.1 * value
        np.testing.assert_allclose(getattr(layer, name).numpy(), expected, rtol=1e-9)


def test_all_pictures_are_drawn_under_the_mask_of_the_seed() -> None:
    """The key at inference is the seed folded into one."""
    network = unet(model(), (32, 32), 3, 3, 0)
    weights, image = randomised(network), pictures(3, 32, 32)
    keys = np.repeat(reference.folded(np.array([1], np.uint32), 29), len(KEYS))
    expected = reference.generator(image, keys, weights, Mode("batch", training=False))
    np.testing.assert_allclose(translate(network, tf.constant(image), 29), expected, rtol=1e-9, atol=1e-11)
