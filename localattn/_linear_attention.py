"""What torch needs to know of linear_attention: derivatives (the first fused, higher ones through the readable
definition, whose memory grows with the number of pixels), shapes for tracing, FLOPs, vmap."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _autocast, reference
from ._differentiable import differentiable
from ._flops import register_flop_formula
from ._memory_order import empty_ordered_as
from ._vmap import mapped_unless_given


def _save(ctx, inputs, output) -> None:
    query, key, value, key_mask = inputs
    _, context, key_lse = output
    ctx.mark_non_differentiable(context, key_lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, context, key_lse, key_mask)


def _gradients(ctx, grad_output: Tensor | None, *_):
    if grad_output is None:
        return None, None, None, None
    needed = list(ctx.needs_input_grad[:3])
    gradients = linear_attention_backward(grad_output, *ctx.saved_tensors, needed)
    return (*(g if need else None for g, need in zip(gradients, needed)), None)


def _save_backward(ctx, inputs, output) -> None:
    ctx.needed = inputs[7]
    ctx.save_for_backward(*inputs[:4], inputs[6])


def _second_gradients(ctx, *grad_gradients: Tensor):
    """context and key_lse are functions of the other arguments, so what they contribute is in the others' gradients."""
    *tensors, key_mask = ctx.saved_tensors
    with _autocast.switched_off(tensors[0].device):
        gradients, pullback = torch.func.vjp(functools.partial(_first_gradients, key_mask), *tensors)
        wanted = (g if need else torch.zeros_like(x) for g, need, x in zip(grad_gradients, ctx.needed, gradients))
        second = pullback(tuple(wanted))
    return (*(g if need else None for g, need in zip(second, ctx.needs_input_grad)), None, None, None, None)


def _definition(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    key_mask = None if key_mask is None else key_mask.expand(value.shape[:-2])
    return reference.linear_attention(query, key, value, key_mask=key_mask)


def _first_gradients(key_mask: Tensor | None, grad_output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    _, pullback = torch.func.vjp(functools.partial(_definition, key_mask=key_mask), *inputs)
    return pullback(grad_output)


def _backward_definition(grad_output, query, key, value, context, key_lse, key_mask, needed) -> tuple[Tensor, ...]:
    return _first_gradients(key_mask, grad_output, query, key, value)


linear_attention = differentiable(
    torch.ops.localattn.linear_attention, _save, _gradients,
    lambda *inputs: (_definition(*inputs), None, None),  # the others are for the backward
    functools.partial(mapped_unless_given, (3,)),
)  # fmt: skip
linear_attention_backward = differentiable(
    torch.ops.localattn.linear_attention_backward, _save_backward, _second_gradients, _backward_definition,
    functools.partial(mapped_unless_given, (6,)),
)  # fmt: skip


@torch.library.register_fake("localattn::linear_attention")
def _fake(query, key, value, key_mask):
    accumulated = torch.float64 if query.dtype == torch.float64 else torch.float32
    per_head = (query.shape[0], query.shape[-2], query.shape[-1])
    return (
        empty_ordered_as(query, value.shape[-1]),
        query.new_empty((*per_head, value.shape[-1]), dtype=accumulated),
        query.new_empty(per_head, dtype=accumulated),
    )


@torch.library.register_fake("localattn::linear_attention_backward")
def _fake_backward(grad_output, query, key, value, context, key_lse, key_mask, needs_gradient):
    return tuple(
        empty_ordered_as(x, x.shape[-1]) if need else query.new_empty(0)
        for x, need in zip((query, key, value), needs_gradient)
    )


def _products(query, key, value) -> int:
    """FLOPs of one product of channels by value channels at every position of one of the maps, for each map."""
    per_position = query[0] * query[-2] * 2 * query[-1] * value[-1]
    pixels = [functools.reduce(lambda x, y: x * y, shape[1:-2], 1) for shape in (query, key)]
    return per_position * sum(pixels)


@register_flop_formula(torch.ops.localattn.linear_attention)
def _flops(query, key, value, *_, out_shape=None, **__) -> int:
    return _products(query, key, value)


@register_flop_formula(torch.ops.localattn.linear_attention_backward)
def _backward_flops(grad_output, query, key, value, *_, out_shape=None, **__) -> int:
    return 2 * _products(query, key, value)
