"""The calls of NATTEN 0.21 (https://github.com/SHI-Labs/NATTEN; Hassani et al., https://arxiv.org/abs/2204.07143,
https://arxiv.org/abs/2504.16922): ``na1d``, ``na2d``, ``na3d``, ``attention``, ``merge_attentions`` and the modules.

Differs from the original: windows beyond the map, queries and keys of different extent, every floating dtype on the
CPU, exact gradients through the log-sum-exp, second derivatives, forward-mode differentiation, ``scale=0``. Backends
and tuning arguments are accepted and ignored. Releases up to 0.17 are :mod:`localattn.compat.natten017`.
"""

from ...nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .._natten_settings import (
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_kv_parallelism_in_fused_na,
)
from . import functional
from .functional import attention, merge_attentions, na1d, na2d, na3d

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "functional",
    "get_memory_usage_preference",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]
