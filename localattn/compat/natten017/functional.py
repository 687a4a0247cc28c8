"""The functions of NATTEN 0.17 and before. See :mod:`localattn.compat.natten017`.

``na*_qk`` and ``na*_av`` are unfused and heads first, ``(B, heads, *spatial, D)``; ``na*`` are fused and heads last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._arguments import Causal, IntOrTuple, ints_per_axis
from ...nn.neighborhood_attention import rel_pos_scores
from ...ops import local_attention, merge_attentions, similarity, weighting
from ..natten.functional import attend_to_all

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]


# ---- unfused, heads first --------------------------------------------------------------------------------------------


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Scores on signals, ``(B, heads, L, D)``. See :func:`na2d_qk`."""
    return _qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """The unscaled scores of every query with its neighbours.

    Args:
        query: ``(B, heads, H, W, D)``.
        key: ``(B, heads, H, W, D)``.
        kernel_size: odd, one value or one per axis.
        dilation, is_causal: one value, or one per axis.
        additional_keys: ``(B, heads, n, D)``, extra tokens that every query is compared with.
        rpb: relative position bias ``(heads, 2 * kernel_size - 1 per axis)``, added to the neighbours' scores.

    Returns:
        ``(B, heads, H, W, prod(kernel_size) + n)``; -inf where the window has no neighbour.
    """
    return _qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    additional_keys: Tensor | None = None,
    is_causal: Causal | None = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """Scores on video, ``(B, heads, T, H, W, D)``. See :func:`na2d_qk`."""
    return _qk(3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    additional_values: Tensor | None = None,
    is_causal: Causal | None = False,
) -> Tensor:
    """Weighted sums on signals, ``(B, heads, L, D)``. See :func:`na2d_av`."""
    return _av(1, attn, value, kernel_size, dilation, additional_values, is_causal)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    additional_values: Tensor | None = None,
    is_causal: Causal | None = False,
) -> Tensor:
    """The sum of every query's neighbours, weighted by ``attn``.

    Args:
        attn: ``(B, heads, H, W, prod(kernel_size) + n)``.
        value: ``(B, heads, H, W, D)``.
        kernel_size, dilation, is_causal: as in :func:`na2d_qk`.
        additional_values: ``(B, heads, n, D)``.

    Returns:
        ``(B, heads, H, W, D)``.
    """
    return _av(2, attn, value, kernel_size, dilation, additional_values, is_causal)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    additional_values: Tensor | None = None,
    is_causal: Causal | None = False,
) -> Tensor:
    """Weighted sums on video, ``(B, heads, T, H, W, D)``. See :func:`na2d_av`."""
    return _av(3, attn, value, kernel_size, dilation, additional_values, is_causal)


def _qk(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb) -> Tensor:
    _check_rank("query", query, rank)
    _check_rank("key", key, rank)
    _odd_kernel(rank, kernel_size)
    window = _window(dilation, is_causal)
    scores = similarity(_heads_last(query), _heads_last(key), kernel_size, border="shift", **window)
    if rpb is not None:
        scores = scores + rel_pos_scores(rpb, query.shape[2:-1], kernel_size, **window)
    scores = _heads_first(scores)
    if additional_keys is not None:
        extra = query.flatten(2, -2) @ additional_keys.transpose(-1, -2)
        scores = torch.cat((scores, extra.unflatten(2, query.shape[2:-1])), dim=-1)
    return scores


def _av(rank, attn, value, kernel_size, dilation, additional_values, is_causal) -> Tensor:
    _check_rank("attn", attn, rank)
    _check_rank("value", value, rank)
    entries = math.prod(_odd_kernel(rank, kernel_size))
    extra_count = 0 if additional_values is None else additional_values.shape[2]
    if attn.shape[-1] != entries + extra_count:
        raise ValueError(
            f"attn must have {entries} weights per query for its neighbours and {extra_count} for additional values, "
            f"got {attn.shape[-1]}"
        )
    near = _heads_last(attn[..., :entries])
    output = weighting(near, _heads_last(value), kernel_size, border="shift", **_window(dilation, is_causal))
    output = _heads_first(output)
    if additional_values is not None:
        extra = attn[..., entries:].flatten(2, -2) @ additional_values
        output = output + extra.unflatten(2, attn.shape[2:-1])
    return output


def _odd_kernel(rank: int, kernel_size: IntOrTuple) -> tuple[int, ...]:
    # Code written for these releases, their own tests among it, relies on the refusal.
    kernels = ints_per_axis("kernel_size", kernel_size, rank)
    if any(kernel % 2 == 0 for kernel in kernels):
        raise ValueError(
            f"kernel_size must be odd in the unfused calls of NATTEN 0.17, got {kernel_size}; its fused calls and "
            "localattn.similarity and localattn.weighting take even ones"
        )
    return kernels


def _window(dilation, is_causal) -> dict:
    return {
        "dilation": 1 if dilation is None else dilation,
        "is_causal": False if is_causal is None else is_causal,
    }


def _check_rank(name: str, x: Tensor, rank: int) -> None:
    if x.dim() != rank + 3:
        axes = "one spatial axis" if rank == 1 else f"{rank} spatial axes"
        raise ValueError(f"{name} must be (batch, heads, {axes}, channels), got shape {tuple(x.shape)}")


def _heads_last(x: Tensor) -> Tensor:
    return x.movedim(1, -2)


def _heads_first(x: Tensor) -> Tensor:
    return x.movedim(-2, 1)


# ---- fused, heads last -----------------------------------------------------------------------------------------------


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    is_causal: Causal | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict | None = None,
) -> Tensor:
    """Neighbourhood attention on signals, ``(B, L, heads, D)``. See :func:`na2d`."""
    return _fused(
        1, query, key, value, kernel_size, dilation, is_causal, rpb, scale, additional_keys, additional_values
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    is_causal: Causal | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict | None = None,
) -> Tensor:
    """Neighbourhood attention, fused.

    Args:
        query: ``(B, H, W, heads, D)``.
        key: ``(B, H, W, heads, D)``.
        value: ``(B, H, W, heads, Dv)``.
        kernel_size, dilation, is_causal: one value, or one per axis.
        rpb: relative position bias ``(heads, 2 * kernel_size - 1 per axis)``.
        scale: None is ``D ** -0.5``; 0 means 0.
        additional_keys: ``(B, n, heads, D)``, extra tokens every query attends to in the same softmax.
        additional_values: ``(B, n, heads, Dv)``.
        xformers_kwargs: accepted and ignored.

    Returns:
        ``(B, H, W, heads, Dv)``.
    """
    return _fused(
        2, query, key, value, kernel_size, dilation, is_causal, rpb, scale, additional_keys, additional_values
    )


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple = 1,
    is_causal: Causal | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict | None = None,
) -> Tensor:
    """Neighbourhood attention on video, ``(B, T, H, W, heads, D)``. See :func:`na2d`."""
    return _fused(
        3, query, key, value, kernel_size, dilation, is_causal, rpb, scale, additional_keys, additional_values
    )


def _fused(
    rank, query, key, value, kernel_size, dilation, is_causal, rpb, scale, additional_keys, additional_values
) -> Tensor:
    if query.dim() != rank + 3:
        axes = "one spatial axis" if rank == 1 else f"{rank} spatial axes"
        raise ValueError(f"query must be (batch, {axes}, heads, channels), got shape {tuple(query.shape)}")
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given both or neither")
    near = local_attention(
        query,
        key,
        value,
        kernel_size,
        border="shift",
        scale=scale,
        rel_pos_bias=rpb,
        return_lse=additional_keys is not None,
        **_window(dilation, is_causal),
    )
    if additional_keys is None:
        return near
    extra = attend_to_all(query, additional_keys, additional_values, scale)
    return merge_attentions([near[0], extra[0]], [near[1], extra[1]])[0]


# ---- names of releases up to 0.15 ------------------------------------------------------------------------------------


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """:func:`na1d_qk` with its bias in third place."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """:func:`na2d_qk` with its bias in third place."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    """:func:`na3d_qk` with its bias in third place, and one window for time and one for both other axes."""
    return na3d_qk(query, key, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation), rpb=rpb)


def natten3dqk(
    query: Tensor, key: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """:func:`natten3dqkrpb` without a bias."""
    return natten3dqkrpb(query, key, None, kernel_size_d, kernel_size, dilation_d, dilation)


def natten3dav(
    attn: Tensor, value: Tensor, kernel_size_d: int, kernel_size: int, dilation_d: int, dilation: int
) -> Tensor:
    """:func:`na3d_av` with one window for time and one for both other axes."""
    return na3d_av(attn, value, (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation))


natten1dqk, natten2dqk = na1d_qk, na2d_qk
natten1dav, natten2dav = na1d_av, na2d_av
