"""FLOP formulas for torch.utils.flop_counter.FlopCounterMode.

Counted are the pairs of a query and a key inside its window, exactly, at the map's edges too: ``2 * channels`` for the
score and ``2 * value_channels`` for the weighted sum. The softmax counts nothing, as in torch's own formulas, nor do
the zeros outside the map; a key mask, whose contents a formula cannot see, saves nothing. The backward counts 2.5 times
the forward: five products to its two, as torch counts them for scaled_dot_product_attention.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import _disable_current_modes

from . import reference
from ._arguments import WindowOptions


def register_flop_formula(operator):
    """torch.utils.flop_counter's, and a cure for torch 2.4, which registers what its own counter does not look up."""

    def register(formula):
        flop_counter.register_flop_formula(operator)(formula)
        flop_counter.flop_registry.setdefault(operator, flop_counter.flop_registry.get(operator.default))
        return formula

    return register


@functools.lru_cache(maxsize=256)
def _pairs(query_extent: tuple[int, ...], key_extent: tuple[int, ...], options: WindowOptions) -> int:
    """Pairs of a query and a key in its window, over the whole map."""
    cpu = torch.device("cpu")
    with _disable_current_modes():
        if options.raster_causal:  # does not split into axes
            return int(reference.windows(query_extent, key_extent, options, cpu).inside.sum())
        axes = zip(query_extent, key_extent, *options[:4])
        return math.prod(int(reference.axis_windows(*axis, options.border, cpu).inside.sum()) for axis in axes)


def _attention_flops(query, key, value, options) -> int:
    kernel_size, stride, dilation, is_causal, raster_causal, border = options
    window = WindowOptions(tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal), raster_causal, border)
    batch, *query_extent, heads, channels = query
    pairs = _pairs(tuple(map(int, query_extent)), tuple(map(int, key[1:-2])), window)
    return batch * heads * pairs * 2 * (channels + value[-1])


@register_flop_formula(torch.ops.localattn.attention)
def _forward(query, key, value, *options, out_shape=None, **_) -> int:
    return _attention_flops(query, key, value, options[:6])


@register_flop_formula(torch.ops.localattn.attention_backward)
def _backward(grad_output, grad_lse, query, key, value, output, lse, *options, out_shape=None, **_) -> int:
    return _attention_flops(query, key, value, options[:6]) * 5 // 2
