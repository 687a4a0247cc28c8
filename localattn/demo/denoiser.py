"""The network: convolutions describe every pixel's surroundings, local attention averages over pixels whose
surroundings look alike, near or far in the window. The idea of non-local means (Buades, Coll and Morel, 2005), learnt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import LocalAttention
from .photographs import random_crops

NOISE = 25 / 255  # standard deviation
CHANNELS = 16
KERNEL_SIZE = 11
CROPS, CROP_SIZE = 4, 64
LEARNING_RATE = 4e-3


class ConvolutionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(x)))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, attention: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.attention = attention(channels, channels, KERNEL_SIZE, KERNEL_SIZE)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.attention(self.norm(x)))


class Denoiser(nn.Module):
    """``(B, 3, H, W)`` with noise to the same without; begins as the identity.

    Args:
        attention: called as ``attention(channels, channels, height, width)`` of the window.
    """

    def __init__(self, attention: Callable[..., nn.Module] = LocalAttention) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, padding=1),
            ConvolutionBlock(CHANNELS),
            AttentionBlock(CHANNELS, attention),
            ConvolutionBlock(CHANNELS),
        )
        self.noise = nn.Conv2d(CHANNELS, 3, 3, padding=1)
        nn.init.zeros_(self.noise.weight)
        nn.init.zeros_(self.noise.bias)

    def forward(self, noisy: Tensor) -> Tensor:
        return noisy - self.noise(self.body(noisy - 0.5))


def add_noise(image: Tensor, generator: torch.Generator) -> Tensor:
    return image + NOISE * torch.randn(image.shape, generator=generator)


def training_step(denoiser: Denoiser, optimizer: torch.optim.Optimizer, clean: Tensor, noisy: Tensor) -> float:
    """One step of gradient descent on the mean squared error, which is returned."""
    loss = F.mse_loss(denoiser(noisy), clean)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


class Progress(NamedTuple):
    steps: int
    fraction: float  # of the time, or of the steps, that training may take
    loss: float  # mean squared error, averaged over the last few steps


def train(
    denoiser: Denoiser, photographs: list[Tensor], seconds: float, steps: int | None, generator: torch.Generator
) -> Iterator[Progress]:
    """Trains on random crops for that many steps, or if None for that long, and tells of every step."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    began = time.perf_counter()
    done, fraction, average = 0, 0.0, 0.0
    while fraction < 1:
        warm_up = min(1.0, fraction / 0.05 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm_up * (1 + math.cos(math.pi * fraction)) / 2
        clean = random_crops(photographs, CROPS, CROP_SIZE, generator)
        loss = training_step(denoiser, optimizer, clean, add_noise(clean, generator))
        done += 1
        average += (loss - average) / min(done, 50)
        fraction = min(1.0, (time.perf_counter() - began) / seconds if steps is None else done / steps)
        yield Progress(done, fraction, average)
