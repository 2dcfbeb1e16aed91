import numpy as np
import pytest
import tensorflow as tf
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.helpers.settings import small_config
from trainer.data.pipeline import PairData
from trainer.model.generators import translate
from trainer.train import evaluate
from trainer.train.evaluate import Evaluator, InterruptedEvaluation, score
from trainer.train.state import build_networks

CONFIG = small_config("train.batch_size=2")


@pytest.fixture
def evaluator(small_data: PairData) -> Evaluator:
    return Evaluator(build_networks(CONFIG, small_data.specs)[0], small_data, CONFIG)


def real_pairs(data: PairData) -> tuple[np.ndarray, np.ndarray]:
    batch = next(iter(data.batches_of(data.split("val"), range(8), 8)))
    levels = [((image.numpy() + 1) * 127.5).round() for image in (batch["target"], batch["target"][::-1])]
    return levels[0].astype(np.float64), levels[1].astype(np.float64)


def test_scores_are_scikit_images(small_data: PairData) -> None:
    target, other = real_pairs(small_data)
    scores = score(tf.constant(other), tf.constant(target))
    for place in range(8):
        a, b = target[place], other[place]
        settings = {
            "data_range": 255,
            "channel_axis": -1,
            "gaussian_weights": True,
            "sigma": 1.5,
            "use_sample_covariance": False,
        }
        assert float(scores["l1"][place]) == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
        assert float(scores["psnr"][place]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), rel=1e-5)
        assert float(scores["ssim"][place]) == pytest.approx(structural_similarity(a, b, **settings), abs=1e-4)


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


def test_measured_are_the_pictures_as_files_would_hold_them(evaluator: Evaluator, small_data: PairData) -> None:
    batch = next(iter(small_data.batches_of(small_data.split("val"), range(8), 8)))
    out = translate(evaluator._generator, batch["input"], CONFIG.seed).numpy()
    pictures = ((out + 1) * 127.5).round().clip(0, 255).astype(np.uint8).astype(float)
    target = ((batch["target"].numpy() + 1) * 127.5).round()
    expected = np.abs(pictures - target).mean()
    assert evaluator.measure(small_data.split("val"), lambda: False)["l1"] == pytest.approx(expected, rel=1e-4)


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
