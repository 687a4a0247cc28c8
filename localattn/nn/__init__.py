"""Modules with the signatures and parameter names of the published systems, on the fused operators."""

from .biformer import BiFormer, Block, biformer_base, biformer_small, biformer_tiny
from .bilevel_routing_attention import BiLevelRoutingAttention, nchwBRA
from .efficient_attention import EfficientAttention
from .halo_attention import HaloAttn
from .local_attention import LocalAttention
from .neighborhood_attention import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__all__ = [
    "BiFormer",
    "BiLevelRoutingAttention",
    "Block",
    "EfficientAttention",
    "HaloAttn",
    "LocalAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "biformer_base",
    "biformer_small",
    "biformer_tiny",
    "nchwBRA",
]
