"""The functions of NATTEN 0.21, heads last. See :mod:`localattn.compat.natten`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ..._arguments import Causal, IntOrTuple
from ...ops import local_attention

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    backend: str | None = None,
    q_tile_shape=None,
    kv_tile_shape=None,
    backward_q_tile_shape=None,
    backward_kv_tile_shape=None,
    backward_kv_splits=None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule=None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighbourhood attention on signals, ``(B, L, heads, D)``. See :func:`neighborhood_attention_generic`."""
    _check_rank("na1d", query, 1)
    return neighborhood_attention_generic(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values,
        return_lse=return_lse,
    )  # fmt: skip


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    backend: str | None = None,
    q_tile_shape=None,
    kv_tile_shape=None,
    backward_q_tile_shape=None,
    backward_kv_tile_shape=None,
    backward_kv_splits=None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule=None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighbourhood attention on images, ``(B, H, W, heads, D)``. See :func:`neighborhood_attention_generic`."""
    _check_rank("na2d", query, 2)
    return neighborhood_attention_generic(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values,
        return_lse=return_lse,
    )  # fmt: skip


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    backend: str | None = None,
    q_tile_shape=None,
    kv_tile_shape=None,
    backward_q_tile_shape=None,
    backward_kv_tile_shape=None,
    backward_kv_splits=None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule=None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighbourhood attention on video, ``(B, T, H, W, heads, D)``. See :func:`neighborhood_attention_generic`."""
    _check_rank("na3d", query, 3)
    return neighborhood_attention_generic(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values,
        return_lse=return_lse,
    )  # fmt: skip


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    *,
    return_lse: bool = False,
    **_tuning,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighbourhood attention on one to three spatial axes, taken from the shapes.

    Args:
        query: ``(B, *spatial, heads, D)``.
        key: ``(B, *spatial, heads, D)``; fewer heads are shared.
        value: ``(B, *spatial, heads, Dv)``.
        kernel_size, stride, dilation, is_causal: one value, or one per axis.
        scale: None is ``D ** -0.5``; 0 means 0.
        additional_keys: ``(B, n, heads, D)``, extra tokens every query attends to in the same softmax.
        additional_values: ``(B, n, heads, Dv)``.
        attention_kwargs: accepted and ignored, as are the backend, tile shapes and all else that tunes.
        return_lse: return also the log-sum-exp over neighbours and additional tokens; gradients flow through it.

    Returns:
        ``(B, *spatial, heads, Dv)``, and with ``return_lse`` ``(B, *spatial, heads)``.
    """
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given both or neither")
    window = {
        "stride": stride,
        "dilation": 1 if dilation is None else dilation,
        "is_causal": False if is_causal is None else is_causal,
        "border": "shift",
        "scale": scale,
        "enable_gqa": True,
    }
    if additional_keys is None:
        return local_attention(query, key, value, kernel_size, return_lse=return_lse, **window)
    near = local_attention(query, key, value, kernel_size, return_lse=True, **window)
    extra = attend_to_all(query, additional_keys, additional_values, scale)
    output, lse = ops.merge_attentions([near[0], extra[0]], [near[1], extra[1]])
    return (output, lse) if return_lse else output


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    **_tuning,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to every key, ``(B, L, heads, D)``; causal with equally many of both."""
    _check_rank("attention", query, 1)
    if is_causal and query.shape[1] != key.shape[1]:
        raise ValueError(f"is_causal needs as many keys as queries, got {key.shape[1]} and {query.shape[1]}")
    output, lse = attend_to_all(query, key, value, scale, is_causal)
    return (output, lse) if return_lse else output


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """One attention from attentions to parts of the keys, with exact gradients: :func:`localattn.merge_attentions`.
    The last two arguments are accepted and ignored."""
    return ops.merge_attentions(outputs, lse_tensors)


def attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries ``(B, *spatial, heads, D)`` that all attend to every key ``(B, n, heads, D)``:
    the window that is as long as the map."""
    rank = query.dim() - 3
    count = key.shape[1]
    if count == 0:
        lse_dtype = torch.promote_types(query.dtype, torch.float32)
        empty = query.new_zeros(*query.shape[:-1], value.shape[-1])
        return empty, query.new_full(query.shape[:-1], float("-inf"), dtype=lse_dtype)
    along_last_axis = (slice(None), *(None,) * (rank - 1))
    return local_attention(
        query,
        key[along_last_axis],
        value[along_last_axis],
        (*(1,) * (rank - 1), count),
        is_causal=is_causal,
        border="shift",
        scale=scale,
        enable_gqa=True,
        return_lse=True,
    )


def _check_rank(name: str, query: Tensor, rank: int) -> None:
    if query.dim() != rank + 3:
        axes = "one spatial axis" if rank == 1 else f"{rank} spatial axes"
        raise ValueError(f"{name} takes query as (batch, {axes}, heads, channels), got shape {tuple(query.shape)}")
