"""What localattn is measured beside, each in the formulation that serves it best, all with border "mask" and scale
channels**-0.5 on ``(1, side, side, heads, channels)`` unless its note says otherwise."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import localattn

from .shapes import Shape

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
GIB = 2**30


class Peer(ABC):
    """One implementation of window attention."""

    name: str
    backward = True  # whether it has a backward pass on the CPU
    reduced = False  # whether it is measured in bfloat16 too
    copies_windows = False  # whether it holds the keys of every window

    def absent(self) -> str | None:
        """Why it cannot be measured here at all; None if it can."""
        return None

    @abstractmethod
    def memory(self, shape: Shape, backward: bool) -> int:
        """Roughly the bytes it allocates beyond its results: those that would not fit are not run."""

    @abstractmethod
    def prepare(self, shape: Shape) -> Attention:
        """The function to measure. What does not depend on the tensors' contents is made here, unmeasured."""

    def declines(self, shape: Shape, backward: bool) -> str | None:
        """Why this shape is not measured; None if it is."""
        if backward and not self.backward:
            return "no backward pass on the CPU"
        needed, there = self.memory(shape, backward), available_memory()
        if needed > there // 2:
            return f"needs about {needed / GIB:.0f} GiB, {there / GIB:.0f} GiB are free"
        if self.copies_windows and shape.elements * shape.kernel**2 > 10**9:
            return "copies every window: takes minutes"
        return None


class Localattn(Peer):
    name = "localattn"
    reduced = True

    def memory(self, shape: Shape, backward: bool) -> int:
        return 16 * shape.elements

    def prepare(self, shape: Shape) -> Attention:
        return lambda query, key, value: localattn.local_attention(query, key, value, shape.kernel)


class Unfold(Peer):
    """The published plain PyTorch form: F.unfold of key and value, then products."""

    name = "unfold"
    copies_windows = True

    def memory(self, shape: Shape, backward: bool) -> int:
        return (8 if backward else 4) * 4 * shape.elements * shape.kernel**2

    def prepare(self, shape: Shape) -> Attention:
        kernel, side = shape.kernel, shape.side
        outside = _outside(shape)

        def windows(x: Tensor) -> Tensor:  # (side, side, heads, C) -> (heads, pixels, C, window)
            folded = F.unfold(x.permute(2, 3, 0, 1), kernel, padding=kernel // 2)
            return folded.unflatten(1, (shape.channels, kernel**2)).permute(0, 3, 1, 2)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = query[0].permute(2, 0, 1, 3).reshape(shape.heads, side**2, 1, -1) * shape.channels**-0.5
            scores = (rows @ windows(key[0])).masked_fill(outside[:, None], float("-inf"))
            output = scores.softmax(-1) @ windows(value[0]).transpose(-1, -2)
            return output.reshape(shape.heads, side, side, -1).permute(1, 2, 0, 3)[None]

        return attend


class UnfoldInChunks(Peer):
    """Strided views in place of F.unfold, a few rows of the image at a time, so that the copies stay in the cache."""

    name = "unfold in chunks"
    copies_windows = True

    def memory(self, shape: Shape, backward: bool) -> int:
        copies = 4 * shape.elements * shape.kernel**2
        return 4 * copies if backward else copies // shape.side * self._rows(shape) * 3

    def prepare(self, shape: Shape) -> Attention:
        kernel, side, rows = shape.kernel, shape.side, self._rows(shape)
        reach = kernel // 2
        outside = _outside(shape).reshape(side, side, 1, 1, kernel**2)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            padding = (0, 0, 0, 0, reach, reach, reach, reach)
            key, value = (F.pad(x[0], padding) for x in (key, value))
            outputs = []
            for begin in range(0, side, rows):
                part = slice(begin, begin + rows)
                seen = slice(begin, min(begin + rows, side) + kernel - 1)
                # (rows, side, heads, C, window)
                keys, values = (x[seen].unfold(0, kernel, 1).unfold(1, kernel, 1).flatten(-2) for x in (key, value))
                scores = (query[0, part].unsqueeze(-2) * shape.channels**-0.5) @ keys
                weights = scores.masked_fill(outside[part], float("-inf")).softmax(-1)
                outputs.append((values @ weights.transpose(-1, -2)).squeeze(-1))
            return torch.cat(outputs)[None]

        return attend

    @staticmethod
    def _rows(shape: Shape) -> int:
        row = 4 * shape.side * shape.heads * shape.channels * shape.kernel**2
        return max(1, min(shape.side, 4 * 2**20 // row))


class HaloBlocks(Peer):
    """Blocks of 8 x 8 queries with all the keys that any of them sees, and a mask: dense products, the best of plain
    PyTorch."""

    name = "halo blocks"
    BLOCK = 8

    def memory(self, shape: Shape, backward: bool) -> int:
        halo = (self.BLOCK + shape.kernel - 1) ** 2
        blocks = (shape.side / self.BLOCK) ** 2 * shape.heads
        return int(blocks * halo * (2 * shape.channels + 3 * self.BLOCK**2) * 4 * (2 if backward else 1))

    def declines(self, shape: Shape, backward: bool) -> str | None:
        if shape.side % self.BLOCK:
            return f"the side is not a multiple of {self.BLOCK}"
        return super().declines(shape, backward)

    def prepare(self, shape: Shape) -> Attention:
        block, reach = self.BLOCK, shape.kernel // 2
        across, halo = shape.side // block, block + 2 * reach
        offset = torch.arange(halo)[None] - torch.arange(block)[:, None]  # of a block's key, from a query's first
        near = (offset >= 0) & (offset < shape.kernel)
        position = torch.arange(across)[:, None] * block + torch.arange(halo) - reach
        on_map = (position >= 0) & (position < shape.side)
        axis = near[None] & on_map[:, None]  # (across, block, halo)
        seen = axis[:, None, :, None, :, None] & axis[None, :, None, :, None, :]
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).reshape(1, across**2, block**2, halo**2)

        def halos(x: Tensor) -> Tensor:  # (side, side, heads, C) -> (heads, blocks, halo², C)
            padded = F.pad(x, (0, 0, 0, 0, reach, reach, reach, reach))
            cut = padded.unfold(0, halo, block).unfold(1, halo, block)  # (across, across, heads, C, halo, halo)
            return cut.permute(2, 0, 1, 4, 5, 3).reshape(shape.heads, across**2, halo**2, shape.channels)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cut = query[0].unflatten(1, (across, block)).unflatten(0, (across, block)) * shape.channels**-0.5
            blocks = cut.permute(4, 0, 2, 1, 3, 5).reshape(shape.heads, across**2, block**2, shape.channels)
            weights = (blocks @ halos(key[0]).transpose(-1, -2) + bias).softmax(-1)
            output = (weights @ halos(value[0])).unflatten(2, (block, block)).unflatten(1, (across, across))
            return output.permute(1, 3, 2, 4, 0, 5).reshape(query.shape)

        return attend


class MaskedAttention(Peer):
    """scaled_dot_product_attention over all pixels with a boolean mask."""

    name = "SDPA with a mask"

    def memory(self, shape: Shape, backward: bool) -> int:
        return shape.side**4 * ((4 + 8 * shape.heads) if backward else 4 + 1)

    def prepare(self, shape: Shape) -> Attention:
        axis = torch.arange(shape.side)
        near = (axis[:, None] - axis).abs() <= shape.kernel // 2
        mask = (near[:, None, :, None] & near[None, :, None, :]).reshape(shape.side**2, shape.side**2)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2).reshape(query.shape)

        return attend


class FlexAttention(Peer):
    name = "compiled flex_attention"
    backward = False

    def absent(self) -> str | None:
        if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
            return f"not in torch {torch.__version__}"
        return None

    def memory(self, shape: Shape, backward: bool) -> int:
        return shape.side**4 * 10  # its block mask is made from one entry per pair of pixels

    def prepare(self, shape: Shape) -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        side, reach = shape.side, shape.kernel // 2

        def near(batch, head, query, key):
            vertical, horizontal = query // side - key // side, query % side - key % side
            return (vertical.abs() <= reach) & (horizontal.abs() <= reach)

        torch.compiler.reset()  # after a few shapes it would no longer compile, but run uncompiled
        mask = create_block_mask(near, None, None, side**2, side**2, device="cpu")
        compiled = torch.compile(flex_attention, dynamic=False)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
            return compiled(*rows, block_mask=mask).transpose(1, 2).reshape(query.shape)

        return attend


class Natten(Peer):
    """The CPU kernels that NATTEN had up to 0.17; border "shift", which does a little more work at the edges."""

    name = "NATTEN"

    def absent(self) -> str | None:
        if importlib.util.find_spec("natten") is None:
            return "not installed"
        import natten

        if not hasattr(natten.functional, "na2d_qk"):
            return f"release {natten.__version__} has no CPU kernels"
        return None

    def memory(self, shape: Shape, backward: bool) -> int:
        return 4 * shape.pairs * (4 if backward else 2)

    def prepare(self, shape: Shape) -> Attention:
        from natten.functional import na2d_av, na2d_qk

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.permute(0, 3, 1, 2, 4).contiguous() for x in (query, key, value))
            scores = na2d_qk(query * shape.channels**-0.5, key, kernel_size=shape.kernel)
            return na2d_av(scores.softmax(-1), value, kernel_size=shape.kernel).permute(0, 2, 3, 1, 4)

        return attend


PEERS: list[Peer] = [
    Localattn(),
    HaloBlocks(),
    FlexAttention(),
    UnfoldInChunks(),
    Unfold(),
    MaskedAttention(),
    Natten(),
]


def by_name(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


def _outside(shape: Shape) -> Tensor:
    """``(pixels, window)``: the entry lies outside the map."""
    position = torch.arange(shape.side)[:, None] + torch.arange(shape.kernel) - shape.kernel // 2
    on_map = (position >= 0) & (position < shape.side)
    both = on_map[:, None, :, None] & on_map[None, :, None, :]
    return ~both.reshape(shape.side**2, shape.kernel**2)


def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
