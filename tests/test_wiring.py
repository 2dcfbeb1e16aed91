"""The wiring table: for every setting of the config two values, and what must come of each, worked out here by another route.

Each row builds what the setting reaches and returns two things: what was seen, and what NumPy, the files or arithmetic say. Both
must agree for each value, and differ between the values. A setting without a row fails, and so does a row for the only value that
a setting has, once it has a second one.
"""

import hashlib
import json
import threading
import typing
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.bucket.runs import copy_up
from tests.helpers.events import scalars
from tests.helpers.images import label, photo, write_pairs
from tests.helpers.processes import finish, start_program
from tests.helpers.settings import SMALL, flags
from trainer.arguments import parse
from trainer.cluster import Cluster
from trainer.commands import resolve
from trainer.config import Config, field_info, leaves, load_config
from trainer.data import records
from trainer.data.pipeline import PairData, Specs
from trainer.data.prepare import Options, prepare
from trainer.data.records import ImageSpec
from trainer.data.sample import SAMPLE_FOLDER, pair_example
from trainer.errors import PeerLostError
from trainer.model.layers import BatchNorm, inference_keys
from trainer.runtime import strategy as devices
from trainer.storage.bucket import parse as bucket_place
from trainer.storage.service import Patience
from trainer.train import state as state_module
from trainer.train.begin import Order, Preparation
from trainer.train.optimizer import read_clock
from trainer.train.state import TrainState, build_networks
from trainer.train.step import train_step

PHOTO = ImageSpec(kind="photo", channels=3, bit_depth=8)
SPECS = Specs(PHOTO, PHOTO)


class Place(NamedTuple):
    """Where a row may work: a folder of its own, the packaged sample as shards, pytest's tools, and the two whole runs."""

    folder: Path
    sample: Path
    patch: pytest.MonkeyPatch
    request: pytest.FixtureRequest

    def run_with(self, key: str, value: object) -> "LittleRun":
        """The run that had this value."""
        (found,) = [run for run in self.request.getfixturevalue("runs") if run.settings[key] == value]
        return typing.cast("LittleRun", found)


Look = Callable[[Config, Place], tuple[Any, Any]]


class Row(NamedTuple):
    """A row: values of a setting, the settings beside it, and how to see what came of it."""

    values: tuple[Any, ...]
    beside: tuple[str, ...]
    look: Look


ROWS: dict[str, Row] = {}


def row(key: str, *values: object, beside: tuple[str, ...] = ()) -> Callable[[Look], Look]:
    def add(look: Look) -> Look:
        assert key not in ROWS
        ROWS[key] = Row(values, beside, look)
        return look

    return add


@pytest.fixture
def place(
    tmp_path: Path, sample_folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Place]:
    yield Place(tmp_path, sample_folder, monkeypatch, request)


def assert_same(seen: Any, expected: Any) -> None:
    """Numbers of a computation agree to rounding, all else exactly."""
    if isinstance(expected, np.ndarray):
        np.testing.assert_allclose(seen, expected, rtol=1e-7, atol=1e-12)
    else:
        assert seen == expected


@pytest.mark.parametrize("key", [key for key, _ in leaves(Config())])
def test_each_value_of_a_setting_does_what_it_says(key: str, place: Place) -> None:
    assert key in ROWS, "a new setting needs a row here"
    expectations = []
    for value in ROWS[key].values:
        config = load_config(None, [*SMALL, *ROWS[key].beside, f"{key}={json.dumps(value)}"])
        seen, expected = ROWS[key].look(config, place)
        assert_same(seen, expected)
        expectations.append(expected)
    for number, expected in enumerate(expectations):
        for other in expectations[:number]:
            with pytest.raises(AssertionError):
                assert_same(other, expected)


def test_no_row_is_left_of_a_setting_that_is_gone() -> None:
    assert set(ROWS) == {key for key, _ in leaves(Config())}


# Settings that have one value so far.


def only_value(key: str, value: str) -> None:
    @row(key, value)
    def look(config: Config, place: Place) -> tuple[Any, Any]:
        return typing.get_args(field_info(key).annotation), (value,)


only_value("model.generator.kind", "unet")
only_value("model.discriminator.kind", "patch")
only_value("loss.gan", "non_saturating")
only_value("loss.reconstruction", "l1")


# The step: two networks of one 1x1 convolution each, whose losses, gradients and updates are worked out in NumPy.


class PixelGenerator(keras.Model):
    """Each pixel of the output is a linear function of the same pixel; notes what it is called with."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.kernel = self.add_weight(shape=weight.shape, initializer=keras.initializers.Constant(weight), name="kernel")
        self.parts: list[int] = []
        self.keys: list[int] = []

    def call(self, inputs: list[tf.Tensor], training: bool = False) -> tf.Tensor:
        image, keys = inputs
        if tf.executing_eagerly():
            self.parts.append(int(image.shape[0]))
            self.keys += keys.numpy().tolist()
        return tf.einsum("bhwc,cd->bhwd", image, tf.convert_to_tensor(self.kernel))


class PixelDiscriminator(keras.Model):
    """Each logit is a linear function of one pixel of both images."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.kernel = self.add_weight(shape=weight.shape, initializer=keras.initializers.Constant(weight), name="kernel")

    def call(self, inputs: list[tf.Tensor], training: bool = False) -> tf.Tensor:
        return tf.einsum("bhwc,cd->bhwd", tf.concat(inputs, -1), tf.convert_to_tensor(self.kernel))


RNG = np.random.default_rng(11)
G_WEIGHT, D_WEIGHT = RNG.normal(0, 0.3, (3, 3)), RNG.normal(0, 0.3, (6, 1))
SOURCE, TARGET = RNG.uniform(-1, 1, (2, 4, 4, 4, 3))
STEPS_TAKEN = (0, 2)  # of three: the second is where a decaying rate has decayed


def with_pixel_networks(config: Config) -> TrainState:
    """A run's state, but for the networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_module, "build_networks", lambda *_: (PixelGenerator(G_WEIGHT), PixelDiscriminator(D_WEIGHT)))
        patch.setattr(state_module, "build_generator", lambda *_: PixelGenerator(G_WEIGHT))
        return TrainState(config, SPECS)


def take_steps(config: Config, place: Place) -> tuple[TrainState, list[list[float]]]:
    """The trainer's own steps on the first pairs, and the losses of each."""
    place.request.getfixturevalue("float64")
    state, size = with_pixel_networks(config), config.train.batch_size
    batch = {"input": tf.constant(SOURCE[:size]), "target": tf.constant(TARGET[:size]), "index": tf.range(size)}
    losses = []
    for step in STEPS_TAKEN:
        clock = read_clock(config, tf.constant(step, tf.int64))
        losses.append([float(loss) for loss in train_step(state, config, batch, clock, tf.constant(False)).losses.values()])
    return state, losses


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class InNumpy:
    """The same two steps, in NumPy: D first, then G, which is judged by the updated D; Adam; the average."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, size = settings, settings["train.batch_size"]
        self.x, self.y = SOURCE[:size].reshape(-1, 3), TARGET[:size].reshape(-1, 3)
        self.g, self.d = G_WEIGHT.copy(), D_WEIGHT.copy()
        self.average = G_WEIGHT.copy()
        self.moments = {name: (np.zeros_like(weight), np.zeros_like(weight)) for name, weight in (("g", self.g), ("d", self.d))}
        self.losses = [self.step(step) for step in STEPS_TAKEN]

    def step(self, step: int) -> list[float]:
        count, weight = len(self.x), self.settings["loss.discriminator_weight"]
        image = self.x @ self.g
        real, fake = np.hstack([self.x, self.y]), np.hstack([self.x, image])
        d_loss = weight * (np.logaddexp(0, -real @ self.d).mean() + np.logaddexp(0, fake @ self.d).mean())
        by_d = weight * (real.T @ (sigmoid(real @ self.d) - 1) + fake.T @ sigmoid(fake @ self.d)) / count
        self.d -= self.adam("d", by_d, step)
        logits, lambda_ = fake @ self.d, self.settings["loss.reconstruction_weight"]
        by_image = (sigmoid(logits) - 1) @ self.d[3:].T / count + lambda_ * np.sign(image - self.y) / image.size
        self.g -= self.adam("g", self.x.T @ by_image, step)
        decay = min(self.settings["train.ema_decay"], (2 + step) / (11 + step))
        self.average = decay * self.average + (1 - decay) * self.g
        return [d_loss, np.logaddexp(0, -logits).mean(), np.abs(image - self.y).mean() * 127.5]

    def rate(self, step: int) -> float:
        rate, steps = self.settings["optimizer.learning_rate"], self.settings["train.steps"]
        decays = self.settings["optimizer.schedule"] == "linear_decay"
        return float(rate * min(1.0, (steps - step) / (steps / 2)) if decays else rate)

    def adam(self, network: str, gradient: np.ndarray, step: int) -> np.ndarray:
        beta_1, beta_2 = self.settings["optimizer.beta_1"], self.settings["optimizer.beta_2"]
        limit, norm = self.settings["optimizer.clip_norm"], np.linalg.norm(gradient)
        gradient = gradient * limit / norm if limit and norm > limit else gradient
        first, second = self.moments[network]
        first, second = beta_1 * first + (1 - beta_1) * gradient, beta_2 * second + (1 - beta_2) * gradient**2
        self.moments[network] = first, second
        corrected = np.sqrt(1 - beta_2 ** (step + 1)) / (1 - beta_1 ** (step + 1))
        return np.asarray(self.rate(step) * corrected * first / (np.sqrt(second) + 1e-8))


def look_at_steps(config: Config, place: Place) -> tuple[Any, Any]:
    """Losses and weights after two steps, and the averaged weights that a run draws with."""
    state, losses = take_steps(config, place)
    weights = [state.generator.kernel, state.discriminator.kernel, state.drawer.kernel]
    seen = np.concatenate([np.ravel(losses), *(np.ravel(weight.numpy()) for weight in weights)])
    wanted = InNumpy(dict(leaves(config)))
    drawn = wanted.average if config.train.ema_decay else wanted.g
    return seen, np.concatenate([np.ravel(part) for part in (wanted.losses, wanted.g, wanted.d, drawn)])


IN_STEPS = ("train.steps=3", "train.batch_size=2", "optimizer.learning_rate=0.01")
for name, values in {
    "optimizer.learning_rate": (1e-3, 3e-2),
    "optimizer.beta_1": (0.5, 0.9),
    "optimizer.beta_2": (0.999, 0.9),
    "optimizer.schedule": ("constant", "linear_decay"),
    "loss.reconstruction_weight": (100.0, 7.0),
    "loss.discriminator_weight": (0.5, 1.5),
    "train.batch_size": (1, 3),
    "train.ema_decay": (0.0, 0.2, 0.999),
}.items():
    row(name, *values, beside=tuple(setting for setting in IN_STEPS if not setting.startswith(name)))(look_at_steps)
# A large beta_1 and a rate that are the same for all gradients hide a clipped one at the first step, but not at the second.
row("optimizer.clip_norm", 0.0, 0.05, 0.02, beside=(*IN_STEPS, "optimizer.beta_2=0.5"))(look_at_steps)


@row("train.microbatches", 1, 2, 4, beside=("train.batch_size=4", "train.steps=3"))
def microbatches(config: Config, place: Place) -> tuple[Any, Any]:
    """How many pairs the generator holds at a time; it draws a second time where its first drawing would fill the memory."""
    state, losses = take_steps(config, place)
    assert_same(np.array(losses), np.array(InNumpy(dict(leaves(config))).losses))
    parts = config.train.microbatches
    return state.generator.parts, [4 // parts] * (parts if parts == 1 else 2 * parts) * len(STEPS_TAKEN)


# Both networks.


def mixed(bits: int) -> int:
    """The integer hash of the dropout masks ("lowbias32"), on a Python integer."""
    bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
    bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
    return bits ^ bits >> 16


def folded(*words: int) -> int:
    key = 0
    for word in words:
        key = mixed((key + 0x9E3779B9 + mixed(word)) % 2**32)
    return key


def drawn_weights(seed: int, layer: str, shape: tuple[int, ...]) -> np.ndarray:
    """A kernel as the paper draws it, from the hash of the run's seed and the layer's name."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{layer}/kernel".encode()).digest()[:4], "little") // 2
    return np.asarray(keras.initializers.RandomNormal(0.0, 0.02, seed=number)(shape))


def mixed64(bits: int) -> int:
    """The hash of order and augmentation (the finaliser of SplitMix64), on a Python integer."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


def folded64(*words: int) -> int:
    state = 0
    for word in words:
        state = mixed64((state + 0x9E3779B97F4A7C15 + mixed64(word)) % 2**64)
    return state


def first_epoch(seed: int, examples: int, batch_size: int) -> list[list[int]]:
    """The records of each batch: a perfect shuffle, cut into one stream for each place, each shuffled again."""
    shuffled = sorted(range(examples), key=lambda record: folded64(seed, 1, 0, record))
    steps = examples // batch_size
    streams = [shuffled[place * steps : (place + 1) * steps] for place in range(batch_size)]
    streams = [sorted(stream, key=lambda record: folded64(seed, 3, 0, record)) for stream in streams]
    return [[stream[step] for stream in streams] for step in range(steps)]


def augmented(config: Config, record: int) -> tuple[int, int, bool]:
    """Top and left of a record's crop in the first epoch, and whether it is mirrored."""
    bits, places = folded64(config.seed, 4, 0, record), config.data.jitter + 1
    return bits % 2**31 % places, (bits >> 32) % places, config.data.mirror and mixed64(bits) % 2 == 1


@row("seed", 3, 4, beside=("train.steps=3", "train.batch_size=2"))
def seed(config: Config, place: Place) -> tuple[Any, Any]:
    """The first weights of both networks, the dropout keys of two steps, the batches, and their augmentation."""
    layers = {"generator_down1": (4, 4, 3, 4), "discriminator_conv1": (4, 4, 6, 4)}
    for network, (name, shape) in zip(build_networks(config, SPECS), layers.items(), strict=True):
        np.testing.assert_allclose(network.get_layer(name).kernel.numpy(), drawn_weights(config.seed, name, shape), rtol=1e-6)
    data = PairData(place.sample, config)
    seen = [
        [data.batch_records(step).tolist() for step in range(20)],
        data._augmentation(0, np.arange(9)).tolist(),
        take_steps(config, place)[0].generator.keys,
    ]
    keys = [folded(config.seed, step, index) for step in STEPS_TAKEN for index in (0, 1)]
    return seen, [first_epoch(config.seed, 40, 2), [list(augmented(config, record)) for record in range(9)], keys]


def inside(model: keras.Model, config: Config, *names: str, training: bool) -> list[np.ndarray]:
    """What some of the generator's layers give for two images."""
    size = config.data.image_size
    images = tf.constant(np.random.default_rng(5).uniform(-1, 1, (2, *size, 3)), keras.config.floatx())
    part = keras.Model(model.inputs, [model.get_layer(f"generator_{name}").output for name in names])
    return [np.asarray(keras.ops.convert_to_numpy(value)) for value in part([images, inference_keys(0, 2)], training=training)]


def kernels(network: keras.Model) -> list[tuple[int, ...]]:
    return [tuple(layer.kernel.shape) for layer in network.layers if hasattr(layer, "kernel")]


@row("model.generator.filters", 4, 6)
def generator_filters(config: Config, place: Place) -> tuple[Any, Any]:
    """Shapes of all kernels, six levels at 64x64: down (4, 4, in, out), up (4, 4, out, in) with the skip beside."""
    first = config.model.generator.filters
    levels = [first * times for times in (1, 2, 4, 8, 8, 8)]
    down = [(4, 4, before, level) for before, level in zip([3, *levels], levels, strict=False)]
    sides = list(reversed(levels[:-1]))
    up = [(4, 4, out, levels[-1] if number == 0 else 2 * sides[number - 1]) for number, out in enumerate(sides)]
    return kernels(build_networks(config, SPECS)[0]), [*down, *up, (4, 4, 3, 2 * first)]


@row("model.discriminator.filters", 4, 6)
def discriminator_filters(config: Config, place: Place) -> tuple[Any, Any]:
    first = config.model.discriminator.filters
    return kernels(build_networks(config, SPECS)[1]), [(4, 4, 6, first), (4, 4, first, 2 * first), (4, 4, 2 * first, 1)]


@row("model.discriminator.receptive_field", 1, 16, 34, 70, beside=("data.image_size=[128,128]", "model.norm=none"))
def receptive_field(config: Config, place: Place) -> tuple[Any, Any]:
    """The pixels that the logit in the middle depends on."""
    discriminator = build_networks(config, SPECS)[1]
    image = tf.random.stateless_uniform((1, 128, 128, 3), (1, 2))
    with tf.GradientTape() as tape:
        tape.watch(image)
        logits = discriminator([image, image])
        logit = logits[0, logits.shape[1] // 2, logits.shape[2] // 2, 0]
    seen = np.abs(tape.gradient(logit, image).numpy()[0]).sum(-1) > 0
    side = config.model.discriminator.receptive_field
    return [int(seen.any(axis).sum()) for axis in (0, 1)], [side, side]


def standardised(x: np.ndarray, axes: tuple[int, ...] | None, norm: keras.layers.Layer) -> np.ndarray:
    """By the mean and variance over these axes; None: by the moving ones."""
    if axes is None:
        mean, variance = norm.moving_mean.numpy(), norm.moving_variance.numpy()
    else:
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return np.asarray((x - mean) / np.sqrt(variance + 1e-5) * norm.gamma.numpy() + norm.beta.numpy())


@row("model.norm", "batch", "sync_batch", "instance", "none")
def norm(config: Config, place: Place) -> tuple[Any, Any]:
    """The first normalised layer in training: over the batch, over each image, or not at all; and whether over all replicas."""
    place.request.getfixturevalue("float64")
    generator = build_networks(config, SPECS)[0]
    kind = config.model.norm
    names = ("down2", "down3_leaky") if kind == "none" else ("down2", "down2_norm")
    before, after = inside(generator, config, *names, training=True)
    if kind == "none":
        return np.append(after, 0.0), np.append(np.where(before > 0, before, 0.2 * before), 0.0)
    layer = generator.get_layer("generator_down2_norm")
    expected = standardised(before, (1, 2) if kind == "instance" else (0, 1, 2), layer)
    together = float(isinstance(layer, BatchNorm) and layer.over_replicas)
    return np.append(after, together), np.append(expected, float(kind == "sync_batch"))


@row("model.dropout", 0.25, 0.6, 0.0)
def dropout(config: Config, place: Place) -> tuple[Any, Any]:
    """In three levels: the share that is dropped, and by how much the others grow."""
    place.request.getfixturevalue("float64")
    rate, generator, found = config.model.dropout, build_networks(config, SPECS)[0], []
    for level in (1, 2, 3):
        before, after = inside(generator, config, f"up{level}_norm", f"up{level}_dropout", training=True)
        kept = after != 0
        factors = np.unique((after[kept] / before[kept]).round(6)).tolist()
        share = 1 - kept.mean()
        found.append((factors, bool(abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / kept.size) + 1e-9)))
    return found, [([round(1 / (1 - rate), 6)], True)] * 3


@row("model.inference", "paper", "frozen", beside=("model.dropout=0.5",))
def inference(config: Config, place: Place) -> tuple[Any, Any]:
    """Outside training: whose statistics, and whether dropout goes on."""
    place.request.getfixturevalue("float64")
    generator, frozen = build_networks(config, SPECS)[0], config.model.inference == "frozen"
    layer = generator.get_layer("generator_down2_norm")
    layer.moving_mean.assign(np.linspace(-1, 1, layer.moving_mean.shape[0]))
    layer.moving_variance.assign(np.linspace(1, 2, layer.moving_mean.shape[0]))
    before, after, dropped = inside(generator, config, "down2", "down2_norm", "up3_dropout", training=False)
    expected = standardised(before, None if frozen else (1, 2), layer)
    return np.append(after, (dropped == 0).any()), np.append(expected, not frozen)


@row("model.precision", "float32", "mixed_bfloat16")
def precision(config: Config, place: Place) -> tuple[Any, Any]:
    """Of every convolution what it computes in, of every variable, and of what the networks give."""
    networks = build_networks(config, SPECS)
    seen = {
        "convolutions": {layer.compute_dtype for network in networks for layer in network.layers if hasattr(layer, "kernel")},
        "variables": {variable.dtype for network in networks for variable in network.weights},
        "results": {network.output.dtype for network in networks},
    }
    convolutions = {"float32": "float32", "mixed_bfloat16": "bfloat16"}[config.model.precision]
    return seen, {"convolutions": {convolutions}, "variables": {"float32"}, "results": {"float32"}}


# The data: pictures of the very size that the resize before the crop asks for, so that each pixel can be found again.

PAIRS = 6


def levels(batch: dict[str, tf.Tensor]) -> np.ndarray:
    """Input beside target in whole levels 0 to 255."""
    both = np.concatenate([batch["input"].numpy(), batch["target"].numpy()], axis=2)
    return np.asarray(np.rint((both + 1) * 127.5))


def look_at_batches(config: Config, place: Place) -> tuple[Any, Any]:
    """The first epoch against the pictures themselves."""
    height, width = config.data.image_size
    folder = place.folder / f"{height}x{width}+{config.data.jitter}"
    size = height + config.data.jitter, width + config.data.jitter
    if not folder.exists():
        write_pairs(folder / "pictures", PAIRS, size=size)
        prepare(Options(str(folder / "pictures"), "side_by_side", folder / "data", "input", (100, 0, 0)), 1)
    data, kinds = PairData(folder / "data", config), ["labels", "photo"]
    assert [spec.kind for spec in data.specs.__dict__.values()] == kinds[:: 1 if config.data.direction == "forward" else -1]
    seen = np.concatenate([levels(batch) for batch in data.training_batches(0, PAIRS // 2)])
    expected = []
    for record in np.ravel(first_epoch(config.seed, PAIRS, 2)).tolist():
        top, left, mirrored = augmented(config, record)
        sides = [picture(record, *size)[top : top + height, left : left + width] for picture in (label, photo)]
        sides = [side[:, ::-1] if mirrored else side for side in sides]
        expected.append(np.concatenate(sides if config.data.direction == "forward" else sides[::-1], axis=1))
    return seen, np.stack(expected).astype(float)


for name, values in {
    "data.direction": ("forward", "reverse"),
    "data.image_size": ((64, 64), (32, 48)),
    "data.jitter": (6, 0, 11),
    "data.mirror": (True, False),
}.items():
    row(name, *values, beside=("train.batch_size=2",))(look_at_batches)


@row("data.dir", "", "some where/data")
def data_dir(config: Config, place: Place) -> tuple[Any, Any]:
    """What a run prepares to train on: the packaged sample, or the five pairs in a folder."""
    place.patch.chdir(place.folder)
    names = [path.stem for path in sorted((SAMPLE_FOLDER / "train").glob("*.jpg"))]
    if config.data.dir:
        names = names[:5]
        folder = place.folder / config.data.dir
        folder.mkdir(parents=True)
        examples = [pair_example(name, SAMPLE_FOLDER / "train" / f"{name}.jpg") for name in names]
        shard = records.write_shard(folder / records.shard_name("train", 0, 1), examples)
        manifest = records.read_manifest(place.sample)
        records.write_manifest(folder, manifest.model_copy(update={"splits": {"train": [shard]}}))
    ready = Preparation(Order(config, place.folder / f"run of {len(names)}"), 1, 0)
    ready.by_itself()
    ready.folder.close()
    assert ready.data is not None
    return ready.data.train.keys(), names


def bytes_of(folder: Path, split: str = "train") -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{split}-*.tfrecord"))


@row("data.cache", "none", "memory", beside=("train.batch_size=4",))
def cache(config: Config, place: Place) -> tuple[Any, Any]:
    """The bytes that two epochs read from disk."""
    data = PairData(place.sample, config)
    assert len(list(data.training_batches(0, 20))) == 20
    return data.bytes_read, bytes_of(place.sample) * {"none": 2, "memory": 1}[config.data.cache]


def in_bucket(place: Place, config: Config) -> PairData:
    """The sample in a bucket."""
    there = bucket_place(place.request.getfixturevalue("bucket") + "/data")
    return PairData(there if there.is_dir() else copy_up(place.sample, str(there)), config)


@row("data.readers", 2, 5, beside=("data.cache=none", "data.read_ahead_mb=1", "train.batch_size=40"))
def readers(config: Config, place: Place) -> tuple[Any, Any]:
    """The threads that ask a bucket for 40 records which are all wanted at once."""
    data = in_bucket(place, config)
    before = set(threading.enumerate())
    assert len(list(data.training_batches(0, 1))) == 1
    new = [thread for thread in threading.enumerate() if thread not in before and thread.name == "bucket-reader"]
    return len(new), config.data.readers


@row("data.read_ahead_mb", 1, 2, 1024, beside=("data.cache=none", "train.batch_size=4"))
def read_ahead(config: Config, place: Place) -> tuple[Any, Any]:
    """How many requests an epoch takes: the longest runs of neighbours that leave a quarter of the room for reading ahead."""
    data, service = in_bucket(place, config), place.request.getfixturevalue("bucket_service")
    service.clear()
    assert len(list(data.training_batches(0, 10))) == 10
    asked = [request for request in service.requests() if ".tfrecord" in request.path and "alt=media" in request.path]
    run, total = 40, bytes_of(place.sample)
    waiting = {length: total * max(x - x**length for x in np.linspace(0, 1, 2001)) for length in range(1, 41)}
    run = max(length for length, most in waiting.items() if most <= config.data.read_ahead_mb * 1e6 * 3 / 4)
    starts = {(number // 20, number // run) for number in range(40)}  # two shards of 20
    return len(asked), len(starts)


# What reaches TensorFlow, and whoever waits.


@row("runtime.cpu_devices", 1, 3)
def cpu_devices(config: Config, place: Place) -> tuple[Any, Any]:
    """The replicas that the strategy of its own choice has, in a process of its own."""
    program = """
import sys
from trainer.cluster import Cluster
from trainer.config import RuntimeConfig
from trainer.runtime.strategy import build, choose, configure_devices
have = configure_devices(RuntimeConfig(cpu_devices=int(sys.argv[1])))
print(build(choose("auto", Cluster(), have), Cluster(), have).num_replicas_in_sync)
"""
    done = finish(start_program(program, str(config.runtime.cpu_devices)))
    return done.stdout, f"{config.runtime.cpu_devices}\n"


@row("runtime.memory_growth", True, False)
def memory_growth(config: Config, place: Place) -> tuple[Any, Any]:
    """What TensorFlow is told of a GPU; where there is none, one is made up."""
    gpu, told = tf.config.PhysicalDevice("/physical_device:GPU:7", "GPU"), []
    place.patch.setattr(tf.config, "list_physical_devices", lambda kind=None: [gpu] if kind == "GPU" else [])
    place.patch.setattr(tf.config.experimental, "set_memory_growth", lambda device, grow: told.append((device, grow)))
    devices.configure_devices(config.runtime)
    return told, [(gpu, config.runtime.memory_growth)]


@row("runtime.jit", False, True, beside=("train.steps=3",))
def jit(config: Config, place: Place) -> tuple[Any, Any]:
    """Functions in the step's graph that XLA must compile."""
    state = with_pixel_networks(config)
    batch = {"input": tf.zeros((1, 4, 4, 3)), "target": tf.zeros((1, 4, 4, 3)), "index": tf.range(1)}

    @tf.function(autograph=False)
    def step() -> tf.Tensor:
        return train_step(state, config, batch, read_clock(config, state.step), tf.constant(False)).finite

    graph = step.get_concrete_function().graph.as_graph_def()
    return any(function.attr["_XlaMustCompile"].b for function in graph.library.function), config.runtime.jit


@row("runtime.rendezvous_seconds", 1, 2, beside=("train.batch_size=2",))
def rendezvous_seconds(config: Config, place: Place) -> tuple[Any, Any]:
    """How long a chief says that it has waited for a worker who never comes."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"dir": str(place.sample)})})
    cluster = Cluster(workers=("localhost:0", "localhost:1"), index=0, source="a test")
    ready = Preparation(Order(config, place.folder / str(config.runtime.rendezvous_seconds), cluster=cluster), 2, 1)
    with pytest.raises(PeerLostError) as caught:
        ready.meet(devices.Devices(0, 0, 1))
    ready.folder.close()
    return str(caught.value).split(" these")[0], f"after {config.runtime.rendezvous_seconds} s"


@row("runtime.bucket_patience_seconds", 7, 9)
def bucket_patience_seconds(config: Config, place: Place) -> tuple[Any, Any]:
    """What every request to a bucket goes by, once the command line is read."""
    seconds = config.runtime.bucket_patience_seconds
    place.patch.setattr(Patience, "seconds", 300.0)
    resolve(parse(["trainer", f"--set=runtime.bucket_patience_seconds={seconds}"])[1])
    return Patience.seconds, seconds


# Two whole runs, which differ in every setting that says when something happens, and in what a process sets once.

RUNS: tuple[dict[str, Any], ...] = (
    {
        "train.steps": 12, "train.checkpoint_every": 5, "train.summary_every": 4, "train.sample_every": 6,
        "train.evaluate_every": 7, "train.keep": 1, "train.steps_per_loop": 2,
        "runtime.threads": 1, "runtime.tf32": True, "runtime.deterministic": False, "runtime.peer_timeout_seconds": 60,
    },
    {
        "train.steps": 9, "train.checkpoint_every": 2, "train.summary_every": 3, "train.sample_every": 4,
        "train.evaluate_every": 0, "train.keep": 2, "train.steps_per_loop": 5,
        "runtime.threads": 2, "runtime.tf32": False, "runtime.deterministic": True, "runtime.peer_timeout_seconds": 70,
    },
)  # fmt: skip

# The trainer itself, which notes beside its work what cannot be seen from outside.
NOTING = """
import json, sys
import tensorflow as tf
from tensorflow.python.framework import config
from trainer.__main__ import told
from trainer.runtime.checkpoints import Checkpoints
from trainer.train import loop

seen = {"blocks": [], "saved": []}
make_block, save, Watchdog = loop.make_block, Checkpoints.save, loop.Watchdog

def noting_blocks(*given):
    block = make_block(*given)
    return lambda until: (seen["blocks"].append(int(until)), block(until))

def noting_saves(self, state, step, **how):
    seen["saved"].append(step)
    save(self, state, step, **how)

def noting_patience(seconds, hurried):
    seen["peer_timeout_seconds"] = seconds
    return Watchdog(seconds, hurried)

loop.make_block, Checkpoints.save, loop.Watchdog = noting_blocks, noting_saves, noting_patience
code = told(sys.argv)
seen["threads"] = [tf.config.threading.get_intra_op_parallelism_threads(), tf.config.threading.get_inter_op_parallelism_threads()]
seen["tf32"] = tf.config.experimental.tensor_float_32_execution_enabled()
seen["deterministic"] = config.is_op_determinism_enabled()
print(json.dumps(seen))
sys.exit(code)
"""


class LittleRun:
    """A run of a few steps: its settings, what it noted, and what it left."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings, self.folder, self.steps = settings, folder, settings["train.steps"]
        beside = (*SMALL, "data.image_size=[32,32]", "data.jitter=0")
        self.process = start_program(
            NOTING, *flags(folder, *beside, *(f"{key}={json.dumps(value)}" for key, value in settings.items()))
        )

    @cached_property
    def seen(self) -> dict[str, Any]:
        done = finish(self.process)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def due(self, key: str) -> list[int]:
        """The steps at which something is due: every so many, and at the last."""
        every = self.settings[key]
        return [step for step in range(1, self.steps + 1) if every and (step % every == 0 or step == self.steps)]

    def measured(self, split: str) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["split"] == split]

    @property
    def best_so_far(self) -> list[int]:
        """The steps whose score on val was better than all before."""
        scores = self.measured("val")
        lowest = np.minimum.accumulate([line["l1"] for line in scores]).tolist()
        return [int(line["step"]) for number, line in enumerate(scores) if not number or line["l1"] < lowest[number - 1]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[LittleRun]:
    """Both runs, at the same time."""
    begun = [LittleRun(settings, tmp_path_factory.mktemp("little") / "run") for settings in RUNS]
    return [run for run in begun if run.seen]


RunLook = Callable[[LittleRun], tuple[Any, Any]]


def run_row(key: str) -> Callable[[RunLook], RunLook]:
    """A row whose values are those of the two runs."""

    def add(look: RunLook) -> RunLook:
        row(key, *(settings[key] for settings in RUNS))(
            lambda config, place: look(place.run_with(key, dict(leaves(config))[key]))
        )
        return look

    return add


@run_row("train.steps")
def steps(run: LittleRun) -> tuple[Any, Any]:
    return [run.seen["blocks"][-1], run.seen["saved"][-1], [line["step"] for line in run.measured("test")]], [
        run.steps,
        run.steps,
        [run.steps],
    ]


@run_row("train.steps_per_loop")
def steps_per_loop(run: LittleRun) -> tuple[Any, Any]:
    """A block ends where something is due, or after so many steps."""
    stops = sorted({step for name in ("checkpoint", "summary", "sample", "evaluate") for step in run.due(f"train.{name}_every")})
    blocks, step = [], 0
    while step < run.steps:
        step = min(step + run.settings["train.steps_per_loop"], next(stop for stop in stops if stop > step))
        blocks.append(step)
    return run.seen["blocks"], blocks


@run_row("train.checkpoint_every")
def checkpoint_every(run: LittleRun) -> tuple[Any, Any]:
    """When it is due, and whenever the score is the best so far."""
    return run.seen["saved"], sorted({*run.due("train.checkpoint_every"), *run.best_so_far})


@run_row("train.keep")
def keep(run: LittleRun) -> tuple[Any, Any]:
    """The newest, and the best."""
    names = sorted(path.name for path in (run.folder / "checkpoints").glob("step-*.json"))
    kept = {*run.seen["saved"][-run.settings["train.keep"] :], *run.best_so_far[-1:]}
    return names, [f"step-{step:08d}.json" for step in sorted(kept)]


@run_row("train.summary_every")
def summary_every(run: LittleRun) -> tuple[Any, Any]:
    return [found.step for found in scalars(run.folder) if found.tag == "loss/l1"], run.due("train.summary_every")


@run_row("train.sample_every")
def sample_every(run: LittleRun) -> tuple[Any, Any]:
    names = sorted(path.name for path in (run.folder / "samples").iterdir())
    return names, [f"step-{step:07d}.png" for step in run.due("train.sample_every")]


@run_row("train.evaluate_every")
def evaluate_every(run: LittleRun) -> tuple[Any, Any]:
    return [line["step"] for line in run.measured("val")], run.due("train.evaluate_every")


@run_row("runtime.threads")
def threads(run: LittleRun) -> tuple[Any, Any]:
    return run.seen["threads"], [run.settings["runtime.threads"]] * 2


for name in ("tf32", "deterministic", "peer_timeout_seconds"):
    run_row(f"runtime.{name}")(lambda run, name=name: (run.seen[name], run.settings[f"runtime.{name}"]))


def test_under_determinism_the_wait_for_input_is_measured_all_the_same(runs: list[LittleRun]) -> None:
    """TensorFlow refuses its own clock there, which once ended such a run at its first step."""
    (run,) = [run for run in runs if run.settings["runtime.deterministic"]]
    shares = [found.value for found in scalars(run.folder, measured=True) if found.tag == "input/wait_share"]
    assert len(shares) == len(run.due("train.summary_every"))
    assert all(0 < share < 1 for share in shares)
