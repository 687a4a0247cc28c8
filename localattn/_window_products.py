"""What torch needs to know of similarity, weighting and weighting_transpose: derivatives, of any order, as the three
are each other's; shapes for tracing; FLOPs; vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from ._arguments import WindowOptions, window_keywords
from ._differentiable import differentiable
from ._flops import _pairs, register_flop_formula
from ._memory_order import empty_ordered_as
from ._vmap import mapped_into_batch

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
        lambda: weighting(grad, key, *ctx.window),
        lambda: weighting_transpose(grad, query, key.shape[1:-2], *ctx.window),
    )


def _weighting_backward(ctx, grad: Tensor):
    weights, value = ctx.saved_tensors
    return _gradients(
        ctx,
        lambda: similarity(grad, value, *ctx.window, None, True),
        lambda: weighting_transpose(weights, grad, value.shape[1:-2], *ctx.window),
    )


def _transpose_backward(ctx, grad: Tensor):
    weights, query = ctx.saved_tensors
    return _gradients(
        ctx,
        lambda: similarity(query, grad, *ctx.window, None, True),
        lambda: weighting(weights, grad, *ctx.window),
    )


def _similarity_definition(query, key, *options) -> Tensor:
    window, (fill, absent_is_zero) = options[:6], (*options[6:], False)[:2]
    scores = reference.similarity(query, key, **window_keywords(*window), fill=0.0 if absent_is_zero else fill)
    return torch.where(scores == -torch.inf, 0.0, scores) if absent_is_zero else scores


def _weighting_definition(weights, value, *window) -> Tensor:
    return reference.weighting(weights, value, **window_keywords(*window))


def _transpose_definition(weights, query, key_extent, *window) -> Tensor:
    value = query.new_zeros((query.shape[0], *key_extent, *query.shape[-2:]))
    _, pullback = torch.func.vjp(lambda value: _weighting_definition(weights, value, *window), value)
    return pullback(query)[0]


def _product(name: str, backward: Callable, definition: Callable, window: slice) -> Callable:
    setup_context = functools.partial(_save, window)
    return differentiable(getattr(torch.ops.localattn, name), setup_context, backward, definition, mapped_into_batch)


similarity = _product("similarity", _similarity_backward, _similarity_definition, slice(2, 8))
weighting = _product("weighting", _weighting_backward, _weighting_definition, slice(2, 8))
weighting_transpose = _product("weighting_transpose", _transpose_backward, _transpose_definition, slice(3, 9))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _window_entries(kernel_size, raster_causal: bool) -> int:
    entries = 1
    for kernel in kernel_size:
        entries *= kernel
    return entries // 2 + 1 if raster_causal else entries


@torch.library.register_fake("localattn::similarity")
def _fakesimilarity(query, key, kernel_size, stride, dilation, is_causal, raster_causal, *_):
    return query.new_empty((*query.shape[:-1], _window_entries(kernel_size, raster_causal)))


@torch.library.register_fake("localattn::weighting")
def _fakeweighting(weights, value, *_):
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


@register_flop_formula(torch.ops.localattn.similarity)
def _similarity_flops(query, key, *window, out_shape=None, **_) -> int:
    return _flops(query, key[1:-2], query[-1], window[:6])


@register_flop_formula(torch.ops.localattn.weighting)
def _weighting_flops(weights, value, *window, out_shape=None, **_) -> int:
    return _flops(weights, value[1:-2], value[-1], window[:6])


@register_flop_formula(torch.ops.localattn.weighting_transpose)
def _transpose_flops(weights, query, key_extent, *window, out_shape=None, **_) -> int:
    return _flops(query, key_extent, query[-1], window[:6])
