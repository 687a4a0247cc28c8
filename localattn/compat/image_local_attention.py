"""The calls of Image-Local-Attention (https://github.com/zzd1992/Image-Local-Attention).

Same names, positional arguments and results. Differs from the original: any device and floating dtype, any layout
and expanded tensors, maps of any size, sizes that do not belong together refused, second derivatives.
``LocalAttention`` is fused and stores no window; ``TorchLocalAttention`` is the plain PyTorch form it is compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import LocalAttention
from ..ops import similarity, weighting

__all__ = ["LocalAttention", "TorchLocalAttention", "f_similar", "f_weighting"]


def f_similar(x_ori: Tensor, x_loc: Tensor, kH: int, kW: int) -> Tensor:
    """The scores of every pixel of ``x_ori`` with the ``kH x kW`` pixels of ``x_loc`` around it, unscaled.

    Args:
        x_ori: query, ``(N, C, H, W)``.
        x_loc: key, ``(N, C, H, W)``.

    Returns:
        ``(N, H, W, kH * kW)``, 0 where the window leaves the image.
    """
    check_map("x_ori", x_ori)
    check_map("x_loc", x_loc)
    if x_loc.shape != x_ori.shape:
        raise ValueError(f"x_loc must have the shape of x_ori, {tuple(x_ori.shape)}, got {tuple(x_loc.shape)}")
    return similarity(one_head(x_ori), one_head(x_loc), (kH, kW), border="zero").squeeze(-2)


def f_weighting(x_ori: Tensor, x_weight: Tensor, kH: int, kW: int) -> Tensor:
    """The sum of the ``kH x kW`` pixels of ``x_ori`` around every pixel, weighted by ``x_weight``.

    Args:
        x_ori: value, ``(N, C, H, W)``.
        x_weight: ``(N, H, W, kH * kW)``; what it holds for places outside the image counts for nothing.

    Returns:
        ``(N, C, H, W)``.
    """
    check_map("x_ori", x_ori)
    expected = (x_ori.shape[0], *x_ori.shape[2:], kH * kW)
    if tuple(x_weight.shape) != expected:
        raise ValueError(f"x_weight must have shape {expected}, got {tuple(x_weight.shape)}")
    return from_one_head(weighting(x_weight.unsqueeze(-2), one_head(x_ori), (kH, kW), border="zero"))


class TorchLocalAttention(nn.Module):
    """:class:`LocalAttention` on ``F.unfold``, which copies every window; parameters as there."""

    def __init__(self, inp_channels: int, out_channels: int, kH: int, kW: int) -> None:
        super().__init__()
        self.kernel_size = (kH, kW)
        self.conv1 = nn.Conv2d(inp_channels, out_channels, 1, bias=False)
        self.conv2 = nn.Conv2d(inp_channels, out_channels, 1, bias=False)
        self.conv3 = nn.Conv2d(inp_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.conv1(x), self._windows(self.conv2(x)), self._windows(self.conv3(x))
        weights = torch.einsum("nchw,ncphw->nphw", query, key).softmax(1)
        return torch.einsum("nphw,ncphw->nchw", weights, value)

    def _windows(self, x: Tensor) -> Tensor:  # (N, C, kH * kW, H, W)
        kH, kW = self.kernel_size
        padded = F.pad(x, (kW // 2, kW - 1 - kW // 2, kH // 2, kH - 1 - kH // 2))
        return F.unfold(padded, self.kernel_size).unflatten(-1, x.shape[2:]).unflatten(1, (x.shape[1], -1))


def check_map(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be (batch, channels, height, width), got shape {tuple(x.shape)}")


def one_head(x: Tensor) -> Tensor:
    """``(N, C, H, W)`` as ``(N, H, W, 1, C)``, a view."""
    return x.permute(0, 2, 3, 1).unsqueeze(-2)


def from_one_head(x: Tensor) -> Tensor:
    """``(N, H, W, 1, C)`` as ``(N, C, H, W)``, a view."""
    return x.squeeze(-2).permute(0, 3, 1, 2)
