"""Every operation in plain PyTorch: the readable definition.

Slow and hungry for memory on purpose: each query's window of keys is gathered, so nothing is fused and every step can
be read. Any floating dtype, any device, differentiable as often as wanted. Half precision is computed in float32.

Shapes: ``*Sq`` and ``*Sk`` are the one to three spatial extents of the query and the key map, ``window`` is
``prod(kernel_size)``, the window's entries in raster order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import Causal, IntOrTuple, WindowOptions, ints_per_axis, window_options

__all__ = ["linear_attention", "local_attention", "merge_attentions", "routed_attention", "similarity", "weighting"]


# ---- the window rule ------------------------------------------------------------------------------------------------


class AxisWindows(NamedTuple):
    """The windows of one axis: ``(queries, kernel)`` each."""

    position: Tensor  # of the key on the axis; meaningful where `inside`
    inside: Tensor  # the entry is a key
    outside: Tensor  # the entry lies outside the map; entries neither inside nor outside are absent
    offset: Tensor  # key - centre + kernel - 1 in dilated coordinates, the index into a relative position table


def axis_windows(
    queries: int, keys: int, kernel: int, stride: int, dilation: int, causal: bool, border: str, device: torch.device
) -> AxisWindows:
    """The window rule for one axis."""
    query = torch.arange(queries, device=device)
    nearest = (2 * query + 1) * keys // (2 * queries) if queries else query
    # Dilation splits the keys into residue classes; everything below is in the coordinates of the query's class.
    residue, centre = nearest % dilation, nearest // dilation
    length = (keys - residue + dilation - 1) // dilation
    # Stride lets groups of queries share their leader's window.
    leader = centre // stride * stride + (stride - 1 if causal else stride // 2)
    if causal or border == "shift":
        leader = torch.minimum(leader, length - 1)
    if causal:
        start = (leader - kernel + 1).clamp(min=0)
    elif border == "shift":
        start = torch.minimum(leader - kernel // 2, length - kernel).clamp(min=0)
    else:
        start = leader - kernel // 2

    centre, length, residue = centre[:, None], length[:, None], residue[:, None]
    key = start[:, None] + torch.arange(kernel, device=device)
    on_map = (key >= 0) & (key < length)
    if causal:
        there = key <= centre
    elif border == "shift":
        there = on_map
    else:
        there = torch.ones_like(on_map)
    there = there & (keys > 0)  # an empty map has no outside
    return AxisWindows(residue + dilation * key, there & on_map, there & ~on_map, key - centre + kernel - 1)


class Windows(NamedTuple):
    """The windows of a whole map, queries and entries in raster order: ``(queries, entries)`` each."""

    position: Tensor  # of the key in the flattened key map; one past its end where the entry is no key
    inside: Tensor
    outside: Tensor
    offsets: tuple[Tensor, ...]  # per axis


def windows(query_extent: Sequence[int], key_extent: Sequence[int], options: WindowOptions, device) -> Windows:
    """The window rule for all axes: the product of the axes' windows."""
    check_options(options)
    rank = len(options.kernel_size)
    axes = [
        axis_windows(*extents_and_options, options.border, device)
        for extents_and_options in zip(
            query_extent, key_extent, options.kernel_size, options.stride, options.dilation, options.is_causal
        )
    ]

    def over_map(axis: int, table: Tensor) -> Tensor:  # (queries, kernel) of an axis -> (*Sq, *kernel_size)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = table.shape
        return table.reshape(shape).expand(*query_extent, *options.kernel_size)

    position = torch.zeros((), dtype=torch.int64, device=device)
    inside = there = torch.ones((), dtype=torch.bool, device=device)
    for axis, window in enumerate(axes):
        position = position * key_extent[axis] + over_map(axis, window.position)
        inside = inside & over_map(axis, window.inside)
        there = there & over_map(axis, window.inside | window.outside)
    position = torch.where(inside, position, math.prod(key_extent))

    entries = math.prod(options.kernel_size)
    if options.raster_causal:
        entries = entries // 2 + 1  # up to the centre, which is last

    def flat(table: Tensor) -> Tensor:
        return table.reshape(math.prod(query_extent), math.prod(options.kernel_size))[:, :entries]

    offsets = tuple(flat(over_map(axis, window.offset)) for axis, window in enumerate(axes))
    return Windows(flat(position), flat(inside), flat(there & ~inside), offsets)


def check_options(options: WindowOptions) -> None:
    for kernel, stride, dilation in zip(options.kernel_size, options.stride, options.dilation):
        if kernel < 1:
            raise ValueError(f"kernel_size must be at least 1, got {options.kernel_size}")
        if not 1 <= stride <= kernel:
            raise ValueError(f"stride must be between 1 and kernel_size {options.kernel_size}, got {options.stride}")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {options.dilation}")
    if options.raster_causal:
        if any(kernel % 2 == 0 for kernel in options.kernel_size):
            raise ValueError(f"is_causal='raster' needs an odd kernel_size, got {options.kernel_size}")
        if any(stride != 1 for stride in options.stride):
            raise ValueError(f"is_causal='raster' needs stride 1, got {options.stride}")
        if options.border == "shift":
            raise ValueError("is_causal='raster' needs border 'mask' or 'zero', got 'shift'")


# ---- what the operations share ---------------------------------------------------------------------------------------


def _rank(name: str, tensor: Tensor) -> int:
    rank = tensor.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{name} must be (batch, one to three spatial axes, heads, channels), got shape {tuple(tensor.shape)}"
        )
    return rank


_SIZES = {"batch": slice(0, 1), "extents": slice(1, -2), "heads": slice(-2, -1), "channels": slice(-1, None)}


def _check_shares(name: str, tensor: Tensor, of: str, other: Tensor, *sizes: str) -> None:
    """`tensor` has as many dimensions as `other`, and the named sizes."""
    if tensor.dim() != other.dim():
        raise ValueError(f"{name} must have as many dimensions as {of}, {other.dim()}, got {tensor.dim()}")
    for size in sizes:
        got, expected = tuple(tensor.shape[_SIZES[size]]), tuple(other.shape[_SIZES[size]])
        if got != expected:
            raise ValueError(f"{name} must have the {size} of {of}, {expected}, got {got}")


def _computed(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _gather(tensor: Tensor, position: Tensor) -> Tensor:
    """``(batch, *Sk, heads, channels)`` at ``position (queries, entries)`` -> ``(batch, queries, entries, heads,
    channels)``; a position one past the end reads zeros, which no gradient reaches."""
    flat = tensor.flatten(1, -3)
    flat = torch.cat((flat, flat.new_zeros(flat.shape[0], 1, *flat.shape[2:])), dim=1)
    return flat.index_select(1, position.flatten()).unflatten(1, position.shape)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax of ``scores (..., entries)`` over the entries and its log-sum-exp. Where every score is -inf, or
    there is none: zeros, -inf and zero gradients."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    nothing = largest == -math.inf
    weights = torch.exp(scores - largest.masked_fill(nothing, 0))
    total = weights.sum(-1, keepdim=True).masked_fill(nothing, 1)
    lse = (total.log() + largest).masked_fill(largest == math.inf, math.inf)
    return weights / total, lse.squeeze(-1)


# ---- window attention ------------------------------------------------------------------------------------------------


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    *,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal = False,
    border: str = "mask",
    scale: float | None = None,
    bias: Tensor | None = None,
    rel_pos_bias: Tensor | None = None,
    axis_bias: Sequence[Tensor | None] | None = None,
    key_mask: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What :func:`localattn.local_attention` computes; see there for the arguments."""
    rank = _rank("query", query)
    options = window_options(rank, kernel_size, stride, dilation, is_causal, border)
    batch, query_extent, heads = query.shape[0], query.shape[1:-2], query.shape[-2]
    _check_shares("key", key, "query", query, "batch", "channels")
    _check_shares("value", value, "key", key, "batch", "extents", "heads")
    if key.shape[-2] != heads:
        if not enable_gqa:
            raise ValueError(f"key has {key.shape[-2]} heads and query {heads}; unequal heads need enable_gqa=True")
        if key.shape[-2] == 0 or heads % key.shape[-2]:
            raise ValueError(f"the heads of key must divide the {heads} heads of query, got {key.shape[-2]}")
    if query.shape[-1] == 0:
        raise ValueError("query must have at least 1 channel, got 0")
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    window = windows(query_extent, key.shape[1:-2], options, query.device)
    queries, entries = window.position.shape
    if key_mask is not None:  # what is left out may hold anything, NaN too
        key = key.masked_fill(~key_mask[..., None, None], 0)
        value = value.masked_fill(~key_mask[..., None, None], 0)
    group = heads // max(key.shape[-2], 1)
    keys = _gather(_computed(key), window.position).repeat_interleave(group, dim=-2)
    values = _gather(_computed(value), window.position).repeat_interleave(group, dim=-2)

    queries_flat = _computed(query).flatten(1, -3)
    scores = scale * torch.einsum("bqhc,bqehc->bqhe", queries_flat, keys)
    if bias is not None:
        full = bias.expand(batch, *query_extent, heads, math.prod(options.kernel_size))
        scores = scores + full.flatten(1, -3)[..., :entries]
    if rel_pos_bias is not None:
        scores = scores + rel_pos_bias[(slice(None), *window.offsets)].transpose(0, 1)
    for axis, per_axis in enumerate(axis_bias or ()):
        if per_axis is not None:
            shape = [1] * rank
            shape[axis] = options.kernel_size[axis]
            full = per_axis.expand(batch, *query_extent, heads, options.kernel_size[axis]).flatten(1, -3)
            full = full.unflatten(-1, shape).expand(batch, queries, heads, *options.kernel_size).flatten(3)
            scores = scores + full[..., :entries]

    attends = window.inside.expand(batch, queries, entries)
    if key_mask is not None:
        attends = attends & _gather(key_mask.expand(key.shape[:-2])[..., None, None], window.position)[..., 0, 0]
    if border == "zero":
        attends = attends | window.outside
    scores = scores.masked_fill(~attends.unsqueeze(2), -math.inf)
    weights, lse = _softmax(scores)
    output = torch.einsum("bqhe,bqehc->bqhc", weights, values).to(query.dtype).unflatten(1, query_extent)
    return (output, lse.unflatten(1, query_extent)) if return_lse else output


def similarity(
    query: Tensor,
    key: Tensor,
    kernel_size: IntOrTuple,
    *,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal = False,
    border: str = "mask",
    fill: float | None = None,
) -> Tensor:
    """The unscaled scores of every query with the keys of its window.

    Args:
        query: ``(batch, *Sq, heads, channels)``.
        key: ``(batch, *Sk, heads, channels)``.
        fill: what entries outside the map hold; None is 0 for border "zero", else -inf. Absent entries hold -inf.

    Returns:
        ``(batch, *Sq, heads, window)``; with ``is_causal="raster"`` only the ``window // 2 + 1`` entries that remain.
    """
    rank = _rank("query", query)
    options = window_options(rank, kernel_size, stride, dilation, is_causal, border)
    query_extent = query.shape[1:-2]
    _check_shares("key", key, "query", query, "batch", "heads", "channels")
    window = windows(query_extent, key.shape[1:-2], options, query.device)
    keys = _gather(_computed(key), window.position)
    scores = torch.einsum("bqhc,bqehc->bqhe", _computed(query).flatten(1, -3), keys)
    if fill is None:
        fill = 0.0 if border == "zero" else -math.inf
    scores = scores.masked_fill(window.outside[:, None], fill)
    scores = scores.masked_fill(~(window.inside | window.outside)[:, None], -math.inf)
    return scores.to(query.dtype).unflatten(1, query_extent)


def weighting(
    weights: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    *,
    stride: IntOrTuple = 1,
    dilation: IntOrTuple = 1,
    is_causal: Causal = False,
    border: str = "mask",
) -> Tensor:
    """The sum of the values in every query's window, weighted.

    Args:
        weights: ``(batch, *Sq, heads, window)``, as :func:`similarity` numbers the entries; those of entries that are
            no key are ignored.
        value: ``(batch, *Sk, heads, channels)``.

    Returns:
        ``(batch, *Sq, heads, channels)``.
    """
    rank = _rank("weights", weights)
    options = window_options(rank, kernel_size, stride, dilation, is_causal, border)
    query_extent = weights.shape[1:-2]
    _check_shares("value", value, "weights", weights, "batch", "heads")
    window = windows(query_extent, value.shape[1:-2], options, value.device)
    entries = window.position.shape[-1]
    if weights.shape[-1] != entries:
        raise ValueError(f"weights must have {entries} window entries, got {weights.shape[-1]}")
    used = _computed(weights).flatten(1, -3).masked_fill(~window.inside[:, None], 0)
    output = torch.einsum("bqhe,bqehc->bqhc", used, _gather(_computed(value), window.position))
    return output.to(value.dtype).unflatten(1, query_extent)


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What :func:`localattn.merge_attentions` computes; see there for the arguments."""
    outputs, lses = tuple(outputs), tuple(lses)
    if not outputs or len(outputs) != len(lses):
        raise ValueError(f"outputs and lses must be equally many, at least one; got {len(outputs)} and {len(lses)}")
    for output, lse in zip(outputs, lses):
        if output.shape != outputs[0].shape or output.dtype != outputs[0].dtype:
            raise ValueError(
                f"outputs must all have one shape and dtype, got {tuple(output.shape)} {output.dtype} and "
                f"{tuple(outputs[0].shape)} {outputs[0].dtype}"
            )
        if lse.shape != output.shape[:-1]:
            raise ValueError(f"lses must have shape {tuple(output.shape[:-1])}, got {tuple(lse.shape)}")
    dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    weights, lse = _softmax(torch.stack([lse.to(dtype) for lse in lses], dim=-1))
    weighted = zip(weights.unsqueeze(-2).unbind(-1), outputs)
    merged = operator.mul(*next(weighted))
    for weight, output in weighted:
        merged = torch.addcmul(merged, weight, output.to(dtype))
    return merged.to(outputs[0].dtype), lse


# ---- other attentions ------------------------------------------------------------------------------------------------


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    region_size: IntOrTuple,
    *,
    kv_region_size: IntOrTuple | None = None,
    region_weight: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every region of queries to a few regions of keys (bi-level routing, Zhu et al., 2023,
    https://arxiv.org/abs/2303.08810).

    Args:
        query: ``(batch, H, W, heads, channels)``.
        key: ``(batch, Hk, Wk, heads, channels)``.
        value: ``(batch, Hk, Wk, heads, value_channels)``.
        region_index: int64 ``(batch, regions, topk)``, the regions of keys that each region of queries attends to,
            numbered row-major. A duplicate counts twice.
        region_size: pixels per axis of a query region; divides H and W.
        kv_region_size: the same for keys, giving as many regions per axis; None is region_size.
        region_weight: ``(batch, regions, topk)``, multiplies key and value of that region.
        scale: None is ``channels ** -0.5``.

    Returns:
        ``(batch, H, W, heads, value_channels)``, and with ``return_lse`` the log-sum-exp ``(batch, H, W, heads)``.
    """
    if query.dim() != 5:
        raise ValueError(f"query must be (batch, height, width, heads, channels), got shape {tuple(query.shape)}")
    batch, height, width, _, channels = query.shape
    _check_shares("key", key, "query", query, "batch", "heads", "channels")
    _check_shares("value", value, "key", key, "batch", "extents", "heads")
    size = ints_per_axis("region_size", region_size, 2)
    kv_size = size if kv_region_size is None else ints_per_axis("kv_region_size", kv_region_size, 2)
    for name, extents, sizes in (("region_size", (height, width), size), ("kv_region_size", key.shape[1:3], kv_size)):
        if any(s < 1 or extent % s for extent, s in zip(extents, sizes)):
            raise ValueError(f"{name} must divide the map of {tuple(extents)} pixels, got {sizes}")
    grid = (height // size[0], width // size[1])
    kv_grid = (key.shape[1] // kv_size[0], key.shape[2] // kv_size[1])
    if kv_grid != grid:
        raise ValueError(f"kv_region_size must give the {grid} regions per axis of region_size, got {kv_grid}")
    regions = grid[0] * grid[1]
    if region_index.dtype != torch.int64:
        raise TypeError(f"region_index must be int64, got {region_index.dtype}")
    if region_index.dim() != 3 or region_index.shape[:2] != (batch, regions):
        raise ValueError(
            f"region_index must have shape (batch {batch}, regions {regions}, topk), got {tuple(region_index.shape)}"
        )
    readable = not torch.compiler.is_compiling() and region_index.numel()  # a graph is traced without values
    if readable and not 0 <= int(region_index.min()) <= int(region_index.max()) < regions:
        raise ValueError(
            f"region_index must be between 0 and {regions - 1}, got values from {int(region_index.min())} to "
            f"{int(region_index.max())}"
        )
    scale = channels**-0.5 if scale is None else scale
    output, lse = attend_to_regions(query, key, value, region_index, size, kv_size, region_weight, scale)
    return (output, lse) if return_lse else output


def attend_to_regions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_index: Tensor,
    size: Sequence[int],
    kv_size: Sequence[int],
    region_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """:func:`routed_attention` with its log-sum-exp, of arguments that are checked."""
    batch = query.shape[0]
    grid = (query.shape[1] // size[0], query.shape[2] // size[1])

    def cut(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:  # -> (batch, regions, pixels, heads, channels)
        tensor = tensor.unflatten(2, (grid[1], sizes[1])).unflatten(1, (grid[0], sizes[0]))
        return tensor.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def routed(tensor: Tensor) -> Tensor:  # -> (batch, regions, heads, topk * pixels, channels)
        chosen = cut(_computed(tensor), kv_size)[torch.arange(batch, device=query.device)[:, None, None], region_index]
        if region_weight is not None:
            chosen = chosen * region_weight[..., None, None, None]
        return chosen.flatten(2, 3).transpose(2, 3)

    queries = cut(_computed(query), size).transpose(2, 3)
    scores = scale * queries @ routed(key).transpose(-1, -2)
    weights, lse = _softmax(scores)

    def join(tensor: Tensor) -> Tensor:  # (batch, regions, heads, pixels, ...) -> (batch, H, W, heads, ...)
        tensor = tensor.transpose(2, 3).unflatten(2, size).unflatten(1, grid)
        return tensor.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    output = join(weights @ routed(value)).to(query.dtype)
    return output, join(lse)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Efficient attention with linear complexity (Shen et al., 2018, https://arxiv.org/abs/1812.01243): the key's
    softmax runs over positions, the query's over its channels, and nothing is scaled.

    Args:
        query: ``(batch, *Sq, heads, channels)``.
        key: ``(batch, *Sk, heads, channels)``.
        value: ``(batch, *Sk, heads, value_channels)``.
        key_mask: bool ``(batch, *Sk)``, True attends. Where all keys are masked the result is zeros.

    Returns:
        ``(batch, *Sq, heads, value_channels)``.
    """
    _rank("query", query)
    _rank("key", key)
    _check_shares("key", key, "query", query, "batch", "heads", "channels")
    _check_shares("value", value, "key", key, "batch", "extents", "heads")
    if query.shape[-1] == 0:
        raise ValueError("query must have at least 1 channel, got 0")
    keys, values = _computed(key).flatten(1, -3), _computed(value).flatten(1, -3)
    if key_mask is not None:
        left_out = ~key_mask.flatten(1)[..., None, None]
        keys, values = keys.masked_fill(left_out, -math.inf), values.masked_fill(left_out, 0)
    # Every channel of the key is a softmax over positions: (batch, heads, channels, value_channels).
    weights, _ = _softmax(keys.permute(0, 2, 3, 1))
    context = weights @ values.transpose(1, 2)
    output = torch.einsum("bqhc,bhcd->bqhd", _computed(query).flatten(1, -3).softmax(-1), context)
    return output.to(query.dtype).unflatten(1, query.shape[1:-2])
