"""Bi-level routing attention: each region of the map picks the few regions its pixels attend to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import routed_attention
from ._layout import join_heads, split_heads
from ._pointwise import PointwiseConv2d, project_in_parts

KV_DOWNSAMPLE_MODES = ("identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool")


def cut_regions(x: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """``(B, H, W, ...)`` as ``(B, rows, columns, H / rows, W / columns, ...)``, a view; as many columns as rows unless
    told."""
    return x.unflatten(2, (columns or rows, -1)).unflatten(1, (rows, -1)).transpose(2, 3)


def attention_matrix(query: Tensor, key: Tensor, index: Tensor, weight: Tensor | None, scale: float, *grid: int):
    """The weights that routed attention never forms, ``(B, R, heads, pixels, topk * tokens)``, from maps ``(B, H, W,
    heads, D)`` of ``grid`` regions and their routing ``(B, R, topk)``."""
    queries, keys = (
        cut_regions(x, *grid).flatten(3, 4).flatten(1, 2) for x in (query, key)
    )  # (B, R, pixels, heads, D)
    batch = torch.arange(query.shape[0], device=query.device)[:, None, None]
    routed = keys[batch, index]  # (B, R, topk, tokens, heads, D)
    if weight is not None:
        routed = routed * weight[..., None, None, None]
    return torch.einsum("brphd,brthd->brhpt", queries * scale, routed.flatten(2, 3)).softmax(-1)


class QKVLinear(nn.Module):
    def __init__(self, dim: int, qk_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.qk_dim = qk_dim
        self.dim = dim
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return project_in_parts(
            self.qkv, x, lambda joint, dim: joint.split((self.qk_dim, self.qk_dim, self.dim), dim), -1
        )


class TopkRouting(nn.Module):
    """For every region the ``topk`` regions whose mean key answers its mean query best, and their softmax."""

    def __init__(
        self, qk_dim: int, topk: int, scale: float, param_routing: bool, diff_routing: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.topk = topk
        self.scale = scale
        self.diff_routing = diff_routing
        self.emb = nn.Linear(qk_dim, qk_dim, device=device, dtype=dtype) if param_routing else nn.Identity()

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Region means ``(B, R, qk_dim)`` to weights and indices ``(B, R, topk)``, best first."""
        if not self.diff_routing:
            query, key = query.detach(), key.detach()
        logits = (self.emb(query) * self.scale) @ self.emb(key).transpose(-2, -1)
        best, index = torch.topk(logits, self.topk, dim=-1)
        return best.softmax(-1), index


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention (Zhu et al., 2023, https://arxiv.org/abs/2303.08810), channels last, with BiFormer's
    signature and parameters.

    The map is cut into ``n_win x n_win`` regions. Each region takes the ``topk`` regions whose mean key answers its
    mean query best, and its pixels attend to all pixels of those. Here the routed regions are read in place: neither
    the gathered keys and values nor the attention matrix is formed, and the gradient is deterministic.

    Differs from the original: contradictory options are refused at construction, with what to change.

    Args:
        dim: channels of input and output.
        num_heads: attention heads, dividing ``dim`` and ``qk_dim``.
        n_win: regions per axis.
        qk_dim: channels of query and key; None is ``dim``.
        qk_scale: factor on the scores; None (or 0) is ``qk_dim ** -0.5``, of all heads together.
        kv_per_win: tokens per axis that a region's keys and values are pooled to, in the modes "ada_avgpool" and
            "ada_maxpool".
        kv_downsample_ratio: pixels per axis pooled to one in the modes "avgpool" and "maxpool".
        kv_downsample_kernel: not used, as in the original.
        kv_downsample_mode: "identity", "ada_avgpool", "ada_maxpool", "avgpool" or "maxpool".
        topk: regions that a region attends to, at most ``n_win ** 2``.
        param_attention: "qkvo", or "qkv" for no output projection.
        param_routing: whether region means pass a learned layer before they are compared; needs ``diff_routing``.
        diff_routing: whether gradients flow through the choice's weights; needs ``soft_routing``.
        soft_routing: whether the softmax of the regions' scores multiplies the routed keys and values.
        side_dwconv: kernel size of the depthwise convolution of the values that is added; odd, 0 for none.
        auto_pad: pad maps that ``n_win`` does not divide, at the right and bottom and before the projection, so that
            padding takes part as in the original.

    Shape:
        ``(B, H, W, dim)`` to the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "identity",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        qk_dim = qk_dim or dim
        if num_heads < 1 or dim % num_heads or qk_dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim} and qk_dim={qk_dim}, got num_heads={num_heads}")
        _check_routing(n_win, topk, side_dwconv, most_regions=n_win**2)
        if kv_downsample_mode not in KV_DOWNSAMPLE_MODES:
            raise ValueError(
                f"kv_downsample_mode must be one of {', '.join(map(repr, KV_DOWNSAMPLE_MODES))}, "
                f"got {kv_downsample_mode!r}"
            )
        if kv_downsample_mode.startswith("ada_") and kv_per_win < 1:
            raise ValueError(
                f"kv_downsample_mode={kv_downsample_mode!r} needs kv_per_win of at least 1, got {kv_per_win}"
            )
        if kv_downsample_mode in ("avgpool", "maxpool") and kv_downsample_ratio < 1:
            raise ValueError(
                f"kv_downsample_mode={kv_downsample_mode!r} needs kv_downsample_ratio of at least 1, "
                f"got {kv_downsample_ratio}"
            )
        if param_attention not in ("qkvo", "qkv"):
            raise ValueError(f"param_attention must be 'qkvo' or 'qkv', got {param_attention!r}")
        if param_routing and not diff_routing:
            raise ValueError(
                "param_routing=True needs diff_routing=True: the router's layer gets no gradient otherwise"
            )
        if diff_routing and not soft_routing:
            raise ValueError(
                "diff_routing=True needs soft_routing=True: the routing's weights reach the result only through it"
            )
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.n_win = n_win
        self.qk_dim = qk_dim
        self.scale = qk_scale or qk_dim**-0.5
        self.topk = topk
        self.soft_routing = soft_routing
        self.auto_pad = auto_pad
        self.kv_downsample_mode = kv_downsample_mode
        self.kv_per_win = kv_per_win
        self.kv_downsample_ratio = kv_downsample_ratio
        self.lepe = _depthwise(dim, side_dwconv, **factory) if side_dwconv else None
        self.router = TopkRouting(qk_dim, topk, self.scale, param_routing, diff_routing, **factory)
        self.qkv = QKVLinear(dim, qk_dim, **factory)
        self.wo = nn.Linear(dim, dim, **factory) if param_attention == "qkvo" else nn.Identity()

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            x: ``(B, H, W, dim)``.
            ret_attn_mask: return also the routing's weights and indices ``(B, n_win ** 2, topk)`` and the attention
                matrix ``(B * n_win ** 2, num_heads, pixels of a region, topk * tokens of a region)``, which is
                computed for the purpose and takes the memory that this module otherwise saves.
        """
        if x.dim() != 4 or x.shape[-1] != self.dim:
            raise ValueError(
                f"BiLevelRoutingAttention takes (batch, height, width, {self.dim}), got shape {tuple(x.shape)}"
            )
        height, width = x.shape[1:3]
        below, right = -height % self.n_win, -width % self.n_win
        if below or right:
            if not self.auto_pad:
                raise ValueError(
                    f"height and width must be multiples of n_win={self.n_win}, got {height} x {width}: resize the "
                    "input, change n_win or set auto_pad=True"
                )
            x = F.pad(x, (0, 0, 0, right, 0, below))
        query, key, value = self.qkv(x)
        region_size = (x.shape[1] // self.n_win, x.shape[2] // self.n_win)

        weight, index = self.router(self._region_means(query), self._region_means(key))
        query = query.unflatten(-1, (self.num_heads, -1))
        kv_key = self._downsample(key).unflatten(-1, (self.num_heads, -1))
        kv_value = self._downsample(value).unflatten(-1, (self.num_heads, -1))
        region_weight = weight if self.soft_routing else None
        attended = routed_attention(
            query,
            kv_key,
            kv_value,
            index,
            region_size,
            kv_region_size=(kv_key.shape[1] // self.n_win, kv_key.shape[2] // self.n_win),
            region_weight=region_weight,
            scale=self.scale,
        ).flatten(-2)
        if self.lepe is not None:
            beside = self.lepe(value.permute(0, 3, 1, 2))
            attended = beside.add_(attended.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        output = self.wo(attended)[:, :height, :width]
        if not ret_attn_mask:
            return output
        attention = attention_matrix(query, kv_key, index, region_weight, self.scale, self.n_win)
        return output, weight, index, attention.flatten(0, 1)

    def _region_means(self, x: Tensor) -> Tensor:
        # Rows of pixels first: whole lines of memory are added up.
        return x.unflatten(1, (self.n_win, -1)).mean(2).unflatten(2, (self.n_win, -1)).mean(3).flatten(1, 2)

    def _downsample(self, x: Tensor) -> Tensor:
        """``(B, H, W, channels)`` with every region pooled on its own."""
        if self.kv_downsample_mode == "identity":
            return x
        regions = cut_regions(x, self.n_win).flatten(0, 2).permute(0, 3, 1, 2)
        if self.kv_downsample_mode.startswith("ada_"):
            pool = F.adaptive_avg_pool2d if self.kv_downsample_mode == "ada_avgpool" else F.adaptive_max_pool2d
            pooled = pool(regions, self.kv_per_win)
        else:
            if min(regions.shape[2:]) < self.kv_downsample_ratio:
                raise ValueError(
                    f"kv_downsample_ratio={self.kv_downsample_ratio} is larger than a region of "
                    f"{regions.shape[2]} x {regions.shape[3]} pixels: lower it, or n_win={self.n_win}"
                )
            pool = F.avg_pool2d if self.kv_downsample_mode == "avgpool" else F.max_pool2d
            pooled = pool(regions, self.kv_downsample_ratio)
        pooled = pooled.permute(0, 2, 3, 1).unflatten(0, (x.shape[0], self.n_win, self.n_win))
        return pooled.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, "
            f"kv_downsample_mode={self.kv_downsample_mode!r}, soft_routing={self.soft_routing}"
        )


class nchwBRA(nn.Module):
    """Bi-level routing attention, channels first: BiFormer's later formulation, with its signature and parameters.

    As :class:`BiLevelRoutingAttention` with its keys and values at full size and hard routing. Regions are of
    ``H // n_win`` by ``W // n_win`` pixels; a map they do not divide is padded with zeros after the projection, which
    take part, and has more regions than ``n_win ** 2``.

    Differs from the original: sizes and options that it fails on are refused with a sentence.

    Args:
        dim: channels of input and output.
        num_heads: attention heads, dividing ``dim``.
        n_win: regions per axis.
        qk_scale: factor on the scores; None (or 0) is ``dim ** -0.5``, of all heads together.
        topk: regions that a region attends to, at most as many as there are.
        side_dwconv: kernel size of the depthwise convolution of the values that is added; odd, 0 for none.
        auto_pad: not used, as in the original: padding is automatic.
        attn_backend: "torch", the original's only one.

    Shape:
        ``(B, dim, H, W)`` to the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_scale: float | None = None,
        topk: int = 4,
        side_dwconv: int = 3,
        auto_pad: bool = False,
        attn_backend: str = "torch",
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim}, got num_heads={num_heads}")
        _check_routing(n_win, topk, side_dwconv, most_regions=(2 * n_win - 1) ** 2)  # maps below 2 n_win pixels
        if attn_backend != "torch":
            raise ValueError(f"attn_backend must be 'torch', got {attn_backend!r}")
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.n_win = n_win
        self.scale = qk_scale or dim**-0.5
        self.topk = topk
        self.lepe = _depthwise(dim, side_dwconv, **factory) if side_dwconv else None
        self.qkv_linear = PointwiseConv2d(dim, 3 * dim, **factory)
        self.output_linear = PointwiseConv2d(dim, dim, **factory)

    def forward(self, x: Tensor, ret_attn_mask: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """
        Args:
            x: ``(B, dim, H, W)``.
            ret_attn_mask: return also the attention matrix ``(B, num_heads, regions, pixels of a region, topk * pixels
                of a region)``, which is computed for the purpose and takes the memory that this module otherwise saves.
        """
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"nchwBRA takes (batch, {self.dim}, height, width), got shape {tuple(x.shape)}")
        height, width = x.shape[2:]
        if min(height, width) < self.n_win:
            raise ValueError(f"height and width must be at least n_win={self.n_win}, got {height} x {width}")
        region_size = (height // self.n_win, width // self.n_win)
        grid = tuple(-(-length // pixels) for length, pixels in zip((height, width), region_size))
        if self.topk > grid[0] * grid[1]:
            raise ValueError(
                f"topk={self.topk} is more than the {grid[0]} x {grid[1]} regions of {region_size[0]} x "
                f"{region_size[1]} pixels that n_win={self.n_win} cuts {height} x {width} into: lower it"
            )
        query, key, value = project_in_parts(self.qkv_linear, x, lambda joint, dim: joint.chunk(3, dim), 1)

        means = [
            F.avg_pool2d(part.detach(), region_size, ceil_mode=True, count_include_pad=False).flatten(2)
            for part in (query, key)
        ]
        index = torch.topk(means[0].transpose(1, 2) @ means[1], self.topk, dim=-1).indices

        below, right = -height % region_size[0], -width % region_size[1]
        padded = [F.pad(part, (0, right, 0, below)) if below or right else part for part in (query, key, value)]
        maps = [split_heads(part, self.num_heads) for part in padded]
        attended = join_heads(routed_attention(*maps, index, region_size, scale=self.scale))[:, :, :height, :width]
        if self.lepe is not None:
            attended = self.lepe(value).add_(attended)
        output = self.output_linear(attended)
        if not ret_attn_mask:
            return output
        return output, attention_matrix(*maps[:2], index, None, self.scale, *grid).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}"


def _check_routing(n_win: int, topk: int, side_dwconv: int, most_regions: int) -> None:
    if n_win < 1:
        raise ValueError(f"n_win must be at least 1, got {n_win}")
    if not 1 <= topk <= most_regions:
        raise ValueError(f"topk must be between 1 and the {most_regions} regions of n_win={n_win}, got {topk}")
    if side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
        raise ValueError(f"side_dwconv must be odd, or 0 for none, got {side_dwconv}")


def _depthwise(dim: int, kernel_size: int, **factory) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, **factory)
