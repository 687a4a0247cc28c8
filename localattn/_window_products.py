"""What torch needs to know of similarity, weighting and weighting_transpose: derivatives, of any order, as the three
are each other's; shapes for tracing; FLOPs; vmap."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._arguments import WindowOptions
from ._flops import _pairs, register_flop_formula
from ._memory_order import empty_ordered_as
from ._vmap import mapped_into_batch

_similarity = torch.ops.localattn.similarity
_weighting = torch.ops.localattn.weighting
_transpose = torch.ops.localattn.weighting_transpose


# ---- derivatives -----------------------------------------------------------------------------------------------------
# Each writes one of three tensors from the other two (at the queries, at the keys, one number per window entry), so its
# gradients are the other two operators.


def _save(window: slice, ctx, inputs, output) -> None:
    ctx.window = inputs[window]
    ctx.arguments = len(inputs)
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx, first, second) -> tuple[Tensor | None, ...]:
    needed = (compute() if need else None for need, compute in zip(ctx.needs_input_grad, (first, second)))
    return (*needed, *(None,) * (ctx.arguments - 2))


def _similarity_backward(ctx, grad: Tensor):
    query, key = ctx.saved_tensors
    return _gradients(
        ctx,
        lambda: _weighting(grad, key, *ctx.window),
        lambda: _transpose(grad, query, key.shape[1:-2], *ctx.window),
    )


def _weighting_backward(ctx, grad: Tensor):
    weights, value = ctx.saved_tensors
    return _gradients(
        ctx,
        lambda: _similarity(grad, value, *ctx.window, None, True),
        lambda: _transpose(weights, grad, value.shape[1:-2], *ctx.window),
    )


def _transpose_backward(ctx, grad: Tensor):
    weights, query = ctx.saved_tensors
    return _gradients(
        ctx,
        lambda: _similarity(query, grad, *ctx.window, None, True),
        lambda: _weighting(weights, grad, *ctx.window),
    )


for _name, _backward, _window in (
    ("similarity", _similarity_backward, slice(2, 8)),
    ("weighting", _weighting_backward, slice(2, 8)),
    ("weighting_transpose", _transpose_backward, slice(3, 9)),
):
    torch.library.register_autograd(f"localattn::{_name}", _backward, setup_context=functools.partial(_save, _window))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _window_entries(kernel_size, raster_causal: bool) -> int:
    entries = 1
    for kernel in kernel_size:
        entries *= kernel
    return entries // 2 + 1 if raster_causal else entries


@torch.library.register_fake("localattn::similarity")
def _fake_similarity(query, key, kernel_size, stride, dilation, is_causal, raster_causal, *_):
    return query.new_empty((*query.shape[:-1], _window_entries(kernel_size, raster_causal)))


@torch.library.register_fake("localattn::weighting")
def _fake_weighting(weights, value, *_):
    return empty_ordered_as(value, value.shape[-1], weights.shape[1:-2])


@torch.library.register_fake("localattn::weighting_transpose")
def _fake_transpose(weights, query, key_extent, *_):
    return empty_ordered_as(query, query.shape[-1], key_extent)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def _flops(at_queries, at_keys, channels: int, window) -> int:
    kernel_size, stride, dilation, is_causal, raster_causal, border = window
    options = WindowOptions(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal), raster_causal, border)
    pairs = _pairs(tuple(map(int, at_queries[1:-2])), tuple(map(int, at_keys)), options)
    return at_queries[0] * at_queries[-2] * pairs * 2 * channels


@register_flop_formula(_similarity)
def _similarity_flops(query, key, *window, out_shape=None, **_) -> int:
    return _flops(query, key[1:-2], query[-1], window[:6])


@register_flop_formula(_weighting)
def _weighting_flops(weights, value, *window, out_shape=None, **_) -> int:
    return _flops(weights, value[1:-2], value[-1], window[:6])


@register_flop_formula(_transpose)
def _transpose_flops(weights, query, key_extent, *window, out_shape=None, **_) -> int:
    return _flops(query, key_extent, query[-1], window[:6])


# ---- vmap ------------------------------------------------------------------------------------------------------------

if hasattr(torch.library, "register_vmap"):  # from torch 2.5 on
    for _operator in (_similarity, _weighting, _transpose):
        torch.library.register_vmap(_operator._qualified_op_name, functools.partial(mapped_into_batch, _operator))
