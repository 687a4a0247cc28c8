"""Image local attention: every pixel attends to the window of pixels around it."""

from __future__ import annotations

from torch import Tensor, nn

from .._arguments import Causal, IntOrTuple, window_options
from ..ops import local_attention
from ..reference import check_options
from ._layout import join_heads, split_heads


class LocalAttention(nn.Module):
    """Local self-attention on images with the signature and parameters of Image-Local-Attention
    (https://github.com/zzd1992/Image-Local-Attention).

    ``conv1``, ``conv2`` and ``conv3`` project the input to query, key and value; every pixel then attends to the
    ``kH x kW`` window around it. Scores are not scaled, and a pixel outside the image takes part with score 0 and
    value 0, as in the original. The window is never stored: memory does not grow with ``kH * kW``.

    Differs from the original: any layout, batch and dtype, even kernels, the CPU, second derivatives, and the options
    after ``kW``.

    Args:
        inp_channels: channels of the input.
        out_channels: channels of query, key, value and the output.
        kH: height of the window.
        kW: width of the window.
        heads: attention heads, dividing ``out_channels``.
        border: "zero" (the original), "mask" (pixels outside the image are left out) or "shift" (the window moves
            inside the image).
        is_causal: per axis, or "raster": only pixels before this one in raster order, and itself.
        stride: pixels per axis that share one window.
        dilation: distance per axis between the window's pixels.
        scale: factor on the scores; None is ``(out_channels / heads) ** -0.5``.

    Shape:
        ``(B, inp_channels, H, W)`` to ``(B, out_channels, H, W)``.
    """

    def __init__(
        self,
        inp_channels: int,
        out_channels: int,
        kH: int,
        kW: int,
        *,
        heads: int = 1,
        border: str = "zero",
        is_causal: Causal = False,
        stride: IntOrTuple = 1,
        dilation: IntOrTuple = 1,
        scale: float | None = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if heads < 1 or out_channels < 1 or out_channels % heads:
            raise ValueError(f"heads must divide out_channels={out_channels}, got heads={heads}")
        check_options(window_options(2, (kH, kW), stride, dilation, is_causal, border))
        self.kernel_size = (kH, kW)
        self.heads = heads
        self.border = border
        self.is_causal = is_causal
        self.stride = stride
        self.dilation = dilation
        self.scale = scale
        self.conv1 = nn.Conv2d(inp_channels, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.conv2 = nn.Conv2d(inp_channels, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.conv3 = nn.Conv2d(inp_channels, out_channels, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"LocalAttention takes (batch, channels, height, width), got shape {tuple(x.shape)}")
        query, key, value = (split_heads(conv(x), self.heads) for conv in (self.conv1, self.conv2, self.conv3))
        output = local_attention(
            query,
            key,
            value,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            border=self.border,
            scale=self.scale,
        )
        return join_heads(output)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, heads={self.heads}, border={self.border!r}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal!r}, scale={self.scale}"
        )
