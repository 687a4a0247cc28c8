"""The demo's one picture: every version of the held-out photograph, whole and enlarged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .baselines import Quality

ACCENT = "#d62728"


class Panel(NamedTuple):
    title: str
    image: Tensor  # (3, H, W) in [0, 1]
    quality: Quality | None  # None for the original


def write_picture(path: Path, panels: list[Panel], crop: tuple[int, int, int, int], heading: str) -> None:
    """Writes a PNG with two rows: the images, and their part ``crop`` (top, left, height, width) enlarged."""
    top, left, height, width = crop
    # Both rows as high as what they show, with room for the heading and the captions.
    rows = [panels[0].image.shape[1] / panels[0].image.shape[2], height / width]
    size = 3.3 * len(panels), 3.3 * sum(rows) + 1.2
    figure = Figure(figsize=size, dpi=130, facecolor="white")
    FigureCanvasAgg(figure)  # draws without a display
    axes = figure.subplots(2, len(panels), height_ratios=rows)
    best = max(panel.quality.psnr for panel in panels if panel.quality)
    for whole, enlarged, panel in zip(*axes, panels, strict=True):
        shown = panel.image.clamp(0, 1).permute(1, 2, 0).numpy()
        whole.imshow(shown, interpolation="lanczos")
        whole.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=ACCENT, linewidth=1.8))
        whole.set_title(panel.title, fontsize=14, pad=8)
        enlarged.imshow(shown[top : top + height, left : left + width], interpolation="nearest")
        for spine in enlarged.spines.values():
            spine.set(edgecolor=ACCENT, linewidth=1.8)
        for axis in (whole, enlarged):
            axis.set(xticks=[], yticks=[])
        for spine in whole.spines.values():
            spine.set_visible(False)
        if panel.quality is None:
            text, weight = "PSNR, SSIM against this", "normal"
        else:
            text = f"{panel.quality.psnr:.2f} dB   SSIM {panel.quality.ssim:.3f}"
            weight = "bold" if panel.quality.psnr == best else "normal"
        enlarged.set_xlabel(text, fontsize=13, labelpad=8, weight=weight)
    figure.suptitle(heading, fontsize=12.5, color="#444444", y=1 - 0.1 / size[1])
    figure.subplots_adjust(
        left=0.006, right=0.994, top=1 - 0.75 / size[1], bottom=0.42 / size[1], wspace=0.025, hspace=0.02
    )
    figure.savefig(path)
