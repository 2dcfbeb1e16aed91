"""The building blocks of both networks: convolutions as the paper initialises them, normalisations, keyed dropout."""

import hashlib
from typing import Any

import keras
import tensorflow as tf

from trainer.config import ModelConfig

# The constants of the paper's public code; Keras's defaults are others (0.3, 1e-3, 0.99).
LEAKY_SLOPE = 0.2
NORM_EPSILON = 1e-5
NORM_MOMENTUM = 0.9
INIT_STDDEV = 0.02
KERNEL_SIZE = 4

KEY_DTYPE = "uint32"


def seed_for(seed: int, name: str) -> int:
    """A seed for one variable: 31 bits that depend on the run's seed and on the variable's name, and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def normal(seed: int, name: str, mean: float = 0.0) -> keras.initializers.Initializer:
    """N(mean, 0.02), the paper's initialisation (section 6.2), drawn from (seed, name)."""
    return keras.initializers.RandomNormal(mean, INIT_STDDEV, seed=seed_for(seed, name))


def mix32(bits: tf.Tensor) -> tf.Tensor:
    """A bijection of uint32 that looks random: xor-shift-multiply, two rounds ("lowbias32", C. Wellons 2018)."""
    bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(16, tf.uint32)))
    bits *= tf.constant(0x7FEB352D, tf.uint32)
    bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(15, tf.uint32)))
    bits *= tf.constant(0x846CA68B, tf.uint32)
    return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(16, tf.uint32)))


def fold(key: tf.Tensor, word: tf.Tensor | int) -> tf.Tensor:
    """Fold one more integer into keys of dtype uint32; the order of folding matters."""
    return mix32(key + tf.constant(0x9E3779B9, tf.uint32) + mix32(tf.cast(word, tf.uint32)))


def example_keys(seed: int, step: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """One dropout key for each example, from (seed, step, place in the global batch): uint32, the shape of `index`.

    The place is counted over the whole global batch, so the mask is the same on one device and on many.
    """
    run = fold(tf.constant(0, tf.uint32), seed)
    return fold(fold(run, tf.cast(step, tf.uint32)), index)


def inference_keys(seed: int, examples: tf.Tensor) -> tf.Tensor:
    """Dropout keys at inference: the same for every image, uint32 (examples,), so that no batch changes a result."""
    return tf.fill([examples], fold(tf.constant(1, tf.uint32), seed))


class KeyedDropout(keras.layers.Layer):
    """Dropout whose mask is a function of (key, layer, element) alone.

    The bits come from an integer hash, not from a random generator: the same mask with and without XLA, on every device.
    Call it with (x, keys): x (batch, height, width, channels), keys uint32 (batch,). A kept element is scaled by
    1 / (1 - rate).
    """

    def __init__(self, rate: float, number: int, *, at_inference: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.number = number
        self.at_inference = at_inference

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> keras.KerasTensor:
        return keras.KerasTensor(inputs[0].shape, inputs[0].dtype)

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool | None = None) -> tf.Tensor:
        x, keys = inputs
        if not (training or self.at_inference) or self.rate == 0:
            return x
        bits = self._bits(keys, tf.shape(x))
        keep = bits >= tf.constant(round(self.rate * 2**32), tf.uint32)
        return tf.where(keep, x * tf.cast(1.0 / (1.0 - self.rate), x.dtype), tf.zeros([], x.dtype))

    def _bits(self, keys: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
        """Uniform uint32 bits for every element of every example."""
        elements = tf.cast(tf.range(tf.reduce_prod(shape[1:])), tf.uint32)
        spread = mix32(elements + tf.constant(0x9E3779B9, tf.uint32))
        layer_keys = fold(keys, self.number)
        return tf.reshape(mix32(tf.bitwise.bitwise_xor(layer_keys[:, None], spread[None, :])), shape)

    def get_config(self) -> dict[str, Any]:
        own = {"rate": self.rate, "number": self.number, "at_inference": self.at_inference}
        return {**super().get_config(), **own}


def standardise_each(image: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tf.Tensor:
    """Normalise every image by its own mean and variance over height and width, channel by channel, then scale, shift.

    bfloat16 has too few digits for the statistics, which are taken in the dtype of gamma.
    """
    x = tf.cast(image, gamma.dtype)
    mean, variance = tf.nn.moments(x, axes=[1, 2], keepdims=True)
    return tf.cast((x - mean) * (tf.math.rsqrt(variance + epsilon) * gamma) + beta, image.dtype)


def moments_over_replicas(x: tf.Tensor, near: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of each channel over the images (batch, height, width, channels) of all replicas, differentiable.

    Both come from one sum over replicas, of x - near and its square: the closer `near` (channels,) is to the mean, the fewer
    digits cancel. Equal parts of the batch on every replica are taken for granted.
    """
    context = tf.distribute.get_replica_context()
    shifted = x - tf.stop_gradient(near)
    sums = [tf.reduce_sum(shifted, [0, 1, 2]), tf.reduce_sum(tf.square(shifted), [0, 1, 2])]
    several = context.num_replicas_in_sync > 1  # XLA cannot compile a sum over replicas, not even over one
    total, squares = context.all_reduce(tf.distribute.ReduceOp.SUM, sums) if several else sums
    count = tf.cast(tf.reduce_prod(tf.shape(x)[:3]) * context.num_replicas_in_sync, x.dtype)
    mean = total / count
    return mean + tf.stop_gradient(near), tf.maximum(squares / count - tf.square(mean), 0.0)


class BatchNorm(keras.layers.BatchNormalization):
    """Batch normalisation; at inference by each image's own statistics (the paper) or by the moving ones (frozen).

    The paper tests with the statistics of the test batch at batch size 1 (section 3.4), which are the image's own. Taking
    them for each image alone keeps a result independent of the batch that the image came in.

    In training each replica normalises its part of the batch; with `over_replicas` all normalise by the whole batch.
    """

    def __init__(self, *, inference: str, over_replicas: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inference = inference
        self.over_replicas = over_replicas

    def _moments(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        if self.over_replicas:
            return moments_over_replicas(inputs, tf.cast(self.moving_mean, inputs.dtype))
        moments: tuple[tf.Tensor, tf.Tensor] = super()._moments(inputs, mask)
        return moments

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if training or self.inference == "frozen":
            return super().call(inputs, training=training)
        return standardise_each(inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta), self.epsilon)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inference": self.inference, "over_replicas": self.over_replicas}


class InstanceNorm(keras.layers.Layer):
    """Normalisation of each image by its own statistics, in training and at inference alike."""

    def __init__(self, *, epsilon: float, gamma_initializer: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.gamma_initializer = keras.initializers.get(gamma_initializer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        shape = (input_shape[-1],)
        self.gamma = self.add_weight(shape=shape, initializer=self.gamma_initializer, name="gamma", autocast=False)
        self.beta = self.add_weight(shape=shape, initializer="zeros", name="beta", autocast=False)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return standardise_each(inputs, tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta), self.epsilon)

    def get_config(self) -> dict[str, Any]:
        gamma = keras.initializers.serialize(self.gamma_initializer)
        return {**super().get_config(), "epsilon": self.epsilon, "gamma_initializer": gamma}


class Blocks:
    """Makes the layers of one network: their names, seeds and precision and the kind of norm are said once, here."""

    def __init__(self, network: str, settings: ModelConfig, seed: int) -> None:
        self.network = network
        self.norm = settings.norm
        self._seed = seed
        self._inference = settings.inference
        self._dtype = None if settings.precision == "float32" else settings.precision

    def _named(self, name: str) -> dict[str, Any]:
        """What every layer is told."""
        return {"name": f"{self.network}_{name}", "dtype": self._dtype}

    def _convolution_settings(self, name: str, normed: bool) -> dict[str, Any]:
        """A bias before a norm would be subtracted again by its mean, so there is one only where no norm follows."""
        named = self._named(name)
        return {
            "kernel_size": KERNEL_SIZE,
            "kernel_initializer": normal(self._seed, f"{named['name']}/kernel"),
            "use_bias": not self.normalises(normed),
            **named,
        }

    def normalises(self, normed: bool) -> bool:
        """Whether a layer that may be normalised is, under this kind of norm."""
        return normed and self.norm != "none"

    def convolution(self, x: Any, filters: int, name: str, *, stride: int, normed: bool, kernel: int = KERNEL_SIZE) -> Any:
        """A convolution padded by 1 on each side (kernel 4), or not at all (kernel 1), as the paper's code pads."""
        settings = self._convolution_settings(name, normed) | {"kernel_size": kernel, "strides": stride}
        padding = "valid"
        if stride == 2 and all(side is None or side % 2 == 0 for side in x.shape[1:3]):
            padding = "same"  # here it means 1 on each side, and spares a pass over the image
        elif kernel > 1:
            x = keras.layers.ZeroPadding2D(1, **self._named(f"{name}_pad"))(x)
        return keras.layers.Conv2D(filters, padding=padding, **settings)(x)

    def upconvolution(self, x: Any, filters: int, name: str, *, normed: bool) -> Any:
        """A transposed convolution that doubles height and width."""
        settings = self._convolution_settings(name, normed)
        return keras.layers.Conv2DTranspose(filters, strides=2, padding="same", **settings)(x)

    def normalised(self, x: Any, name: str, *, normed: bool = True) -> Any:
        """The norm that the config names, or x itself."""
        if not self.normalises(normed):
            return x
        named = self._named(f"{name}_norm")
        settings = {"epsilon": NORM_EPSILON, "gamma_initializer": normal(self._seed, f"{named['name']}/gamma", mean=1.0), **named}
        if self.norm == "instance":
            return InstanceNorm(**settings)(x)
        together = self.norm == "sync_batch"
        return BatchNorm(inference=self._inference, over_replicas=together, momentum=NORM_MOMENTUM, **settings)(x)

    def leaky_relu(self, x: Any, name: str) -> Any:
        """LeakyReLU with the paper's slope."""
        return keras.layers.LeakyReLU(negative_slope=LEAKY_SLOPE, **self._named(f"{name}_leaky"))(x)

    def relu(self, x: Any, name: str) -> Any:
        """ReLU, as in the decoder."""
        return keras.layers.ReLU(**self._named(f"{name}_relu"))(x)

    def dropout(self, x: Any, keys: Any, rate: float, number: int, name: str) -> Any:
        """Keyed dropout; on at inference too unless the model is frozen (paper, section 3.4)."""
        at_inference = self._inference == "paper"
        return KeyedDropout(rate, number, at_inference=at_inference, **self._named(f"{name}_dropout"))((x, keys))

    def joined(self, tensors: list[Any], name: str) -> Any:
        """Channels beside channels."""
        return keras.layers.Concatenate(**self._named(name))(tensors)

    def in_full_precision(self, x: Any, activation: str, name: str) -> Any:
        """The end of a network, in the precision that losses need."""
        return keras.layers.Activation(activation, dtype=keras.config.floatx(), name=self._named(name)["name"])(x)
