"""The switches of NATTEN's releases. They choose among kernels that do not exist here, so every one is accepted and
changes nothing; what they report is what is always so: fused, deterministic, memory strict."""

from __future__ import annotations

import torch


def _accept(*_args, **_kwargs) -> None:
    """Accepted, and without effect."""


def _true(*_args, **_kwargs) -> bool:
    return True


def _false(*_args, **_kwargs) -> bool:
    return False


# Both generations.
use_deterministic_algorithms = _accept
are_deterministic_algorithms_enabled = _true
use_kv_parallelism_in_fused_na = _accept
is_kv_parallelism_in_fused_na_enabled = _false
set_memory_usage_preference = _accept
is_memory_usage_default = _false
is_memory_usage_strict = _true
is_memory_usage_unrestricted = _false


def get_memory_usage_preference() -> str:
    return "strict"


# From 0.20 on.
allow_flex_compile = allow_flex_compile_backprop = _accept
disable_flex_compile = disable_flex_compile_backprop = _accept
is_flex_compile_allowed = is_flex_compile_backprop_allowed = _false

# Up to 0.17.
use_fna = use_fused_na = use_autotuner = disable_autotuner = _accept
use_flex_attention = force_flex_attention = _accept
use_tiled_na = enable_tiled_na = disable_tiled_na = _accept
use_gemm_na = enable_gemm_na = disable_gemm_na = _accept
use_tf32_in_gemm_na = enable_tf32 = disable_tf32 = _accept
is_fna_enabled = is_fused_na_enabled = has_fna = has_fused_na = _true
has_half = has_bfloat = _true
is_autotuner_enabled = is_autotuner_enabled_for_forward = is_autotuner_enabled_for_backward = _false
is_autotuner_thorough_for_forward = is_autotuner_thorough_for_backward = _false
is_tiled_na_enabled = is_gemm_na_enabled = is_tf32_in_gemm_na_enabled = _false
has_gemm = has_fp32_gemm = has_fp64_gemm = has_tf32_gemm = _false


def has_cuda(*_args) -> bool:
    return torch.cuda.is_available()
