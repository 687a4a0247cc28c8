"""Fake kernels: the shapes, dtypes and strides of the operators' results, for torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


@torch.library.register_fake("localattn::attention")
def _attention(query, key, value, *_options):
    accumulated = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_ordered_as(query, value.shape[-1]), query.new_empty(query.shape[:-1], dtype=accumulated)


@torch.library.register_fake("localattn::attention_backward")
def _attention_backward(grad_output, grad_lse, query, key, value, output, lse, *options):
    *_window_options, bias, rel_pos_bias, axis_bias_0, axis_bias_1, axis_bias_2, _key_mask, needs_gradient = options
    inputs = (query, key, value, bias, rel_pos_bias, axis_bias_0, axis_bias_1, axis_bias_2)
    gradients = []
    for index, (tensor, needed) in enumerate(zip(inputs, needs_gradient)):
        if tensor is None or not needed:
            gradients.append(query.new_empty(0))
        elif index < 3:
            gradients.append(empty_ordered_as(tensor, tensor.shape[-1]))
        else:
            gradients.append(query.new_empty(tensor.shape))
    return tuple(gradients)
