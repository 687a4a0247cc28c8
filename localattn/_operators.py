"""The operators that the modules and the compatibility layers are built on: fused where there is a kernel, else the
readable definition (the only place that knows which is which), and differentiable in forward mode too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .ops import merge_attentions
from .reference import linear_attention, routed_attention, similarity, weighting

__all__ = ["linear_attention", "local_attention", "merge_attentions", "routed_attention", "similarity", "weighting"]


def local_attention(query: Tensor, key: Tensor, value: Tensor, kernel_size, **options):
    """:func:`localattn.local_attention`. In forward-mode differentiation, which native operators cannot take part in,
    the readable definition: its memory grows with the window."""
    if _has_tangent(
        query, key, value, options.get("bias"), options.get("rel_pos_bias"), *(options.get("axis_bias") or ())
    ):
        return reference.local_attention(query, key, value, kernel_size, **options)
    return ops.local_attention(query, key, value, kernel_size, **options)


def _has_tangent(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
