"""The operators that the modules and the compatibility layers are built on: the fused ones, differentiable in forward
mode too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .ops import merge_attentions

__all__ = ["linear_attention", "local_attention", "merge_attentions", "routed_attention", "similarity", "weighting"]


def _with_forward_mode(fused: Callable, definition: Callable) -> Callable:
    """``fused``, but in forward-mode differentiation, which native operators cannot take part in, ``definition``,
    whose memory grows with the window."""

    @functools.wraps(fused)
    def operator(*arguments, **options):
        in_forward_mode = not torch.compiler.is_compiling() and _any_tangent((*arguments, *options.values()))
        return (definition if in_forward_mode else fused)(*arguments, **options)

    return operator


def _any_tangent(arguments: Iterable) -> bool:
    for argument in arguments:
        if isinstance(argument, (tuple, list)):
            if _any_tangent(argument):
                return True
        elif isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            return True
    return False


local_attention = _with_forward_mode(ops.local_attention, reference.local_attention)
linear_attention = _with_forward_mode(ops.linear_attention, reference.linear_attention)
routed_attention = _with_forward_mode(ops.routed_attention, reference.routed_attention)
similarity = _with_forward_mode(ops.similarity, reference.similarity)
weighting = _with_forward_mode(ops.weighting, reference.weighting)
