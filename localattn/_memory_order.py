"""The memory order of results."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def empty_ordered_as(like: Tensor, channels: int, extents: Sequence[int] | None = None) -> Tensor:
    """An output for ``channels`` channels at ``extents`` (those of ``like`` unless told) in the memory order of ``like
    (batch, *spatial, heads, channels)``, as the binding's function of the same name allocates it."""
    batch, *spatial, heads, like_channels = like.shape
    rank = len(spatial)
    channels_first = like_channels > 1 and spatial[-1] > 1 and like.stride(-1) != 1 and like.stride(rank) == 1
    if extents is not None:
        spatial = list(extents)
    if channels_first:
        return like.new_empty((batch, heads, channels, *spatial)).permute(0, *range(3, rank + 3), 1, 2)
    return like.new_empty((batch, *spatial, heads, channels))
