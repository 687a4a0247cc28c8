"""BiFormer: the block around bi-level routing attention, and the released models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import routed_attention
from .bilevel_routing_attention import BiLevelRoutingAttention


class DropPath(nn.Module):
    """In training, zeroes a residual branch for a random part of the batch (stochastic depth)."""

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        if self.drop == 1:
            return x * 0
        keep = 1 - self.drop
        return x * (x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep) / keep)


class FullAttention(nn.Module):
    """Attention of every pixel to every other, ``(B, H, W, dim)``; with ``lepe_kernel`` a depthwise convolution of the
    input is added before the output projection."""

    def __init__(self, dim: int, num_heads: int = 8, lepe_kernel: int = 0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"full attention has {num_heads} heads, so dim must be a multiple of it, got dim={dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim) if lepe_kernel else None

    def forward(self, x: Tensor) -> Tensor:
        attended = self._attend(*self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)).flatten(3)
        if self.lepe is not None:
            attended = attended + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(attended)

    @staticmethod
    def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of maps ``(B, H, W, heads, D)``. On CPUs, where it is 1.3 times as fast as PyTorch's and has every
        derivative, one region that is routed to itself."""
        size = query.shape[1:3]
        if query.device.type != "cuda":
            itself = torch.zeros(query.shape[0], 1, 1, dtype=torch.long, device=query.device)
            return routed_attention(query, key, value, itself, tuple(size))
        maps = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(*maps).transpose(1, 2).unflatten(1, size)


class ConvolutionAttention(nn.Sequential):
    """What stands in attention's place with ``topk=0``: convolutions on ``(B, H, W, dim)``."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            nn.Identity(),  # the released parameters are numbered from 1
            nn.Conv2d(dim, dim, 1),
            nn.Conv2d(dim, dim, 5, padding=2, groups=dim),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConvolution(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """BiFormer's block (Zhu et al., 2023, https://arxiv.org/abs/2303.08810) with its signature and parameters: a
    depthwise position convolution, attention and an MLP, each added to its input.

    Differs from the original: contradictory options are refused at construction, and ``before_attn_dwconv`` may be any
    odd size.

    Args:
        dim: channels of input and output.
        drop_path: probability of leaving a branch out, per sample, in training.
        layer_scale_init_value: above 0, both branches are multiplied by a learned vector that begins there.
        topk: above 0, :class:`BiLevelRoutingAttention` to that many regions; -1, full attention; -2, full attention
            and a depthwise convolution; 0, convolutions. Full attention always has 8 heads.
        mlp_ratio: width of the MLP's hidden layer for one of ``dim``.
        mlp_dwconv: whether the MLP has a depthwise convolution.
        side_dwconv: kernel size of the depthwise convolution beside attention; odd, 0 for none.
        before_attn_dwconv: kernel size of the position convolution; odd, 0 for none.
        pre_norm: normalise before the branches (True) or after the sums.
        num_heads, n_win, qk_dim, qk_scale, auto_pad: as in :class:`BiLevelRoutingAttention`, for ``topk`` above 0.
        kv_per_win, kv_downsample_ratio, kv_downsample_kernel, kv_downsample_mode: likewise.
        param_attention, param_routing, diff_routing, soft_routing: likewise.

    Shape:
        ``(B, dim, H, W)`` to the same.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float = -1,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "ada_avgpool",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        mlp_ratio: float = 4,
        mlp_dwconv: bool = False,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        pre_norm: bool = True,
        auto_pad: bool = False,
    ) -> None:
        super().__init__()
        for name, kernel in (("before_attn_dwconv", before_attn_dwconv), ("side_dwconv", side_dwconv)):
            if kernel < 0 or (kernel and kernel % 2 == 0):
                raise ValueError(f"{name} must be odd, or 0 for none, got {kernel}")
        self.pos_embed = None
        if before_attn_dwconv:
            self.pos_embed = nn.Conv2d(dim, dim, before_attn_dwconv, padding=before_attn_dwconv // 2, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn: nn.Module
        if topk > 0:
            self.attn = BiLevelRoutingAttention(
                dim,
                num_heads=num_heads,
                n_win=n_win,
                qk_dim=qk_dim,
                qk_scale=qk_scale,
                kv_per_win=kv_per_win,
                kv_downsample_ratio=kv_downsample_ratio,
                kv_downsample_kernel=kv_downsample_kernel,
                kv_downsample_mode=kv_downsample_mode,
                topk=topk,
                param_attention=param_attention,
                param_routing=param_routing,
                diff_routing=diff_routing,
                soft_routing=soft_routing,
                side_dwconv=side_dwconv,
                auto_pad=auto_pad,
            )
        elif topk == 0:
            self.attn = ConvolutionAttention(dim)
        elif topk in (-1, -2):
            self.attn = FullAttention(dim, lepe_kernel=side_dwconv if topk == -2 else 0)
        else:
            raise ValueError(
                f"topk must be above 0 (bi-level routing), 0 (convolutions), -1 or -2 (full attention), got {topk}"
            )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(mlp_ratio * dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            DepthwiseConvolution(hidden) if mlp_dwconv else nn.Identity(),
            nn.GELU(),
            nn.Linear(hidden, dim),
        )
        self.drop_path = DropPath(drop_path)
        self.pre_norm = pre_norm
        if layer_scale_init_value > 0:
            self.gamma1 = nn.Parameter(layer_scale_init_value * torch.ones(dim))
            self.gamma2 = nn.Parameter(layer_scale_init_value * torch.ones(dim))
        else:
            self.register_parameter("gamma1", None)
            self.register_parameter("gamma2", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = self._residual(x, self.attn, self.norm1, self.gamma1)
        x = self._residual(x, self.mlp, self.norm2, self.gamma2)
        return x.permute(0, 3, 1, 2)

    def _residual(self, x: Tensor, branch: nn.Module, norm: nn.Module, gamma: Tensor | None) -> Tensor:
        change = branch(norm(x) if self.pre_norm else x)
        if gamma is not None:
            change = gamma * change
        x = x + self.drop_path(change)
        return x if self.pre_norm else norm(x)


class BiFormer(nn.Module):
    """The released BiFormer image classifiers (Zhu et al., 2023, https://arxiv.org/abs/2303.08810), with their
    parameter names: four stages of :class:`Block`, the first after two strided convolutions, the others after one.

    Args:
        depth: blocks of each stage.
        embed_dim: channels of each stage.
        in_chans: channels of the image.
        num_classes: classes; 0 for no head.
        head_dim: channels of a head, dividing every stage's.
        topks: ``topk`` of each stage's blocks.
        n_win, side_dwconv, mlp_ratio, layer_scale_init_value, auto_pad, kv_downsample_mode: as in :class:`Block`.
        drop_path_rate: the last block's; the others' grow up to it linearly.

    Shape:
        ``(B, in_chans, H, W)`` to ``(B, num_classes)``, or ``(B, embed_dim[-1])`` without head. Without ``auto_pad``
        the maps of stages with bi-level routing, of 1/4, 1/8 and 1/16 the size, must be multiples of ``n_win``: H and
        W multiples of 112 for ``n_win=7``.
    """

    def __init__(
        self,
        depth: Sequence[int],
        embed_dim: Sequence[int],
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        head_dim: int = 32,
        topks: Sequence[int] = (1, 4, 16, -2),
        n_win: int = 7,
        side_dwconv: int = 5,
        mlp_ratio: float = 3,
        layer_scale_init_value: float = -1,
        drop_path_rate: float = 0.0,
        auto_pad: bool = False,
        kv_downsample_mode: str = "identity",
    ) -> None:
        super().__init__()
        if not len(depth) == len(embed_dim) == len(topks) == 4:
            raise ValueError(
                f"depth, embed_dim and topks need an entry for each of 4 stages, got {depth}, {embed_dim}, {topks}"
            )
        for channels in embed_dim:
            if channels % head_dim:
                raise ValueError(f"head_dim must divide every entry of embed_dim={tuple(embed_dim)}, got {head_dim}")
        self.downsample_layers = nn.ModuleList()
        self.downsample_layers.append(
            nn.Sequential(
                nn.Conv2d(in_chans, embed_dim[0] // 2, 3, stride=2, padding=1),
                nn.BatchNorm2d(embed_dim[0] // 2),
                nn.GELU(),
                nn.Conv2d(embed_dim[0] // 2, embed_dim[0], 3, stride=2, padding=1),
                nn.BatchNorm2d(embed_dim[0]),
            )
        )
        for before, after in itertools.pairwise(embed_dim):
            self.downsample_layers.append(
                nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after))
            )
        drops = (drop_path_rate * block / max(sum(depth) - 1, 1) for block in range(sum(depth)))
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(
                        channels,
                        drop_path=next(drops),
                        layer_scale_init_value=layer_scale_init_value,
                        num_heads=channels // head_dim,
                        n_win=n_win,
                        topk=topk,
                        kv_downsample_mode=kv_downsample_mode,
                        mlp_ratio=mlp_ratio,
                        side_dwconv=side_dwconv,
                        auto_pad=auto_pad,
                    )
                    for _ in range(blocks)
                )
            )
            for blocks, channels, topk in zip(depth, embed_dim, topks)
        )
        self.norm = nn.BatchNorm2d(embed_dim[-1])
        self.head = nn.Linear(embed_dim[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, in_chans, H, W)`` to the last stage's normalised map, ``(B, embed_dim[-1], H / 32, W / 32)``."""
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x).flatten(2).mean(-1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def biformer_tiny(**options) -> BiFormer:
    """BiFormer-T: depths 2, 2, 8, 2, widths 64 to 512. ``options`` are those of :class:`BiFormer`."""
    return BiFormer((2, 2, 8, 2), (64, 128, 256, 512), **options)


def biformer_small(**options) -> BiFormer:
    """BiFormer-S: depths 4, 4, 18, 4, widths 64 to 512. ``options`` are those of :class:`BiFormer`."""
    return BiFormer((4, 4, 18, 4), (64, 128, 256, 512), **options)


def biformer_base(**options) -> BiFormer:
    """BiFormer-B: depths 4, 4, 18, 4, widths 96 to 768. ``options`` are those of :class:`BiFormer`."""
    return BiFormer((4, 4, 18, 4), (96, 192, 384, 768), **options)
