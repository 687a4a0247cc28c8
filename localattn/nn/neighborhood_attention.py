"""Neighbourhood attention: every token attends to its nearest neighbours, as many at the border as elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._arguments import Causal, IntOrTuple, window_options
from ..ops import local_attention, similarity, weighting
from ..reference import check_options, windows


def rel_pos_scores(
    rel_pos_bias: Tensor,
    extent: Sequence[int],
    kernel_size: IntOrTuple,
    *,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal = False,
) -> Tensor:
    """The entry of ``rel_pos_bias (heads, 2 * k - 1 per axis)`` for every query and window entry of a map of
    ``extent``: ``(*extent, heads, window)``. What the fused operator adds without forming it."""
    options = window_options(len(extent), kernel_size, stride, dilation, is_causal, "shift")
    table_shape = tuple(2 * kernel - 1 for kernel in options.kernel_size)
    if tuple(rel_pos_bias.shape[1:]) != table_shape:
        raise ValueError(f"rpb must be (heads, {', '.join(map(str, table_shape))}), got {tuple(rel_pos_bias.shape)}")
    offsets = windows(extent, extent, options, rel_pos_bias.device).offsets
    return rel_pos_bias[(slice(None), *offsets)].movedim(0, 1).unflatten(0, tuple(extent))


class _NeighborhoodAttention(nn.Module):
    rank: int

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: IntOrTuple | None = None,
        stride: IntOrTuple = 1,
        dilation: IntOrTuple = 1,
        is_causal: Causal = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        dim: int | None = None,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if (embed_dim is None) == (dim is None):
            raise TypeError(f"{name} needs either embed_dim or dim (its name up to NATTEN 0.17), one of the two")
        if num_heads is None or kernel_size is None:
            raise TypeError(f"{name} needs num_heads and kernel_size")
        embed_dim = dim if embed_dim is None else embed_dim
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim={embed_dim}, got num_heads={num_heads}")
        options = window_options(self.rank, kernel_size, stride, dilation, is_causal, "shift")
        check_options(options)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.kernel_size = options.kernel_size
        self.stride = options.stride
        self.dilation = options.dilation
        self.is_causal = options.is_causal
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias, device=device, dtype=dtype)
        if rel_pos_bias:
            table = [2 * kernel - 1 for kernel in self.kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *table, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            axes = ", ".join(("depth", "height", "width")[-self.rank :]) if self.rank > 1 else "length"
            raise ValueError(
                f"{type(self).__name__} takes (batch, {axes}, {self.embed_dim}), got shape {tuple(x.shape)}"
            )
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        attend = self._attend_with_dropout if self.training and self.attn_drop.p > 0 else self._attend
        return self.proj_drop(self.proj(attend(query, key, value).flatten(-2)))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_attention(
            query,
            key,
            value,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            border="shift",
            scale=self.scale,
            rel_pos_bias=self.rpb,
        )

    def _attend_with_dropout(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Dropout of single weights needs the weights themselves.
        window = {"stride": self.stride, "dilation": self.dilation, "is_causal": self.is_causal}
        scores = similarity(query * self.scale, key, self.kernel_size, border="shift", **window)
        if self.rpb is not None:
            scores = scores + rel_pos_scores(self.rpb, query.shape[1:-2], self.kernel_size, **window)
        weights = self.attn_drop(scores.softmax(-1))
        return weighting(weights, value, self.kernel_size, border="shift", **window)

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
        )


_DOC = """Neighbourhood attention on {maps} (Hassani et al., 2022, https://arxiv.org/abs/2204.07143; strides: 2025,
    https://arxiv.org/abs/2504.16922), for models of every NATTEN release.

    The names of both generations are accepted: ``embed_dim`` and ``stride`` of 0.20 and later, ``dim``,
    ``rel_pos_bias`` and ``attn_drop`` of releases up to 0.17 (whose positional order
    :mod:`localattn.compat.natten017` keeps). Parameters are ``qkv.*``, ``proj.*`` and ``rpb``.

    Differs from the original: maps smaller than the window, even kernels in every release's style, relative position
    bias with stride and causal axes, every dtype on the CPU, ``qk_scale=0`` means 0, second derivatives.

    Args:
        embed_dim: channels of input and output.
        num_heads: attention heads, dividing ``embed_dim``.
        kernel_size: tokens of the window, an int or one per axis.
        stride: tokens per axis that share one window, at most ``kernel_size``.
        dilation: distance per axis between the window's tokens.
        is_causal: per axis, whether tokens after this one are left out.
        qkv_bias: whether the projection to query, key and value has a bias.
        qk_scale: factor on the scores; None is ``(embed_dim / num_heads) ** -0.5``.
        proj_drop: dropout after the output projection.
        dim: another name of ``embed_dim``.
        rel_pos_bias: whether to learn ``rpb (num_heads, 2 * kernel_size - 1 per axis)``, added to the scores.
        attn_drop: dropout of the attention weights; above 0, training stores the weights of every window.

    Shape:
        ``(B, {shape}, embed_dim)`` to the same.
    """


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _DOC.format(maps="signals", shape="L")
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _DOC.format(maps="images", shape="H, W")
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _DOC.format(maps="video and volumes", shape="T, H, W")
    rank = 3
