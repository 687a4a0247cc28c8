"""The photographs that come inside scikit-image's wheel: nothing is downloaded."""

from __future__ import annotations

import torch
from skimage import data
from torch import Tensor

TRAINING = ("astronaut", "chelsea", "rocket", "stereo_motorcycle")
HELD_OUT = "coffee"


def load(name: str) -> list[Tensor]:
    """The colour photographs of that name in ``skimage.data``, each ``(3, H, W)`` in [0, 1]."""
    loaded = getattr(data, name)()
    images = loaded[:2] if isinstance(loaded, tuple) else (loaded,)  # a stereo pair comes with its disparity
    return [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in images]


def training_photographs() -> list[Tensor]:
    return [image for name in TRAINING for image in load(name)]


def held_out_photograph() -> Tensor:
    """The one that no network and no baseline is fitted to."""
    return load(HELD_OUT)[0]


def random_crops(images: list[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """``(count, 3, size, size)``, cut at random places, mirrored and transposed at random."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    crops = []
    for _ in range(count):
        image = images[draw(len(images))]
        top, left = draw(image.shape[1] - size + 1), draw(image.shape[2] - size + 1)
        crop = image[:, top : top + size, left : left + size]
        if draw(2):
            crop = crop.flip(2)
        if draw(2):
            crop = crop.transpose(1, 2)
        crops.append(crop)
    return torch.stack(crops)
