"""Channels-first maps as the operators take them, ``(batch, *spatial, heads, channels)``. All are views: the operators
read any strides, and answer a channels-first query with a channels-first result."""

from __future__ import annotations

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, heads * D, H, W)`` as ``(B, H, W, heads, D)``."""
    return x.unflatten(1, (heads, -1)).permute(0, 3, 4, 1, 2)


def join_heads(x: Tensor) -> Tensor:
    """``(B, H, W, heads, D)`` as ``(B, heads * D, H, W)``."""
    return x.permute(0, 3, 4, 1, 2).flatten(1, 2)
