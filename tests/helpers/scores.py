"""Scores of pictures, computed from their pixels in NumPy and scikit-image, on the 0 to 255 scale; and means of resamples."""

from itertools import product

import numpy as np
from scipy.ndimage import correlate1d, uniform_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

MULTISCALE_EXPONENTS = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])


def of_255(pixels: np.ndarray) -> np.ndarray:
    """Levels of 8 or of 16 bits on the scale of 8."""
    return pixels.astype(np.float64) * (255.0 / np.iinfo(pixels.dtype).max)


def _ms_ssim_of_channel(a: np.ndarray, b: np.ndarray) -> float:
    """Wang, Simoncelli and Bovik 2003 in NumPy: five scales halved by 2x2 means, exponents of the paper."""
    x = np.arange(-5, 6)
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, factors = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []

    def blur(image: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(image, window, 0), window, 1)[5:-5, 5:-5]

    for scale in range(5):
        ma, mb = blur(a), blur(b)
        va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        contrast = (2 * cov + c2) / (va + vb + c2)
        luminance = (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
        factors.append((contrast if scale < 4 else contrast * luminance).mean())
        a, b = (uniform_filter(image, 2, origin=-1)[::2, ::2] for image in (a, b))
    return float(np.prod(np.maximum(factors, 0) ** MULTISCALE_EXPONENTS))


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity over five scales, the mean over the channels of (height, width, channels)."""
    return float(np.mean([_ms_ssim_of_channel(a[..., channel], b[..., channel]) for channel in range(a.shape[-1])]))


def scores_of(drawn: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Every score of a drawing, of (height, width, channels) with 8 or 16 bits; MS-SSIM where both sides are 176 or more."""
    assert (drawn.shape, drawn.dtype) == (target.shape, target.dtype)
    a, b = of_255(drawn), of_255(target)
    scores = {
        "l1": float(np.abs(a - b).mean()),
        "psnr": float(peak_signal_noise_ratio(b, a, data_range=255)),
        "ssim": float(
            structural_similarity(
                a, b, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
        ),
    }
    return scores | ({"ms_ssim": ms_ssim(a, b)} if min(a.shape[:2]) >= 176 else {})


def means_of_all_resamples(values: np.ndarray) -> np.ndarray:
    """The mean of each of the n^n resamples of a few values, in order: what a bootstrap draws from."""
    return np.sort([np.mean(chosen) for chosen in product(values, repeat=len(values))])
