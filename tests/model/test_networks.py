"""Both networks: parameter counts, sizes, constants read from the built model, receptive fields seen in the gradient."""

from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.settings import small_config
from trainer.config import Config, ModelConfig
from trainer.model.discriminators import patch_convolutions, patchgan, receptive_field
from trainer.model.generators import depth_for, level_filters, translate, unet
from trainer.model.layers import inference_keys

PAPER = Config().model


def trained(network: keras.Model) -> int:
    return sum(int(np.prod(variable.shape)) for variable in network.trainable_variables)


@pytest.fixture(scope="module")
def paper_unet() -> keras.Model:
    return unet(PAPER, (256, 256), 3, 3, 0)


@pytest.fixture(scope="module")
def paper_patchgan() -> keras.Model:
    return patchgan(PAPER, (256, 256), 3, 3, 0)


def test_unet_has_the_papers_parameters(paper_unet: keras.Model) -> None:
    """54.4 million, counted here from the paper's list of layers: kernels of 4x4, gamma and beta with each norm."""
    encoder = [3, 64, 128, 256, 512, 512, 512, 512, 512]
    kernels = sum(16 * a * b for a, b in pairwise(encoder))
    inputs, outputs = [512, 1024, 1024, 1024, 1024, 512, 256], [512, 512, 512, 512, 256, 128, 64]
    kernels += sum(16 * a * b for a, b in zip(inputs, outputs, strict=True)) + 16 * 128 * 3
    norms = 2 * (sum(encoder[2:-1]) + sum(outputs))
    biases = 64 + 512 + 3
    assert trained(paper_unet) == kernels + norms + biases == 54_414_531


def test_discriminator_has_the_papers_parameters(paper_patchgan: keras.Model) -> None:
    kernels = 16 * (6 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert trained(paper_patchgan) == kernels + 2 * (128 + 256 + 512) + 64 + 1 == 2_768_705


def test_logits_of_the_70_patchgan_are_30x30(paper_patchgan: keras.Model) -> None:
    assert paper_patchgan.output_shape == (None, 30, 30, 1)


@pytest.mark.parametrize(("field", "side"), [(1, 256), (16, 126), (34, 62), (70, 30), (142, 14), (286, 6)])
def test_receptive_field_and_logits(field: int, side: int) -> None:
    model = small_config(f"model.discriminator.receptive_field={field}", "data.image_size=[256,256]").model
    assert receptive_field(patch_convolutions(field, 64)) == field
    assert patchgan(model, (256, 256), 3, 3, 0).output_shape == (None, side, side, 1)


@pytest.mark.parametrize("field", [1, 16, 34, 70])
def test_receptive_field_is_the_support_of_the_gradient(field: int) -> None:
    """One logit in the middle of a net without norm depends on exactly field x field pixels."""
    model = small_config(f"model.discriminator.receptive_field={field}", "model.norm=none").model
    network = patchgan(model, (128, 128), 3, 3, 0)
    image = tf.Variable(tf.random.stateless_normal((1, 128, 128, 3), (1, 2)))
    with tf.GradientTape() as tape:
        logits = network([image, image])
        middle = logits.shape[1] // 2
        logit = logits[0, middle, middle, 0]
    support = np.argwhere(tf.reduce_sum(tf.abs(tape.gradient(logit, image)), axis=[0, 3]).numpy() > 0)
    assert (support.max(0) - support.min(0) + 1).tolist() == [field, field]


@pytest.mark.parametrize(
    ("size", "depth"), [((256, 256), 8), ((512, 256), 8), ((64, 64), 6), ((192, 320), 6), ((240, 176), 4), ((512, 512), 9)]
)
def test_depth_follows_the_image(size: tuple[int, int], depth: int) -> None:
    assert depth_for(*size) == depth


@pytest.mark.parametrize("size", [(64, 128), (48, 80), (32, 32)])
def test_output_has_the_inputs_size_and_the_targets_channels(size: tuple[int, int]) -> None:
    network = unet(small_config().model, size, 1, 4, 0)
    out = translate(network, tf.zeros((2, *size, 1)), 0)
    assert out.shape == (2, *size, 4)
    assert float(tf.reduce_max(tf.abs(out))) <= 1


def test_deeper_levels_are_at_most_eight_times_as_wide() -> None:
    assert level_filters(64, 8) == [64, 128, 256, 512, 512, 512, 512, 512]


def layers_of(kind: type, *networks: keras.Model) -> list[keras.layers.Layer]:
    return [layer for network in networks for layer in network.layers if isinstance(layer, kind)]


def test_constants_are_the_papers_in_the_built_models(paper_unet: keras.Model, paper_patchgan: keras.Model) -> None:
    leaky = layers_of(keras.layers.LeakyReLU, paper_unet, paper_patchgan)
    norms = layers_of(keras.layers.BatchNormalization, paper_unet, paper_patchgan)
    assert {round(float(layer(tf.constant([-1.0]))[0]), 6) for layer in leaky} == {-0.2}
    assert {(layer.epsilon, layer.momentum) for layer in norms} == {(1e-5, 0.9)}
    assert (len(leaky), len(norms)) == (7 + 4, 13 + 3)


def test_first_and_innermost_levels_and_the_logits_have_no_norm(paper_unet: keras.Model, paper_patchgan: keras.Model) -> None:
    names = {layer.name for network in (paper_unet, paper_patchgan) for layer in network.layers}
    for level in ("generator_down1", "generator_down8", "generator_output", "discriminator_conv1", "discriminator_logits"):
        assert level in names
        assert f"{level}_norm" not in names


def test_weights_are_drawn_as_the_paper_draws(paper_unet: keras.Model) -> None:
    kernel = paper_unet.get_layer("generator_down5").kernel.numpy()
    gammas = np.concatenate([layer.gamma.numpy() for layer in layers_of(keras.layers.BatchNormalization, paper_unet)])
    assert abs(kernel.mean()) < 1e-4
    assert abs(kernel.std() - 0.02) < 1e-4
    assert abs(gammas.mean() - 1) < 2e-3
    assert abs(gammas.std() - 0.02) < 1e-3
    assert not paper_unet.get_layer("generator_down1").bias.numpy().any()


def test_dropout_is_in_the_first_three_decoder_levels(paper_unet: keras.Model) -> None:
    dropouts = [layer.name for layer in paper_unet.layers if "dropout" in layer.name]
    assert dropouts == ["generator_up1_dropout", "generator_up2_dropout", "generator_up3_dropout"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("inference", ["paper", "frozen"])
def test_inference_does_not_depend_on_the_batch(norm: str, inference: str) -> None:
    model = small_config(f"model.norm={norm}", f"model.inference={inference}").model
    network = unet(model, (16, 16), 3, 3, 0)
    images = tf.random.stateless_normal((3, 16, 16, 3), (3, 4), dtype=tf.float64)
    together = translate(network, images, 0)
    alone = tf.concat([translate(network, images[i : i + 1], 0) for i in range(3)], 0)
    np.testing.assert_allclose(together, alone, atol=1e-12)


def test_bottleneck_passes_information_at_batch_size_1() -> None:
    """The erratum: a norm over the single pixel of the bottleneck would make it a constant."""
    network = unet(small_config("model.dropout=0.0").model, (64, 64), 3, 3, 0)
    inner = keras.Model(network.inputs, network.get_layer("generator_down6").output)
    outs = [
        inner([tf.random.stateless_normal((1, 64, 64, 3), (seed, 0)), inference_keys(0, 1)], training=True) for seed in (1, 2)
    ]
    assert outs[0].shape == (1, 1, 1, 32)
    assert float(tf.reduce_max(tf.abs(outs[0] - outs[1]))) > 1e-3


def test_skips_carry_values_before_their_activation() -> None:
    """As in the paper's code: the decoder's ReLU, not the encoder's LeakyReLU, acts on a skip."""
    network = unet(ModelConfig(), (32, 32), 3, 3, 0)
    skip = network.get_layer("generator_up4_skip")
    assert [tensor._keras_history.operation.name for tensor in skip.input] == ["generator_up4_norm", "generator_down1"]
