"""What torch needs to know of routed_attention: derivatives (the first fused, higher ones through the readable
definition, which gathers keys and values), shapes for tracing, FLOPs, vmap."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _autocast, reference
from ._differentiable import differentiable
from ._flops import register_flop_formula
from ._memory_order import empty_ordered_as
from ._vmap import mapped_into_batch

# Positions in the schemas.
FORWARD_DIFFERENTIABLE = (0, 1, 2, 6)  # query, key, value, region_weight
BACKWARD_DIFFERENTIABLE = (0, 1, 2, 3, 4, 10)  # grad_output, grad_lse, and the same


def _save(ctx, inputs, output) -> None:
    query, key, value, index, region_size, kv_region_size, weight, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.sizes, ctx.scale = (region_size, kv_region_size), scale
    ctx.save_for_backward(query, key, value, *output, index, weight)


def _gradients(ctx, grad_output: Tensor | None, grad_lse: Tensor | None):
    query, key, value, output, lse, index, weight = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needed = [ctx.needs_input_grad[i] for i in FORWARD_DIFFERENTIABLE]
    gradients = routed_attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, index, *ctx.sizes, weight, ctx.scale, needed
    )
    results: list[Tensor | None] = [None] * 8
    for position, need, gradient in zip(FORWARD_DIFFERENTIABLE, needed, gradients):
        if need:
            results[position] = gradient
    return tuple(results)


def _save_backward(ctx, inputs, output) -> None:
    grad_output, grad_lse, query, key, value, _, _, index, region_size, kv_region_size, weight, scale, needed = inputs
    ctx.sizes, ctx.scale, ctx.needed = (region_size, kv_region_size), scale, needed
    ctx.save_for_backward(grad_output, grad_lse, query, key, value, weight, index)


def _second_gradients(ctx, *grad_gradients: Tensor):
    """output and lse are functions of the other arguments, so what they contribute is in the others' gradients."""
    *saved, index = ctx.saved_tensors
    present = [i for i, tensor in enumerate(saved) if tensor is not None]

    def first_gradients(*tensors):
        arguments = dict(zip(present, tensors))
        return _first_gradients(*(arguments.get(i) for i in range(6)), index, ctx.sizes, ctx.scale)

    with _autocast.switched_off(saved[0].device):
        gradients, pullback = torch.func.vjp(first_gradients, *(saved[i] for i in present))
        wanted = (g if need else torch.zeros_like(x) for g, need, x in zip(grad_gradients, ctx.needed, gradients))
        second = dict(zip(present, pullback(tuple(wanted))))
    results: list[Tensor | None] = [None] * 13
    for i, position in enumerate(BACKWARD_DIFFERENTIABLE):
        if ctx.needs_input_grad[position]:
            results[position] = second.get(i)
    return tuple(results)


def _definition(
    query, key, value, index, region_size, kv_region_size, weight=None, scale=None
) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference.attend_to_regions(query, key, value, index, region_size, kv_region_size, weight, scale)


def _first_gradients(grad_output, grad_lse, query, key, value, weight, index, sizes, scale) -> tuple[Tensor, ...]:
    def forward(query, key, value, weight=None):
        return _definition(query, key, value, index, *sizes, weight, scale)

    (_, lse), pullback = torch.func.vjp(forward, *(x for x in (query, key, value, weight) if x is not None))
    return pullback((grad_output, torch.zeros_like(lse) if grad_lse is None else grad_lse))


def _backward_definition(
    grad_output, grad_lse, query, key, value, output, lse, index, region_size, kv_region_size, weight, scale, needed
) -> tuple[Tensor | None, ...]:
    sizes = region_size, kv_region_size
    gradients = _first_gradients(grad_output, grad_lse, query, key, value, weight, index, sizes, scale)
    return gradients if weight is not None else (*gradients, None)


routed_attention = differentiable(
    torch.ops.localattn.routed_attention, _save, _gradients, _definition, mapped_into_batch
)
routed_attention_backward = differentiable(
    torch.ops.localattn.routed_attention_backward,
    _save_backward,
    _second_gradients,
    _backward_definition,
    mapped_into_batch,
)


@torch.library.register_fake("localattn::routed_attention")
def _fake(query, key, value, *_):
    accumulated = torch.float64 if query.dtype == torch.float64 else torch.float32
    return empty_ordered_as(query, value.shape[-1]), query.new_empty(query.shape[:-1], dtype=accumulated)


@torch.library.register_fake("localattn::routed_attention_backward")
def _fake_backward(grad_output, grad_lse, query, key, value, output, lse, index, size, kv_size, weight, scale, needed):
    gradients = [
        empty_ordered_as(x, x.shape[-1]) if need else query.new_empty(0) for x, need in zip((query, key, value), needed)
    ]
    wanted = needed[3] and weight is not None
    return (*gradients, query.new_empty(weight.shape) if wanted else query.new_empty(0))


def _products(query, value, index, kv_size) -> int:
    pairs = query[0] * query[1] * query[2] * query[3] * index[2] * kv_size[0] * kv_size[1]
    return pairs * 2 * (query[-1] + value[-1])


@register_flop_formula(torch.ops.localattn.routed_attention)
def _flops(query, key, value, index, size, kv_size, *_, out_shape=None, **__) -> int:
    return _products(query, value, index, kv_size)


@register_flop_formula(torch.ops.localattn.routed_attention_backward)
def _backward_flops(
    grad_output, grad_lse, query, key, value, output, lse, index, size, kv_size, *_, out_shape=None, **__
):
    return _products(query, value, index, kv_size) * 5 // 2
