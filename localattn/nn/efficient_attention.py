"""Attention whose cost grows linearly with the number of pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _autocast
from ..ops import linear_attention
from ._layout import join_heads, split_heads
from ._pointwise import PointwiseConv2d, only_multiplies


class EfficientAttention(nn.Module):
    """Efficient attention (Shen et al., 2018, https://arxiv.org/abs/1812.01243): the keys are normalised over
    positions, the queries over their channels, so that values are first summed into one small context per head.
    The input is added to the result. The authors advise ``key_channels = in_channels // 2``,
    ``value_channels = in_channels`` and one head.

    As all but the softmaxes is linear, what projects pixels in the original projects here the small context: values are
    summed up before ``values``, and ``reprojection`` follows before the queries do. The results are the same; neither
    values nor normalised keys are ever stored, nor what the heads give.

    Differs from the original: channels that the heads do not divide are refused, and the options after
    ``value_channels`` and of ``forward``.

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
        self.keys = PointwiseConv2d(context_channels, key_channels, device=device, dtype=dtype)
        self.queries = PointwiseConv2d(in_channels, key_channels, device=device, dtype=dtype)
        self.values = PointwiseConv2d(context_channels, value_channels, device=device, dtype=dtype)
        self.reprojection = PointwiseConv2d(value_channels, in_channels, device=device, dtype=dtype)

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
        query, key = self.queries(x).unflatten(1, (self.head_count, -1)), self.keys(context)
        maps = (query, key.unflatten(1, (self.head_count, -1))) if return_maps else ()
        if only_multiplies(self.values) and only_multiplies(self.reprojection):
            weights = query.softmax(2).flatten(1, 2).flatten(2)
            del query
            output = _add_product(x, self._project_context(key, context, key_mask), weights)
        else:
            query, key, value = (
                split_heads(part, self.head_count) for part in (query.flatten(1, 2), key, self.values(context))
            )
            output = self.reprojection(join_heads(linear_attention(query, key, value, key_mask=key_mask))) + x
        if not return_maps:
            return output
        return (output, *_maps(*maps, key_mask))

    def _project_context(self, key: Tensor, context: Tensor, key_mask: Tensor | None) -> Tensor:
        """What each channel of the queries contributes to the result, ``(B, in_channels, key_channels)``."""
        sums = _sum_up(split_heads(key, 1), split_heads(context, 1), key_mask).unflatten(1, (self.head_count, -1))
        values = self.values.weight.flatten(1).unflatten(0, (self.head_count, -1))
        summary = torch.einsum("bhkc,hvc->bhkv", sums, values) + self._value_bias(context, key_mask)
        reprojection = self.reprojection.weight.flatten(1).unflatten(1, (self.head_count, -1))
        projected = torch.einsum("bhkv,ohv->bohk", summary, reprojection)
        # The weights of a head's query sum to one, so that a bias may be added on this side of them.
        return (projected + (self.reprojection.bias / self.head_count)[:, None, None]).flatten(2)

    def _value_bias(self, context: Tensor, key_mask: Tensor | None) -> Tensor:
        """``(B or 1, head_count, 1, D)``: the values' bias, or nothing where no position takes part."""
        bias = self.values.bias.unflatten(0, (self.head_count, 1, -1))
        if context.shape[2:].numel() == 0:
            return bias * 0
        if key_mask is None:
            return bias
        return bias * key_mask.flatten(1).any(1)[:, None, None, None]

    def extra_repr(self) -> str:
        return f"head_count={self.head_count}"


def _one_hot(count: int, like: Tensor) -> Tensor:
    """``(count, count)`` whose softmax, along either axis, is the identity."""
    return torch.eye(count, device=like.device, dtype=like.dtype).log()


def _sum_up(key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """``key (B, H, W, 1, D)``, normalised over positions, times ``value (B, H, W, 1, C)``: ``(B, D, C)``. As linear
    attention, the result of a query for each of the D channels that looks at nothing else."""
    channels = key.shape[-1]
    query = _one_hot(channels, key)[:, None].expand(key.shape[0], 1, -1, -1, -1)
    return linear_attention(query, key, value, key_mask=key_mask)[:, 0, :, 0]


def _add_product(x: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
    """``x (B, C, H, W)`` plus ``matrix (B, C, D)`` times ``weights (B, D, H * W)``."""
    if _autocast.is_on(x.device):  # the product's dtype is another, the sum's is x's
        return (matrix @ weights).unflatten(2, x.shape[2:]) + x
    return torch.baddbmm(x.flatten(2), matrix, weights).unflatten(2, x.shape[2:])


def _maps(query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``query (B, heads, D, H, W)`` normalised over D, ``key (B, heads, D, Hk, Wk)`` over positions."""
    maps = key.flatten(3)
    if key_mask is None:
        maps = maps.softmax(3)
    else:
        left_out = ~key_mask.flatten(1)[:, None, None]
        maps = maps.masked_fill(left_out, float("-inf")).softmax(3).masked_fill(left_out, 0)
    return query.softmax(2), maps.unflatten(3, key.shape[3:])
