"""What needs no network, each with its parameter fitted to the training photographs and the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from skimage.filters import gaussian
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from skimage.restoration import denoise_nl_means
from torch import Tensor

from .denoiser import NOISE, add_noise


class Quality(NamedTuple):
    psnr: float  # dB
    ssim: float


def quality(original: Tensor, image: Tensor) -> Quality:
    """Of an image ``(3, H, W)`` in [0, 1]; values outside are clipped first, as a display would."""
    clean, shown = _channels_last(original), _channels_last(image).clip(0, 1)
    return Quality(
        peak_signal_noise_ratio(clean, shown, data_range=1),
        structural_similarity(clean, shown, channel_axis=-1, data_range=1),
    )


class Filtered(NamedTuple):
    name: str
    setting: str
    image: Tensor


def fitted_baselines(photographs: list[Tensor], noisy: Tensor, generator: torch.Generator) -> list[Filtered]:
    """``noisy`` through each baseline filter, with the parameter that served ``photographs`` best (mean PSNR)."""
    pairs = [(image, add_noise(image, generator)) for image in photographs]
    filtered = []
    for name, setting, function, parameters in (
        ("Gaussian filter", "sigma {:g} pixels", _gaussian, (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6)),
        ("Non-local means", "h {:g} of the noise", _non_local_means, (0.4, 0.5, 0.6, 0.7, 0.8, 1.0)),
    ):

        def log_error(parameter: float, function=function) -> float:
            return sum(math.log(((clean - _apply(function, noised, parameter)) ** 2).mean()) for clean, noised in pairs)

        best = min(parameters, key=log_error)
        filtered.append(Filtered(name, setting.format(best), _apply(function, noisy, best)))
    return filtered


def _gaussian(image: np.ndarray, sigma: float) -> np.ndarray:
    return gaussian(image, sigma, channel_axis=-1)


def _non_local_means(image: np.ndarray, strength: float) -> np.ndarray:
    return denoise_nl_means(
        image, patch_size=5, patch_distance=6, h=strength * NOISE, sigma=NOISE, fast_mode=True, channel_axis=-1
    )


def _apply(function: Callable[[np.ndarray, float], np.ndarray], image: Tensor, parameter: float) -> Tensor:
    return torch.from_numpy(function(_channels_last(image), parameter)).permute(2, 0, 1).float()


def _channels_last(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()
