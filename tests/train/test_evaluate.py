from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.images import as_kind, encode, label, photo
from tests.helpers.scores import scores_of
from tests.helpers.settings import small_config
from trainer.data.pipeline import PairData
from trainer.data.prepare import Options, prepare
from trainer.model.generators import translate
from trainer.train import evaluate
from trainer.train.evaluate import Evaluator, InterruptedEvaluation, score
from trainer.train.state import build_generator

CONFIG = small_config("train.batch_size=2")


@pytest.fixture
def evaluator(small_data: PairData) -> Evaluator:
    return Evaluator(build_generator(CONFIG, small_data.specs), small_data, CONFIG)


def real_pairs(data: PairData) -> tuple[np.ndarray, np.ndarray]:
    batch = next(iter(data.batches_of(data.split("val"), range(8), 8)))
    levels = [((image.numpy() + 1) * 127.5).round() for image in (batch["target"], batch["target"][::-1])]
    return levels[0].astype(np.float64), levels[1].astype(np.float64)


def test_scores_are_scikit_images(small_data: PairData) -> None:
    target, other = real_pairs(small_data)
    scores = score(tf.constant(other), tf.constant(target))
    for place in range(8):
        expected = scores_of(other[place].astype(np.uint8), target[place].astype(np.uint8))
        assert float(scores["l1"][place]) == pytest.approx(expected["l1"], rel=1e-5)
        assert float(scores["psnr"][place]) == pytest.approx(expected["psnr"], rel=1e-5)
        assert float(scores["ssim"][place]) == pytest.approx(expected["ssim"], abs=1e-4)


@pytest.mark.parametrize(("channels", "bits"), [(3, 8), (1, 16)])
def test_what_is_measured_are_the_files_pixels_at_their_own_depth(channels: int, bits: int, tmp_path: Path) -> None:
    """16 bits lose nothing to levels of 8, and are scored on the scale of 0 to 255 all the same."""
    targets = [as_kind(photo(number), channels, bits) for number in range(3)]
    for split in ("train", "val"):
        for side, pictures in (("in", [label(number) for number in range(3)]), ("out", targets)):
            (tmp_path / side / split).mkdir(parents=True)
            for number, pixels in enumerate(pictures):
                (tmp_path / side / split / f"{number}.png").write_bytes(encode(pixels, "png"))
    prepare(Options(f"{tmp_path}/in,{tmp_path}/out", "folders", tmp_path / "data", labels="input"), 1)
    data = PairData(tmp_path / "data", CONFIG)
    generator = build_generator(CONFIG, data.specs)
    images = tf.constant(np.stack([label(number) for number in range(3)]) / 127.5 - 1, tf.float32)
    white = np.iinfo(targets[0].dtype).max
    drawn = ((translate(generator, images, CONFIG.seed).numpy() + 1) * (white / 2)).round().astype(targets[0].dtype)
    expected = [scores_of(mine, target) for mine, target in zip(drawn, targets, strict=True)]
    measured = Evaluator(generator, data, CONFIG).measure(data.split("val"), lambda: False)
    assert measured["images"] == 3
    for name, tolerance in (("l1", 2e-5), ("psnr", 2e-5), ("ssim", 1e-4)):
        assert measured[name] == pytest.approx(np.mean([each[name] for each in expected]), abs=tolerance, rel=1e-6), name


def test_equal_images_score_0_100_1(small_data: PairData) -> None:
    target, _ = real_pairs(small_data)
    scores = score(tf.constant(target), tf.constant(target))
    assert set(scores["l1"].numpy()) == {0.0}
    assert set(scores["psnr"].numpy()) == {100.0}
    np.testing.assert_allclose(scores["ssim"], 1.0, atol=1e-6)


def test_a_split_is_the_mean_over_its_images_each_weighing_the_same(
    evaluator: Evaluator, small_data: PairData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 images in batches of 4, 4, 4, 3 and one by one."""
    test = small_data.split("test")
    together = evaluator.measure(test, lambda: False)
    monkeypatch.setattr(evaluate, "EVALUATION_BATCH", 1)
    alone = evaluator.measure(test, lambda: False)
    assert together["images"] == 15
    for name in ("l1", "psnr", "ssim"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4)


def test_a_stop_in_the_middle_leaves_nothing(evaluator: Evaluator, small_data: PairData) -> None:
    with pytest.raises(InterruptedEvaluation):
        evaluator.measure(small_data.split("val"), lambda: True)


def test_samples_are_the_same_validation_pairs_every_time(evaluator: Evaluator, small_data: PairData) -> None:
    first, second = evaluator.sample_columns(), evaluator.sample_columns()
    assert [name for name, _ in first] == ["input", "target", "output"]
    for (_, a), (_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    batch = next(iter(small_data.batches_of(small_data.split("val"), range(4), 4)))
    np.testing.assert_array_equal(first[1][1], ((batch["target"].numpy() + 1) * 127.5).round().astype(np.uint8))
