"""``python -m localattn demo``: a small denoiser with local attention trains on real photographs.

It writes one picture of a photograph it did not train on, and prints what a training step takes with the fused
attention and with plain ``F.unfold``. Everything runs on the CPU and offline.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from .. import _library
from .baselines import fitted_baselines, quality
from .cost import step_cost
from .denoiser import CHANNELS, CROP_SIZE, CROPS, KERNEL_SIZE, NOISE, Denoiser, Progress, add_noise, train
from .photographs import held_out_photograph, training_photographs
from .picture import Panel, write_picture

CROP = (215, 300, 150, 150)  # of the held-out photograph, enlarged in the picture: top, left, height, width


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m localattn demo", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--seconds", type=float, default=60, help="time to train for (default: %(default)g)")
    parser.add_argument("--steps", type=int, help="train for that many steps instead: repeatable")
    parser.add_argument("--output", type=Path, default=Path("localattn-demo.png"), help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)d)")
    arguments = parser.parse_args(argv)

    _library.require_operators()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)

    photographs, original = training_photographs(), held_out_photograph()
    noisy = add_noise(original, generator)
    denoiser = Denoiser()
    print(
        f"A denoiser of {sum(p.numel() for p in denoiser.parameters()):,} parameters, local attention in windows of "
        f"{KERNEL_SIZE}x{KERNEL_SIZE}, trains on {len(photographs)} photographs with noise of {NOISE * 255:.0f}/255; "
        f"{_threads()}."
    )
    began = time.perf_counter()
    steps = _train_with_bar(train(denoiser, photographs, arguments.seconds, arguments.steps, generator))
    seconds = time.perf_counter() - began

    with torch.no_grad():
        denoised = denoiser(noisy.unsqueeze(0)).squeeze(0)
    # Noise of their own: what they are fitted to does not hang on how many steps the network took.
    baselines = fitted_baselines(photographs, noisy, torch.Generator().manual_seed(arguments.seed + 1))
    panels = [Panel("Noisy", noisy, quality(original, noisy))]
    panels += [Panel(filtered.name, filtered.image, quality(original, filtered.image)) for filtered in baselines]
    panels += [
        Panel("Local attention", denoised, quality(original, denoised)),
        Panel("Original", original, None),
    ]
    heading = (
        f"A photograph none of them was fitted to, noise {NOISE * 255:.0f}/255.  Local attention {KERNEL_SIZE}x"
        f"{KERNEL_SIZE}, trained for {seconds:.0f} s on the CPU, {_threads()}."
    )
    write_picture(arguments.output, panels, CROP, heading)

    print(f"\nOn a photograph it did not train on, after {steps} steps:")
    for panel in panels[:-1]:
        print(f"  {panel.title:<18} {panel.quality.psnr:6.2f} dB   SSIM {panel.quality.ssim:.3f}")
    for filtered in baselines:
        print(f"  ({filtered.name}: {filtered.setting}, the best for the training photographs)")
    print(f"Picture: {arguments.output}")
    _print_cost()


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def _train_with_bar(training: Iterator[Progress]) -> int:
    steps = 0
    layout = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
    with tqdm(total=1.0, desc="training", bar_format=layout, mininterval=0.2) as bar:
        for progress in training:
            steps = progress.steps
            psnr = -10 * math.log10(progress.loss)
            bar.set_postfix_str(f"step {steps}, loss {progress.loss:.5f}, PSNR {psnr:.2f} dB", refresh=False)
            bar.update(progress.fraction - bar.n)
    return steps


def _print_cost() -> None:
    threads = torch.get_num_threads()
    costs = {name: step_cost(name, threads) for name in ("localattn", "F.unfold")}
    fused, plain = costs["localattn"], costs["F.unfold"]
    print(
        f"\nOne training step of this network ({CROPS} crops of {CROP_SIZE}x{CROP_SIZE}, {CHANNELS} channels), median "
        "of 9, and the rise of the resident set at its highest, each in a fresh process:"
    )
    for name, cost in costs.items():
        milliseconds = [1e3 * value for value in cost.seconds]
        print(
            f"  {name:<10} {milliseconds[0]:8.1f} ms ({milliseconds[1]:.1f} to {milliseconds[2]:.1f})   "
            f"{cost.memory / 2**20:8.1f} MiB   loss {cost.loss:.6f}"
        )
    print(
        f"  localattn takes 1/{plain.seconds.median / fused.seconds.median:.1f} of the time and "
        f"1/{plain.memory / fused.memory:.1f} of the memory; the loss is the same computation."
    )
