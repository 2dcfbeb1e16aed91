import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.data import pairs
from trainer.data.records import ImageSpec, Manifest, read_manifest
from trainer.data.sample import SAMPLE_FOLDER, pair_example

LABELS = ImageSpec(kind="labels", channels=3, bit_depth=8)
PICTURE = SAMPLE_FOLDER / "val" / sorted(path.name for path in (SAMPLE_FOLDER / "val").glob("*.jpg"))[0]
STILL = tf.constant([0, 0, 0])


@pytest.fixture
def manifest(sample_folder: Path) -> Manifest:
    return read_manifest(sample_folder)


def record() -> tf.Tensor:
    return tf.constant(pair_example("x", PICTURE))


def pillow() -> np.ndarray:
    return np.asarray(Image.open(PICTURE).convert("RGB"), np.float64)


def test_a_pair_is_split_in_the_middle_and_decoded_as_others_decode_it(manifest: Manifest) -> None:
    pair = pairs.decode_record(record(), manifest)
    assert np.abs(pair.input.numpy() - pillow()[:, :256]).max() <= 2
    assert np.abs(pair.target.numpy() - pillow()[:, 256:]).max() <= 2


def test_without_augmentation_the_pixels_are_the_files_in_unit_range(manifest: Manifest) -> None:
    pair = pairs.prepare(record(), manifest, (256, 256), "forward", 0, STILL)
    decoded = pairs.decode_record(record(), manifest)
    np.testing.assert_allclose(pair.target, decoded.target.numpy() / 127.5 - 1, atol=1e-6)
    assert pair.input.shape == (256, 256, 3)


def test_reverse_swaps_the_sides(manifest: Manifest) -> None:
    forward = pairs.prepare(record(), manifest, (64, 64), "forward", 0, STILL)
    reverse = pairs.prepare(record(), manifest, (64, 64), "reverse", 0, STILL)
    assert np.array_equal(forward.input, reverse.target)
    assert np.array_equal(forward.target, reverse.input)


def test_crop_and_mirror_are_the_same_for_both_images(manifest: Manifest) -> None:
    whole = pairs.prepare(record(), manifest, (80, 80), "forward", 0, STILL)
    moved = pairs.prepare(record(), manifest, (64, 64), "forward", 16, tf.constant([5, 11, 1]))
    for side in range(2):
        expected = whole[side].numpy()[5:69, 11:75][:, ::-1]
        np.testing.assert_array_equal(moved[side], expected)


def test_label_maps_get_no_colours_that_were_not_there(manifest: Manifest) -> None:
    decoded = pairs.decode_record(record(), manifest).input
    resized = pairs.prepare(record(), manifest, (286, 286), "forward", 0, STILL).input
    colours = {tuple(pixel) for pixel in pairs.to_unit_range(decoded, LABELS).numpy().reshape(-1, 3)}
    assert {tuple(pixel) for pixel in resized.numpy().reshape(-1, 3)} <= colours


@pytest.mark.parametrize("mirrored", [0, 1])
@pytest.mark.parametrize("resized", [(286, 286), (300, 97), (256, 256), (33, 511), (1, 7)])
def test_label_maps_resize_as_tensorflow_does(resized: tuple[int, int], mirrored: int, manifest: Manifest) -> None:
    whole = tf.image.resize(pairs.decode_record(record(), manifest).input, resized, method="nearest").numpy()
    jitter = min(*resized, 20) - 1
    size, how = (resized[0] - jitter, resized[1] - jitter), tf.constant([jitter // 2, jitter, mirrored])
    ours = pairs.prepare(record(), manifest, size, "forward", jitter, how).input
    crop = whole[jitter // 2 :, jitter:][: size[0], : size[1]][:, :: -1 if mirrored else 1]
    np.testing.assert_array_equal(ours, crop.astype(np.float32) * np.float32(2 / 255) - np.float32(1))


def test_photographs_are_shrunk_with_antialiasing() -> None:
    stripes = np.tile(np.array([0.0, 255.0], np.float32), 64)[None, :, None].repeat(128, 0).repeat(3, 2)
    small = pairs.resize(tf.constant(stripes), 32, 32).numpy()
    assert np.abs(small[:, 2:-2] - 127.5).max() < 3


def test_photographs_resize_as_pillow_does(manifest: Manifest) -> None:
    target = pairs.decode_record(record(), manifest).target
    ours = pairs.resize(target, 100, 180).numpy()
    image = Image.fromarray(target.numpy().astype(np.uint8))
    theirs = np.asarray(image.resize((180, 100), Image.Resampling.BILINEAR), np.float64)
    assert np.abs(ours - theirs).max() < 1.5


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("bits", "dtype"), [(8, np.uint8), (16, np.uint16)])
def test_unit_range_is_of_the_true_bit_depth(bits: int, dtype: type) -> None:
    spec = ImageSpec(kind="photo", channels=1, bit_depth=bits)  # type: ignore[arg-type]
    top = 2**bits - 1
    levels = np.array([[0, 1, top // 2, top]], dtype)
    image = pairs.decode_image(tf.constant(png(levels)), tf.constant("png"), spec)
    np.testing.assert_allclose(pairs.to_unit_range(image, spec)[0, :, 0], levels[0] / (top / 2) - 1, atol=2e-7)


@pytest.mark.parametrize("bits", [8, 16])
def test_levels_survive_the_way_to_unit_range_and_back(bits: int) -> None:
    spec = ImageSpec(kind="photo", channels=1, bit_depth=bits)  # type: ignore[arg-type]
    levels = tf.range(2.0**bits)
    np.testing.assert_array_equal(pairs.from_unit_range(pairs.to_unit_range(levels, spec), bits), levels)


def test_values_outside_the_range_are_clipped_to_levels() -> None:
    assert pairs.from_unit_range(tf.constant([-1.5, 1.2])).numpy().tolist() == [0.0, 255.0]


def test_a_size_that_the_record_misstates_is_an_error(manifest: Manifest) -> None:
    example = tf.train.Example.FromString(pair_example("x", PICTURE))
    example.features.feature["pair/width"].int64_list.value[0] = 500
    with pytest.raises(tf.errors.InvalidArgumentError, match="not of the size that the record states"):
        pairs.decode_record(tf.constant(example.SerializeToString()), manifest)


def test_two_separate_images_make_a_pair() -> None:
    rng = np.random.default_rng(0)
    sides = {"input": rng.integers(0, 256, (32, 48), np.uint8), "target": rng.integers(0, 65536, (32, 48), np.uint16)}
    features = {}
    for name, image in sides.items():
        features[f"{name}/encoded"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[png(image)]))
        features[f"{name}/format"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"png"]))
        features[f"{name}/height"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[32]))
        features[f"{name}/width"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[48]))
    encoded = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
    manifest = Manifest(
        version=1, name="", source="", licence="", layout="separate", splits={},
        input=ImageSpec(kind="labels", channels=1, bit_depth=8), target=ImageSpec(kind="photo", channels=1, bit_depth=16),
    )  # fmt: skip
    pair = pairs.decode_record(tf.constant(encoded), manifest)
    np.testing.assert_array_equal(pair.input[..., 0], sides["input"])
    np.testing.assert_array_equal(pair.target[..., 0], sides["target"])
