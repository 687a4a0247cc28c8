"""What one training step of the demo's network takes, with the fused attention and with plain ``F.unfold``."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from ..bench.measure import Spread, in_fresh_process, peak_memory
from ..compat.image_local_attention import TorchLocalAttention
from ..nn import LocalAttention
from .denoiser import CROP_SIZE, CROPS, Denoiser, add_noise, training_step

ATTENTIONS = {"localattn": LocalAttention, "F.unfold": TorchLocalAttention}


class Cost(NamedTuple):
    seconds: Spread
    memory: int  # bytes, at the highest, above the process before its first step
    loss: float  # of the first step: the two networks compute the same


def step_cost(attention: str, threads: int, steps: int = 10) -> Cost:
    """Time and peak memory of the training step with that attention, in a fresh process."""
    return in_fresh_process(_measure, attention, threads, steps)


def _measure(attention: str, threads: int, steps: int) -> Cost:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    denoiser = Denoiser(ATTENTIONS[attention])
    optimizer = torch.optim.AdamW(denoiser.parameters())
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(CROPS, 3, CROP_SIZE, CROP_SIZE, generator=generator)
    noisy = add_noise(clean, generator)
    training_step(denoiser, optimizer, clean[:1, :, :8, :8], noisy[:1, :, :8, :8])  # loads what libraries load late
    samples, losses = [], []

    def work() -> None:
        for _ in range(steps):
            began = time.perf_counter()
            losses.append(training_step(denoiser, optimizer, clean, noisy))
            samples.append(time.perf_counter() - began)

    memory = peak_memory(work)
    return Cost(Spread.of(samples[1:]), memory, losses[0])
