"""Local (sliding-window) attention on images, signals and video.

    localattn.local_attention(query, key, value, kernel_size=7)

Tensors are ``(batch, *spatial, heads, channels)``. The modules are in ``localattn.nn``, drop-in replacements for other
packages in ``localattn.compat``, and the readable definition of everything in ``localattn.reference``.
"""

from . import _distribution, compat, nn, reference
from .ops import (
    attention_variant,
    linear_attention,
    local_attention,
    merge_attentions,
    routed_attention,
    similarity,
    weighting,
)

__all__ = [
    "attention_variant",
    "compat",
    "linear_attention",
    "local_attention",
    "merge_attentions",
    "nn",
    "reference",
    "routed_attention",
    "similarity",
    "weighting",
]

__version__ = _distribution.version()
