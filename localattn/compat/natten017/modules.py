"""The modules of NATTEN 0.17, with that release's order of positional arguments."""

from __future__ import annotations

from ... import nn
from ..._arguments import Causal, IntOrTuple

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _Release017:
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: IntOrTuple,
        dilation: IntOrTuple = 1,
        is_causal: Causal = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
        **options,
    ) -> None:
        super().__init__(
            dim=dim,
            num_heads=num_heads,
            kernel_size=kernel_size,
            dilation=1 if dilation is None else dilation,
            is_causal=False if is_causal is None else is_causal,
            rel_pos_bias=rel_pos_bias,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **options,
        )


_DOC = """:class:`localattn.nn.{name}` with the positional order of NATTEN 0.17: ``dim, num_heads, kernel_size,
    dilation, is_causal, rel_pos_bias, qkv_bias, qk_scale, attn_drop, proj_drop``. ``use_experimental_ops`` is
    ignored."""


class NeighborhoodAttention1D(_Release017, nn.NeighborhoodAttention1D):
    __doc__ = _DOC.format(name="NeighborhoodAttention1D")


class NeighborhoodAttention2D(_Release017, nn.NeighborhoodAttention2D):
    __doc__ = _DOC.format(name="NeighborhoodAttention2D")


class NeighborhoodAttention3D(_Release017, nn.NeighborhoodAttention3D):
    __doc__ = _DOC.format(name="NeighborhoodAttention3D")
