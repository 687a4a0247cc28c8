"""Attention whose cost grows linearly with the number of pixels."""

from __future__ import annotations

from torch import Tensor, nn

from .._operators import linear_attention
from ._layout import join_heads, split_heads
from ._pointwise import PointwiseConv2d


class EfficientAttention(nn.Module):
    """Efficient attention (Shen et al., 2018, https://arxiv.org/abs/1812.01243): the keys are normalised over
    positions, the queries over their channels, so that values are first summed into one small context per head.
    The input is added to the result. The authors advise ``key_channels = in_channels // 2``,
    ``value_channels = in_channels`` and one head.

    Differs from the original: the normalised keys and queries are never stored, channels that the heads do not divide
    are refused, and the options after ``value_channels`` and of ``forward``.

    Args:
        in_channels: channels of input and output.
        key_channels: channels of keys and queries, a multiple of ``head_count``.
        head_count: attention heads.
        value_channels: channels of values, a multiple of ``head_count``.
        context_channels: channels of the map that keys and values come from; None is ``in_channels``.

    Shape:
        ``(B, in_channels, H, W)`` to the same; context ``(B, context_channels, Hk, Wk)``.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int = 2,
        head_count: int = 2,
        value_channels: int = 2,
        *,
        context_channels: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if head_count < 1:
            raise ValueError(f"head_count must be at least 1, got {head_count}")
        for name, channels in (("key_channels", key_channels), ("value_channels", value_channels)):
            if channels < 1 or channels % head_count:
                raise ValueError(f"{name} must be a multiple of head_count={head_count}, got {channels}")
        context_channels = in_channels if context_channels is None else context_channels
        self.in_channels = in_channels
        self.key_channels = key_channels
        self.head_count = head_count
        self.value_channels = value_channels
        self.keys = PointwiseConv2d(context_channels, key_channels, device, dtype)
        self.queries = PointwiseConv2d(in_channels, key_channels, device, dtype)
        self.values = PointwiseConv2d(context_channels, value_channels, device, dtype)
        self.reprojection = PointwiseConv2d(value_channels, in_channels, device, dtype)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None, return_maps: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: ``(B, in_channels, H, W)``.
            context: the map that keys and values come from, ``(B, context_channels, Hk, Wk)``; None is ``x``.
            key_mask: bool ``(B, Hk, Wk)``; False leaves a position (padding) out.
            return_maps: return also the normalised queries ``(B, head_count, D, H, W)`` and keys
                ``(B, head_count, D, Hk, Wk)``, with ``D = key_channels / head_count``: the attention of a pixel is
                the sum of the D maps of the keys, weighted by its query.
        """
        context = x if context is None else context
        query, key = split_heads(self.queries(x), self.head_count), split_heads(self.keys(context), self.head_count)
        value = split_heads(self.values(context), self.head_count)
        attended = join_heads(linear_attention(query, key, value, key_mask=key_mask))
        maps = _maps(query, key, key_mask) if return_maps else ()
        del query, key, value  # so that the output may take their memory
        output = self.reprojection(attended)
        output = output.add_(x) if output.dtype == x.dtype else output + x  # under autocast they differ
        return (output, *maps) if return_maps else output

    def extra_repr(self) -> str:
        return f"head_count={self.head_count}"


def _maps(query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    maps = key.flatten(1, 2)
    if key_mask is None:
        maps = maps.softmax(1)
    else:
        left_out = ~key_mask.flatten(1)[..., None, None]
        maps = maps.masked_fill(left_out, float("-inf")).softmax(1).masked_fill(left_out, 0)
    maps = maps.unflatten(1, key.shape[1:3])
    return query.softmax(-1).permute(0, 3, 4, 1, 2), maps.permute(0, 3, 4, 1, 2)
