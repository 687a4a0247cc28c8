"""The calls of the fork of Image-Local-Attention that CogView2 and SwissArmyTransformer use
(https://github.com/Sleepychord/Image-Local-Attention): border -10000, causal windows, keys coarser than queries, and
a batch of keys shared by several queries.

Same names, positional arguments and results; differs from the fork as :mod:`.image_local_attention` from the original.

CogView2 attends to a 9x5 window of the fine map and a 5x5 window of a coarse one in a single softmax. With these calls
that takes both score tensors::

    fine = f_similar(query, key, 9, 5)                # (N, 60, 60, 45)
    coarse = f_similar(query, coarse_key, 5, 5)       # (N, 60, 60, 25), keys 20 x 20
    weights = torch.cat((fine, coarse), dim=-1).softmax(-1)
    output = f_weighting(value, weights[..., :45], 9, 5) + f_weighting(coarse_value, weights[..., 45:], 5, 5)

Fused, with neither of them, and the same numbers and gradients::

    def heads_last(x):                                # (N, C, H, W) -> (N, H, W, 1, C), a view
        return x.permute(0, 2, 3, 1).unsqueeze(-2)

    fine = localattn.local_attention(
        heads_last(query), heads_last(key), heads_last(value), (9, 5), scale=1.0, return_lse=True)
    coarse = localattn.local_attention(
        heads_last(query), heads_last(coarse_key), heads_last(coarse_value), (5, 5), scale=1.0, return_lse=True)
    output, _ = localattn.merge_attentions([fine[0], coarse[0]], [fine[1], coarse[1]])

and the form with ``casual_mask`` is ``is_causal="raster"``.
"""

from __future__ import annotations

from torch import Tensor

from .. import nn
from ..ops import similarity, weighting
from .image_local_attention import TorchLocalAttention, check_map, from_one_head, one_head

__all__ = ["LocalAttention", "TorchLocalAttention", "f_similar", "f_weighting"]

BORDER_SCORE = -10000.0


def f_similar(x_ori: Tensor, x_loc: Tensor, kH: int, kW: int, casual_mask: bool = False) -> Tensor:
    """The scores of every pixel of ``x_ori`` with the ``kH x kW`` pixels of ``x_loc`` around its place, unscaled.

    Args:
        x_ori: query, ``(N, C, ah * h, aw * w)``. Pixel ``(y, x)`` is at ``(y // ah, x // aw)`` of the keys.
        x_loc: key, ``(M, C, h, w)``. M divides N; query batch n uses key batch ``n // (N // M)``.
        casual_mask: only the first ``kH * kW // 2 + 1`` entries of the window, up to the pixel itself; odd kH and kW.

    Returns:
        ``(N, ah * h, aw * w, entries)``, -10000 where the window leaves the map.
    """
    check_map("x_ori", x_ori)
    check_map("x_loc", x_loc)
    if x_loc.shape[1] != x_ori.shape[1]:
        raise ValueError(f"x_loc must have the {x_ori.shape[1]} channels of x_ori, got {x_loc.shape[1]}")
    _check_resolution("x_ori", x_ori.shape[2:], "x_loc", x_loc.shape[2:])
    key = _expand_batch("x_loc", x_loc, x_ori.shape[0])
    window = {"border": "zero", "is_causal": "raster" if casual_mask else False}
    return similarity(one_head(x_ori), one_head(key), (kH, kW), fill=BORDER_SCORE, **window).squeeze(-2)


def f_weighting(x_ori: Tensor, x_weight: Tensor, kH: int, kW: int, casual_mask: bool = False) -> Tensor:
    """The sum of the ``kH x kW`` pixels of ``x_ori`` around every place, weighted by ``x_weight``.

    Args:
        x_ori: value, ``(M, C, h, w)``.
        x_weight: ``(N, ah * h, aw * w, entries)`` as :func:`f_similar` gives; what it holds for places outside the map
            counts for nothing. M divides N; weight batch n uses value batch ``n // (N // M)``.
        casual_mask: as in :func:`f_similar`.

    Returns:
        ``(N, C, ah * h, aw * w)``.
    """
    check_map("x_ori", x_ori)
    entries = kH * kW // 2 + 1 if casual_mask else kH * kW
    if x_weight.dim() != 4 or x_weight.shape[-1] != entries:
        raise ValueError(f"x_weight must be (batch, height, width, {entries}), got shape {tuple(x_weight.shape)}")
    _check_resolution("x_weight", x_weight.shape[1:3], "x_ori", x_ori.shape[2:])
    value = _expand_batch("x_ori", x_ori, x_weight.shape[0])
    window = {"border": "zero", "is_causal": "raster" if casual_mask else False}
    return from_one_head(weighting(x_weight.unsqueeze(-2), one_head(value), (kH, kW), **window))


class LocalAttention(nn.LocalAttention):
    """The original's module with the fork's border: a pixel outside the image is left out (its score of -10000 gives
    it the weight 0, as long as some score of the window is above -9800)."""

    def __init__(self, inp_channels: int, out_channels: int, kH: int, kW: int) -> None:
        super().__init__(inp_channels, out_channels, kH, kW, border="mask")


def _check_resolution(fine_name: str, fine, coarse_name: str, coarse) -> None:
    if any(f % c if c else f for f, c in zip(fine, coarse)):
        raise ValueError(
            f"{fine_name} must have a whole multiple of the {coarse[0]} x {coarse[1]} pixels of {coarse_name}, "
            f"got {fine[0]} x {fine[1]}; localattn.similarity and localattn.weighting take any ratio"
        )


def _expand_batch(name: str, x: Tensor, batch: int) -> Tensor:
    """Every entry of the batch repeated so that there are ``batch``."""
    if x.shape[0] == batch:
        return x
    if x.shape[0] == 0 or batch % x.shape[0]:
        raise ValueError(f"the batch of {name} must divide the queries' batch of {batch}, got {x.shape[0]}")
    return x.unsqueeze(1).expand(-1, batch // x.shape[0], -1, -1, -1).flatten(0, 1)
