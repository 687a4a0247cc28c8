"""The published systems as their authors compute them, in plain PyTorch on the parameters of this package's modules:
what those are measured beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import BiLevelRoutingAttention, EfficientAttention, HaloAttn
from ..nn.bilevel_routing_attention import cut_regions


def halo_attention(module: HaloAttn, x: Tensor) -> Tensor:
    """Halo attention with the windows copied, then batched products. Stride 1."""
    block, window, heads = module.block_size, module.window, module.num_heads
    down, across = x.shape[2] // block, x.shape[3] // block
    query = module.q(x).reshape(-1, module.dim_head_qk, down, block, across, block)
    query = query.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # (B * heads, blocks, block², dk)
    padded = F.pad(module.kv(x), (module.halo_size,) * 4)
    copies = padded.unfold(2, window, block).unfold(3, window, block)  # (B, channels, down, across, window, window)
    copies = copies.reshape(query.shape[0], -1, down * across, window**2).permute(0, 2, 3, 1)
    key, value = copies.split((module.dim_head_qk, module.dim_head_v), dim=-1)  # (B * heads, blocks, window², ...)

    rows = query.unflatten(2, (block, block))
    along_width = _position_logits(rows, module.pos_embed.width_rel)  # (..., i, j, v)
    along_height = _position_logits(rows.transpose(2, 3), module.pos_embed.height_rel).transpose(2, 3)  # (..., i, j, u)
    logits = along_height.unsqueeze(-1) + along_width.unsqueeze(-2)
    scores = torch.matmul(query * module.scale, key.transpose(-1, -2)) + logits.flatten(4).flatten(2, 3)
    output = scores.softmax(-1) @ value
    output = output.reshape(x.shape[0], heads, down, across, block, block, -1)
    return output.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape[0], -1, *x.shape[2:])


def _position_logits(query: Tensor, table: Tensor) -> Tensor:
    """``query (..., length, D)`` at places of an axis to its products with ``table (2 * window - 1, D)`` at window
    entry - place + window - 1, ``(..., length, window)``: the rows of all products, each shifted by its place."""
    length, offsets = query.shape[-2], table.shape[0]
    window = (offsets + 1) // 2
    products = F.pad(query @ table.T, (0, 1)).flatten(-2)
    shifted = F.pad(products, (0, offsets - length)).unflatten(-1, (length + 1, offsets))
    return shifted[..., :length, window - 1 :]


def routing_attention(module: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    """Bi-level routing attention with gathered keys and values and the attention matrix."""
    query, key, value = module.qkv(x)
    height, width = x.shape[1] // module.n_win, x.shape[2] // module.n_win
    weight, index = module.router(
        *(cut_regions(part, module.n_win).mean((3, 4)).flatten(1, 2) for part in (query, key))
    )

    def regions(part: Tensor) -> Tensor:  # (B, regions, pixels, channels)
        return cut_regions(part, module.n_win).flatten(3, 4).flatten(1, 2)

    def routed(part: Tensor) -> Tensor:  # (B * regions, heads, topk * pixels, D)
        pixels = regions(module._downsample(part))
        count, *rest = pixels.shape[1:]
        chosen = index[..., None, None].expand(-1, -1, -1, *rest)
        gathered = pixels[:, None].expand(-1, count, -1, -1, -1).gather(2, chosen)
        if module.soft_routing:
            gathered = gathered * weight[..., None, None]
        return heads(gathered.flatten(2, 3).flatten(0, 1))

    def heads(part: Tensor) -> Tensor:
        return part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    scores = (heads(regions(query).flatten(0, 1)) * module.scale) @ routed(key).transpose(-1, -2)
    attended = (scores.softmax(-1) @ routed(value)).transpose(1, 2).flatten(2)
    attended = attended.unflatten(0, (x.shape[0], module.n_win, module.n_win)).unflatten(3, (height, width))
    attended = attended.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if module.lepe is not None:
        attended = attended + module.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return module.wo(attended)


class PlainRouting(nn.Module):
    """A :class:`BiLevelRoutingAttention` computed by :func:`routing_attention`, to stand in a block."""

    def __init__(self, module: BiLevelRoutingAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return routing_attention(self.module, x)


def efficient_attention(module: EfficientAttention, x: Tensor) -> Tensor:
    """Efficient attention with normalised keys and queries stored, one head after the other."""

    def convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias)

    query, key, value = (convolution(layer, x).flatten(2) for layer in (module.queries, module.keys, module.values))
    outputs = []
    for q, k, v in zip(*(part.chunk(module.head_count, dim=1) for part in (query, key, value))):
        context = k.softmax(2) @ v.transpose(1, 2)
        outputs.append(context.transpose(1, 2) @ q.softmax(1))
    return convolution(module.reprojection, torch.cat(outputs, 1).unflatten(2, x.shape[2:])) + x


def unfold_windows(x: Tensor, kernel: tuple[int, int], ratio: int = 1) -> Tensor:
    """``(N, C, h, w)`` to ``(N, C, window, h * ratio, w * ratio)``: what each pixel of the finer map sees."""
    copies = F.unfold(x, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    copies = copies.unflatten(1, (x.shape[1], -1)).unflatten(-1, x.shape[2:])
    return copies if ratio == 1 else copies.repeat_interleave(ratio, -1).repeat_interleave(ratio, -2)


def unfold_two_resolutions(
    query: Tensor, fine_key: Tensor, fine_value: Tensor, coarse_key: Tensor, coarse_value: Tensor,
    fine_kernel: tuple[int, int], coarse_kernel: tuple[int, int],
) -> Tensor:  # fmt: skip
    """One softmax over a window of the fine map and one of the coarse map, by F.unfold; ``(N, C, H, W)`` each."""
    ratio = query.shape[-1] // coarse_key.shape[-1]
    scaled = query * query.shape[1] ** -0.5

    def scores(key: Tensor, kernel: tuple[int, int], ratio: int) -> Tensor:
        inside = unfold_windows(key.new_ones(1, 1, *key.shape[2:]), kernel, ratio)[:, 0] > 0
        similar = torch.einsum("nchw,ncphw->nphw", scaled, unfold_windows(key, kernel, ratio))
        return similar.masked_fill(~inside, -10000.0)

    weights = torch.cat((scores(fine_key, fine_kernel, 1), scores(coarse_key, coarse_kernel, ratio)), 1).softmax(1)
    near, far = weights.split((fine_kernel[0] * fine_kernel[1], coarse_kernel[0] * coarse_kernel[1]), 1)
    return torch.einsum("nphw,ncphw->nchw", near, unfold_windows(fine_value, fine_kernel)) + torch.einsum(
        "nphw,ncphw->nchw", far, unfold_windows(coarse_value, coarse_kernel, ratio)
    )
