"""Halo attention from a map on: composed of operators, and as one function with a backward that keeps less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch

from .. import _autocast
from .._arguments import window_options
from .._differentiable import any_tangent
from ..ops import local_attention
from ._layout import join_heads, split_heads
from ._pointwise import pointwise

PART_BYTES = 3 * 2**20  # of the gradients of queries, keys and values that are there at once
PRODUCT_PIXELS = 1024


class HaloOptions(NamedTuple):
    heads: int
    key_channels: int  # of a head
    block_size: int
    window: int
    query_stride: int
    scale: float
    scale_pos_embed: bool
    border: str

    def keys_and_values(self, projected: Tensor, dim: int) -> list[Tensor]:
        """The channels of the keys of all heads, and of the values, from those of one head together."""
        per_head = projected.unflatten(dim, (self.heads, -1))
        sizes = (self.key_channels, per_head.shape[dim + 1] - self.key_channels)
        return [part.flatten(dim, dim + 1) for part in per_head.split(sizes, dim + 1)]

    @property
    def query_block(self) -> int:
        return self.block_size // self.query_stride

    @property
    def position_scale(self) -> float:
        return self.scale if self.scale_pos_embed else 1.0


def composed_halo_attention(
    options: HaloOptions,
    x: Tensor,
    project_query: Callable[[Tensor], Tensor],
    project_keys_and_values: Callable[[Tensor], Sequence[Tensor]],
    logits: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """``x (B, C, H, W)`` to ``(B, heads * Dv, H / query_stride, W / query_stride)``."""
    query = split_heads(project_query(x), options.heads)
    axis_bias = logits(query * options.scale if options.scale_pos_embed else query)
    key, value = (split_heads(part, options.heads) for part in project_keys_and_values(x))
    output = local_attention(
        query,
        key,
        value,
        options.window,
        stride=options.block_size,
        border=options.border,
        scale=options.scale,
        axis_bias=axis_bias,
    )
    return join_heads(output)


def position_logits(query: Tensor, height_rel: Tensor, width_rel: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """``query (B, H, W, heads, D)`` and tables ``(2 * window - 1, D)`` to the logits of the rows and of the columns of
    each query's window, ``(B, H, W, heads, window)`` each."""
    batch, height, width, heads, _ = query.shape
    below, right = -height % block, -width % block
    if below or right:  # the last blocks are cut off by the map's edge
        query = F.pad(query, (0, 0, 0, 0, 0, right, 0, below))
    maps = query.permute(0, 3, 4, 1, 2).flatten(0, 1)  # (N, D, H, W) with N = B * heads
    rows = _row_logits(maps, _offsets(height_rel, block)).unflatten(0, (batch, heads, (height + below) // block))
    rows = rows.flatten(2, 3).permute(0, 2, 4, 1, 3)
    columns = _column_logits(maps, _offsets(width_rel, block)).unflatten(0, (batch, heads)).permute(0, 3, 4, 1, 2)
    return rows[:, :height, :width], columns[:, :height, :width]


# Products per place in the block, on copies whose fastest axis stays the map's; one copy at a time is alive.
def _row_logits(maps: Tensor, offsets: Tensor) -> Tensor:  # (N, D, H, W) to (N * blocks, block, window, W)
    return offsets @ maps.unflatten(2, (-1, len(offsets))).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _column_logits(maps: Tensor, offsets: Tensor) -> Tensor:  # (N, D, H, W) to (N, window, H, W)
    shape = (maps.shape[0], maps.shape[2], maps.shape[3] // len(offsets))
    # (block, window, D) by (block, D, N * H * blocks)
    columns = torch.bmm(offsets, maps.unflatten(3, (-1, len(offsets))).permute(4, 1, 0, 2, 3).flatten(2))
    return columns.unflatten(2, shape).permute(2, 1, 3, 4, 0).flatten(3)


def _offsets(table: Tensor, block: int) -> Tensor:
    """The rows of the table that each place in the block sees, ``(block, window, D)``."""
    window = (len(table) + 1) // 2
    place = torch.arange(block, device=table.device)[:, None]
    entry = torch.arange(window, device=table.device)
    return table[entry - place + window - 1]


class HaloAttention(torch.autograd.Function):
    """:func:`composed_halo_attention` of pointwise projections and position tables. Map, queries, keys, values, output
    and log-sum-exp are kept. The backward takes some heads at a time: it computes their position logits anew, and the
    gradients of their queries, keys and values go into those of map and weights before the next are made."""

    @staticmethod
    def takes(tensors: Sequence[Tensor | None]) -> bool:
        """On CPUs, which parts occupy as well as the whole, in the dtypes whose sums over parts are not rounded to 16
        bits. Tracing, transforms and forward mode are the composition's."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        given = [x for x in tensors if x is not None]
        return (
            all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in given)
            and {x.dtype for x in given} in ({torch.float32}, {torch.float64})
            and not _autocast.is_on(given[0].device)
            and not any_tangent(given)
        )

    @staticmethod
    def forward(ctx, options, x, q_weight, q_bias, kv_weight, kv_bias, height_rel, width_rel):
        stride = options.query_stride
        query = split_heads(_project(x[:, :, ::stride, ::stride], q_weight, q_bias), options.heads)
        key_value = split_heads(_project(x, kv_weight, kv_bias), options.heads)
        batch, height, width, heads, channels = query.shape
        output = query.new_empty(batch, heads * (key_value.shape[-1] - channels), height, width)
        lse = query.new_empty(batch, height, width, heads)
        outputs = split_heads(output, heads)
        for part in _parts(query, key_value):
            outputs[part], lse[part] = torch.ops.localattn.attention(
                *_attention_arguments(options, query[part], key_value[part], height_rel, width_rel)
            )
        ctx.options = options
        ctx.save_for_backward(
            x, q_weight, q_bias, kv_weight, kv_bias, height_rel, width_rel, query, key_value, output, lse
        )
        return output

    @staticmethod
    def backward(ctx, grad_output):
        options, (_, *needed) = ctx.options, ctx.needs_input_grad
        *inputs, query, key_value, output, lse = ctx.saved_tensors
        # A second derivative may be wanted, or many first ones at once.
        if torch.is_grad_enabled() or _functorch.is_legacy_batchedtensor(grad_output):
            return None, *_differentiable_gradients(options, inputs, needed, grad_output)
        x, q_weight, q_bias, kv_weight, kv_bias, *tables = inputs
        outputs, grad_outputs = split_heads(output, options.heads), split_heads(grad_output, options.heads)
        stride = options.query_stride
        layers = [(q_weight, q_bias), (kv_weight, kv_bias)]
        if stride == 1:
            projections = [(_ProjectionGradients(x, layers, options.heads, needed), slice(0, 3))]
        else:
            projections = [
                (_ProjectionGradients(x[:, :, ::stride, ::stride], layers[:1], options.heads, needed), slice(0, 1)),
                (_ProjectionGradients(x, layers[1:], options.heads, needed), slice(1, 3)),
            ]
        grad_height_rel, grad_width_rel = map(torch.zeros_like, tables)
        for part in _parts(query, key_value):
            with torch.enable_grad():  # of the position logits
                leaves = [tensor.detach().requires_grad_() for tensor in (query[part], *tables)]
                arguments = _attention_arguments(options, leaves[0], key_value[part], *leaves[1:])
            *grads, _, _, grad_rows, grad_columns, _ = torch.ops.localattn.attention_backward(
                grad_outputs[part], None, *arguments[:3], outputs[part], lse[part], *arguments[3:],
                [i in (0, 1, 2, 5, 6) for i in range(8)],
            )  # fmt: skip
            through_logits = torch.autograd.grad(arguments[12:14], leaves, (grad_rows, grad_columns))
            del arguments, leaves, grad_rows, grad_columns
            grads[0] += through_logits[0]
            grad_height_rel += through_logits[1]
            grad_width_rel += through_logits[2]
            del through_logits
            for projection, which in projections:
                projection.add(grads[which], images=part[0], heads=part[-1])
            del grads  # before the next part's are made
        *others, (last, _) = projections
        grad_x = last.grad_x
        if grad_x is not None:
            for projection, _ in others:
                grad_x[:, :, ::stride, ::stride] += projection.grad_x
        (q_weight, q_bias), (kv_weight, kv_bias) = (pair for p, _ in projections for pair in p.grad_layers())
        return None, grad_x, q_weight, q_bias, kv_weight, kv_bias, grad_height_rel, grad_width_rel


def _parts(query: Tensor, key_value: Tensor) -> Iterator[tuple[slice, ...]]:
    """Images and heads to take together: some images, or one, or some heads of one."""
    batch, _, _, heads, _ = query.shape
    head_bytes = max(1, query.element_size() * (query[:1, ..., 0, :].numel() + key_value[:1, ..., 0, :].numel()))
    heads_at_once = max(1, min(heads, PART_BYTES // head_bytes))
    images = max(1, PART_BYTES // (head_bytes * heads))
    for image in range(0, batch, images):
        for head in range(0, heads, heads_at_once):
            yield slice(image, image + images), slice(None), slice(None), slice(head, head + heads_at_once)


def _attention_arguments(options: HaloOptions, query, key_value, height_rel, width_rel) -> tuple:
    scale = options.position_scale
    rows, columns = position_logits(query, scale * height_rel, scale * width_rel, options.query_block)
    window = window_options(2, options.window, options.block_size, 1, False, options.border)
    key, value = key_value.split((options.key_channels, key_value.shape[-1] - options.key_channels), -1)
    return (query, key, value, *window, options.scale, None, None, rows, columns, None, None)


def _multiply(matrix: Tensor, pixels: Tensor, out: Tensor, onto: bool) -> None:
    """``matrix @ pixels (B, C, H * W)`` to ``out``, or onto what is there; some pixels at a time, as a product takes
    memory for a copy of what it reads."""
    if pixels.shape[2] <= PRODUCT_PIXELS:
        torch.baddbmm(out, matrix.expand(len(pixels), -1, -1), pixels, beta=int(onto), out=out)
        return
    for image in range(len(pixels)):
        for first in range(0, pixels.shape[2], PRODUCT_PIXELS):
            some = (image, slice(None), slice(first, first + PRODUCT_PIXELS))
            out[some].addmm_(matrix, pixels[some], beta=int(onto))


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[1] != weight.shape[1]:
        return pointwise(x, weight, bias)  # which says so
    out = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
    if bias is not None:
        out.copy_(bias[:, None, None])
    _multiply(weight.flatten(1), x.flatten(2), out.flatten(2), bias is not None)
    return out


class _ProjectionGradients:
    """Gradients of a map and of layers ``(weight, bias)`` that project each of its pixels, all by one product: from
    those of what they gave, some heads after the other, from the first head of an image on."""

    def __init__(self, x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], heads: int, needed: Sequence[bool]):
        self.pixels = x.flatten(2)
        self.shapes = [weight.shape for weight, _ in layers]
        self.matrix = torch.cat([weight.reshape(heads, -1, x.shape[1]) for weight, _ in layers], 1)
        self.grad_x = x.new_empty(x.shape) if needed[0] else None
        self.grad_matrix = torch.zeros_like(self.matrix) if needed[1] or needed[3] else None
        self.grad_biases = self.matrix.new_zeros(self.matrix.shape[:2]) if needed[2] or needed[4] else None

    def add(self, grads: Sequence[Tensor], images: slice, heads: slice) -> None:
        """``grads``, each ``(B, H, W, heads, channels)``, of some images and heads."""
        grad = torch.cat([x.permute(0, 3, 4, 1, 2) for x in grads], 2).flatten(3).flatten(1, 2)
        matrix = self.matrix[heads]
        if self.grad_x is not None:
            _multiply(matrix.flatten(0, 1).T, grad, self.grad_x.flatten(2)[images], onto=heads.start > 0)
        if self.grad_matrix is not None:
            self.grad_matrix[heads] += torch.bmm(grad, self.pixels[images].mT).sum(0).view(matrix.shape)
        if self.grad_biases is not None:
            self.grad_biases[heads] += grad.sum((0, 2)).view(matrix.shape[:2])

    def grad_layers(self) -> list[tuple[Tensor | None, Tensor | None]]:
        channels = [shape[0] // len(self.matrix) for shape in self.shapes]
        weights, biases = (
            [None] * len(channels) if x is None else x.split(channels, 1) for x in (self.grad_matrix, self.grad_biases)
        )
        return [
            (None if weight is None else weight.reshape(shape), None if bias is None else bias.flatten())
            for weight, bias, shape in zip(weights, biases, self.shapes)
        ]


def _differentiable_gradients(options: HaloOptions, inputs: Sequence[Tensor | None], needed, grad_output: Tensor):
    x, q_weight, q_bias, kv_weight, kv_bias, height_rel, width_rel = inputs
    with torch.enable_grad():
        output = composed_halo_attention(
            options,
            x,
            lambda x: pointwise(x, q_weight, q_bias, options.query_stride),
            lambda x: options.keys_and_values(pointwise(x, kv_weight, kv_bias), 1),
            lambda query: position_logits(query, height_rel, width_rel, options.query_block),
        )
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    gradients = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if need else None for need in needed]
