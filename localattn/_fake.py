"""Fake kernels: the shapes, dtypes and strides of the operators' results, for torch.compile and torch.export."""

from __future__ import annotations

import torch

from ._memory_order import empty_ordered_as


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
