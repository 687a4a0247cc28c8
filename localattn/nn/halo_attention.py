"""Blocked attention with a halo: the pixels of a block share one window, the block and a margin around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._halo_function import HaloAttention, HaloOptions, composed_halo_attention, position_logits
from ._pointwise import PointwiseConv2d, is_unchanged, only_multiplies, project_in_parts


def _rounded_to_eight(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and no more than 10% below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class RelativePositionLogits(nn.Module):
    """Per axis, what a query thinks of each offset inside its window: ``height_rel`` and ``width_rel``, each
    ``(2 * window - 1, channels)``, indexed by window entry - place in the block + window - 1."""

    def __init__(self, block_size: int, window: int, channels: int, scale: float, device=None, dtype=None) -> None:
        super().__init__()
        self.block_size = block_size
        self.window = window
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, channels, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, channels, device=device, dtype=dtype))
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=scale)

    def forward(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """``query (B, H, W, heads, D)`` to the logits of the rows and of the columns of each query's window,
        ``(B, H, W, heads, window)`` each."""
        return position_logits(query, self.height_rel, self.width_rel, self.block_size)


class HaloAttn(nn.Module):
    """Halo attention (Vaswani et al., 2021, https://arxiv.org/abs/2103.12731) with the signature and parameters of
    timm's ``HaloAttn``.

    The map is cut into blocks; every pixel of a block attends to the block and ``halo_size`` pixels around it, with a
    learned position logit per axis. This is window attention whose stride is the block: the windows are read in place,
    where the original copies them.

    Differs from the original: a map that does not fit the blocks is refused with the sizes that do, or accepted with
    ``auto_pad``; pixels outside the map can be left out with ``border="mask"``.

    Args:
        dim: channels of the input.
        dim_out: channels of the output; None is ``dim``.
        feat_size: not used; there because layers of one family are made alike.
        stride: 1, or 2 for an output of half the size.
        num_heads: attention heads, dividing ``dim_out``.
        dim_head: channels of query and key per head; None follows from ``qk_ratio``.
        block_size: pixels of a block, per axis.
        halo_size: pixels around a block that its pixels attend to as well.
        qk_ratio: channels of query and key for one of the output, where ``dim_head`` is None; rounded to eight.
        qkv_bias: whether the projections have a bias.
        avg_down: with stride 2, attend at full size and average, instead of computing every other query.
        scale_pos_embed: whether the scale of the scores applies to position logits too.
        border: "zero" (the original: a pixel outside the map keeps its position logit, with value 0) or "mask"
            (it is left out).
        auto_pad: accept maps whose last blocks are incomplete; their missing pixels count as outside the map.

    Shape:
        ``(B, dim, H, W)`` to ``(B, dim_out, H / stride, W / stride)``, H and W multiples of ``block_size``; with
        ``auto_pad`` any, and rounded up.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        device=None,
        dtype=None,
        *,
        border: str = "zero",
        auto_pad: bool = False,
    ) -> None:
        super().__init__()
        dim_out = dim_out or dim
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        if num_heads < 1 or dim_out % num_heads:
            raise ValueError(f"num_heads must divide dim_out={dim_out}, got num_heads={num_heads}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        if halo_size < 0:
            raise ValueError(f"halo_size must be at least 0, got {halo_size}")
        if border not in ("zero", "mask"):
            raise ValueError(f"border must be 'zero' or 'mask', got {border!r}")
        self.num_heads = num_heads
        self.dim_head_qk = dim_head or _rounded_to_eight(dim_out * qk_ratio) // num_heads
        self.dim_head_v = dim_out // num_heads
        if self.dim_head_qk < 1:
            raise ValueError(
                f"qk_ratio={qk_ratio} leaves no channel of query and key to each of num_heads={num_heads} heads; "
                "give dim_head or fewer heads"
            )
        self.block_size = block_size
        self.halo_size = halo_size
        self.stride = stride
        self.scale = self.dim_head_qk**-0.5
        self.scale_pos_embed = scale_pos_embed
        self.border = border
        self.auto_pad = auto_pad
        self.window = block_size + 2 * halo_size
        pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.query_stride = query_stride = 1 if pooled else stride

        options = {"bias": qkv_bias, "device": device, "dtype": dtype}
        self.q = PointwiseConv2d(dim, num_heads * self.dim_head_qk, stride=query_stride, **options)
        self.kv = PointwiseConv2d(dim, num_heads * (self.dim_head_qk + self.dim_head_v), **options)
        self.pos_embed = RelativePositionLogits(
            block_size // query_stride, self.window, self.dim_head_qk, self.scale, device, dtype
        )
        self.pool: nn.Module = nn.Identity()
        if pooled:
            self.pool = nn.AvgPool2d(2, 2, ceil_mode=auto_pad, count_include_pad=False)
        for projection in (self.q, self.kv):
            nn.init.trunc_normal_(projection.weight, std=dim**-0.5)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"HaloAttn takes (batch, channels, height, width), got shape {tuple(x.shape)}")
        for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if size % self.block_size and not self.auto_pad:
                fitting = -(-size // self.block_size) * self.block_size
                raise ValueError(
                    f"the {name} {size} must be a multiple of block_size={self.block_size}: pad the map to {fitting} "
                    "or set auto_pad=True"
                )
        return self.pool(self._attend(x))

    def _attend(self, x: Tensor) -> Tensor:
        options = HaloOptions(
            heads=self.num_heads,
            key_channels=self.dim_head_qk,
            block_size=self.block_size,
            window=self.window,
            query_stride=self.query_stride,
            scale=self.scale,
            scale_pos_embed=self.scale_pos_embed,
            border=self.border,
        )
        if self._only_own_layers():
            tables = (self.pos_embed.height_rel, self.pos_embed.width_rel)
            tensors = (x, self.q.weight, self.q.bias, self.kv.weight, self.kv.bias, *tables)
            if HaloAttention.takes(tensors):
                return HaloAttention.apply(options, *tensors)
        return composed_halo_attention(
            options, x, self.q, lambda x: project_in_parts(self.kv, x, options.keys_and_values, 1), self.pos_embed
        )

    def _only_own_layers(self) -> bool:
        own_logits = is_unchanged(self.pos_embed, RelativePositionLogits)
        return own_logits and only_multiplies(self.q) and only_multiplies(self.kv)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, block_size={self.block_size}, halo_size={self.halo_size}, "
            f"stride={self.stride}, border={self.border!r}"
        )
