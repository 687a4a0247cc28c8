"""The operators as functions: arguments as users write them, turned into what the native operators take."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _autocast, _library, reference
from ._arguments import Causal, IntOrTuple, ints_per_axis, window_options

if _library.load_error is None:
    # Registered by being imported.
    from . import _autograd, _fake, _flops, _linear_attention, _routed_attention, _window_products  # noqa: F401

__all__ = [
    "attention_variant",
    "linear_attention",
    "local_attention",
    "merge_attentions",
    "routed_attention",
    "similarity",
    "weighting",
]


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
    """Attention of every query to a window of keys around it, fused: nothing of the window's size is stored.

    ``score = scale * (query @ key) + biases`` over the window, then softmax, then the weighted sum of ``value``. One to
    three spatial axes, taken from the shapes. Any strides are read in place, without a copy. Differentiable in every
    floating argument; second derivatives take memory in proportion to the window. Under autocast, all but float64 is
    cast to the autocast dtype, as in ``scaled_dot_product_attention``.

    The window follows Parmar et al., 2018 (https://arxiv.org/abs/1802.05751) and Ramachandran et al., 2019
    (https://arxiv.org/abs/1906.05909); border "shift", dilation and stride follow Hassani et al., 2023 and 2025
    (https://arxiv.org/abs/2204.07143, https://arxiv.org/abs/2209.15001, https://arxiv.org/abs/2504.16922).

    Args:
        query: ``(batch, *Sq, heads, channels)``; float32, float64, float16 or bfloat16. All floating arguments have
            its dtype.
        key: ``(batch, *Sk, kv_heads, channels)``. ``Sk`` may differ from ``Sq``, at any ratio: a query's window is
            centred on the key nearest to it.
        value: ``(batch, *Sk, kv_heads, value_channels)``.
        kernel_size: keys per axis, an int or one per spatial axis. An even kernel reaches one further back than ahead.
        stride: groups of this many queries share one window, 1 to kernel_size.
        dilation: distance between neighbouring keys of a window.
        is_causal: True, or one bool per axis: the window ends at the query. "raster": only the window's entries up to
            its centre in raster order remain (odd kernels, stride 1, border "mask" or "zero").
        border: what happens at the map's edge. "mask": entries outside the map are left out; "zero": they take part
            with score 0 (plus bias) and value 0; "shift": the window is moved inside.
        scale: of the scores; None is ``channels ** -0.5``, and 0.0 means 0.
        bias: added to the scores; broadcastable to ``(batch, *Sq, heads, prod(kernel_size))``, entries in raster order.
        rel_pos_bias: ``(heads, 2 * kernel_size - 1 per axis)``, indexed by key - centre + kernel_size - 1 in dilated
            coordinates.
        axis_bias: for each axis None or a tensor broadcastable to ``(batch, *Sq, heads, kernel_size of that axis)``.
        key_mask: bool, broadcastable to ``(batch, *Sk)``; False leaves that key out.
        enable_gqa: allow kv_heads to be a divisor of heads; consecutive query heads share a key head.
        return_lse: also return the scores' natural log-sum-exp, which is differentiable too.

    Returns:
        ``(batch, *Sq, heads, value_channels)`` in query's dtype, and in its memory order if that is channels-first;
        with ``return_lse`` also ``(batch, *Sq, heads)`` in float32 (float64 for float64). A query that sees no key
        gives zeros and -inf.

    Raises:
        ValueError: an argument's shape or value is not allowed.
        TypeError: a dtype is not supported, or not that of query.
        RuntimeError: the tensors lie on different devices, or no kernel is installed that can do it.
    """
    arguments = _native_arguments(
        query, key, value, kernel_size, stride, dilation, is_causal, border, scale, bias, rel_pos_bias, axis_bias,
        key_mask, enable_gqa,
    )  # fmt: skip
    output, lse = _autograd.attention(*arguments)
    return (output, lse) if return_lse else output


def attention_variant(
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
    backward: bool = False,
) -> tuple[str, str]:
    """Which kernel variant :func:`local_attention` would take for these arguments (or its backward), and one line for
    each better variant that declined, ``"name: reason\\n"``."""
    arguments = _native_arguments(
        query, key, value, kernel_size, stride, dilation, is_causal, border, scale, bias, rel_pos_bias, axis_bias,
        key_mask, enable_gqa,
    )  # fmt: skip
    return torch.ops.localattn.attention_variant(*arguments, backward)


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
    """The unscaled scores of every query with the keys of its window: the first half of :func:`local_attention`, for
    those who change the scores or want the attention map. Differentiable, fused, to any order.

    Args:
        query: ``(batch, *Sq, heads, channels)``; float32, float64, float16 or bfloat16.
        key: ``(batch, *Sk, heads, channels)``, of query's dtype. ``Sk`` may differ from ``Sq``, at any ratio.
        kernel_size, stride, dilation, is_causal, border: the window, as in :func:`local_attention`.
        fill: what entries outside the map hold, without a gradient; None is 0 for border "zero", else -inf. Entries
            that are absent (cut off by causality, or more than the map has keys under border "shift") hold -inf.

    Returns:
        ``(batch, *Sq, heads, window)`` in query's dtype, the ``prod(kernel_size)`` entries of the window in raster
        order; with ``is_causal="raster"`` the first ``prod(kernel_size) // 2 + 1`` of them, the centre last.

    Raises:
        ValueError: an argument's shape or value is not allowed.
        TypeError: a dtype is not supported, or not that of query.
        RuntimeError: the tensors lie on different devices, or no kernel is installed that can do it.
    """
    query, key, options = _window_arguments(
        "query", query, "key", key, kernel_size, stride, dilation, is_causal, border
    )
    return _window_products.similarity(query, key, *options, fill)


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
    """The sum of the values in every query's window, weighted: the second half of :func:`local_attention`.
    Differentiable, fused, to any order.

    Args:
        weights: ``(batch, *Sq, heads, window)``, as :func:`similarity` numbers the entries. What it holds for entries
            that are no key is ignored, and its gradient there is 0.
        value: ``(batch, *Sk, heads, channels)``, of weights' dtype.
        kernel_size, stride, dilation, is_causal, border: the window, as in :func:`local_attention`.

    Returns:
        ``(batch, *Sq, heads, channels)``, in the memory order of value if that is channels-first.

    Raises:
        As :func:`similarity`.
    """
    weights, value, options = _window_arguments(
        "weights", weights, "value", value, kernel_size, stride, dilation, is_causal, border
    )
    return _window_products.weighting(weights, value, *options)


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
    """Attention of every region of queries to a few regions of keys, which are read in place: neither gathered keys and
    values nor an attention matrix is formed, and the gradient is deterministic (bi-level routing, Zhu et al., 2023,
    https://arxiv.org/abs/2303.08810). Differentiable in every floating argument; second derivatives gather.

    Args:
        query: ``(batch, H, W, heads, channels)``; float32, float64, float16 or bfloat16. All floating arguments have
            its dtype.
        key: ``(batch, Hk, Wk, heads, channels)``.
        value: ``(batch, Hk, Wk, heads, value_channels)``.
        region_index: int64 ``(batch, regions, topk)``, the regions of keys that each region of queries attends to,
            numbered row-major and shared by the heads. A duplicate counts twice.
        region_size: pixels per axis of a query region, an int or two; divides H and W.
        kv_region_size: the same for keys, giving as many regions per axis; None is region_size.
        region_weight: ``(batch, regions, topk)``, multiplies key and value of that region.
        scale: of the scores; None is ``channels ** -0.5``, and 0.0 means 0.
        return_lse: also return the scores' natural log-sum-exp, which is differentiable too.

    Returns:
        ``(batch, H, W, heads, value_channels)`` in query's dtype, and in its memory order if that is channels-first;
        with ``return_lse`` also ``(batch, H, W, heads)`` in float32 (float64 for float64).

    Raises:
        ValueError: a shape or value is not allowed; an index is out of range.
        TypeError: a dtype is not supported, or not that of query.
        RuntimeError: the tensors lie on different devices, or no kernel is installed that can do it.
    """
    _library.require_operators()
    tensors = {"query": query, "key": key, "value": value, "region_index": region_index}
    if region_weight is not None:
        tensors["region_weight"] = region_weight
    _check_tensors(tensors)
    size = ints_per_axis("region_size", region_size, 2)
    kv_size = size if kv_region_size is None else ints_per_axis("kv_region_size", kv_region_size, 2)
    query, key, value, region_weight = _autocast.cast(query, key, value, region_weight)
    output, lse = _routed_attention.routed_attention(
        query, key, value, region_index, size, kv_size, region_weight, scale
    )
    return (output, lse) if return_lse else output


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Efficient attention with linear complexity (Shen et al., 2018, https://arxiv.org/abs/1812.01243), streamed: the
    key's softmax runs over positions, the query's over its channels, nothing is scaled, and neither normalised tensor
    is stored. Differentiable; second derivatives take the memory of the readable definition.

    Args:
        query: ``(batch, *Sq, heads, channels)``, one to three spatial axes; float32, float64, float16 or bfloat16.
        key: ``(batch, *Sk, heads, channels)``, of query's dtype; ``Sk`` may differ from ``Sq``.
        value: ``(batch, *Sk, heads, value_channels)``.
        key_mask: bool, broadcastable to ``(batch, *Sk)``; False leaves that key out. Where all keys are left out the
            result is zeros.

    Returns:
        ``(batch, *Sq, heads, value_channels)`` in query's dtype, and in its memory order if that is channels-first.

    Raises:
        ValueError: a shape is not allowed.
        TypeError: a dtype is not supported, or not that of query.
        RuntimeError: the tensors lie on different devices, or no kernel is installed that can do it.
    """
    _library.require_operators()
    tensors = {"query": query, "key": key, "value": value}
    if key_mask is not None:
        tensors["key_mask"] = key_mask
    _check_tensors(tensors)
    query, key, value = _autocast.cast(query, key, value)
    return _linear_attention.linear_attention(query, key, value, key_mask)[0]


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention over all keys from attentions over parts of them.

    Args:
        outputs: ``(batch, *Sq, heads, channels)`` each.
        lses: their log-sum-exps, ``(batch, *Sq, heads)`` each. Where one is -inf, that part counts for nothing.

    Returns:
        The output (in the dtype of outputs, computed in float32 at least) and log-sum-exp over all the keys, zeros and
        -inf where no part sees a key. Gradients through both are exact.

    Raises:
        ValueError: the lists' lengths, or shapes or dtypes within them, do not agree.
    """
    return reference.merge_attentions(outputs, lses)


def _native_arguments(
    query, key, value, kernel_size, stride, dilation, is_causal, border, scale, bias, rel_pos_bias, axis_bias, key_mask,
    enable_gqa,
) -> tuple:  # fmt: skip
    """The arguments of the operators' schemas."""
    _library.require_operators()
    _check_tensors({"query": query})
    rank = query.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(
            f"query must be (batch, one to three spatial axes, heads, channels), got shape {tuple(query.shape)}"
        )
    if scale is not None and not isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    options = window_options(rank, kernel_size, stride, dilation, is_causal, border)
    axis_biases: tuple = (None,) * 3
    if axis_bias is not None:
        if not isinstance(axis_bias, (tuple, list)) or len(axis_bias) != rank:
            raise ValueError(f"axis_bias must be a list of one tensor or None for each of the {rank} spatial axes")
        axis_biases = (*axis_bias, *(None,) * (3 - rank))
    optional = {"key_mask": key_mask, "bias": bias, "rel_pos_bias": rel_pos_bias}
    # Not |=, which torch 2.4 cannot compile.
    optional.update({f"axis_bias[{axis}]": tensor for axis, tensor in enumerate(axis_biases)})
    given = {name: tensor for name, tensor in optional.items() if tensor is not None}
    _check_tensors({"query": query, "key": key, "value": value, **given})
    if not enable_gqa and key.dim() == query.dim() and key.shape[-2] != query.shape[-2]:
        raise ValueError(
            f"key has {key.shape[-2]} heads and query {query.shape[-2]}; unequal heads need enable_gqa=True"
        )
    query, key, value, bias, rel_pos_bias, *axis_biases = _autocast.cast(
        query, key, value, bias, rel_pos_bias, *axis_biases
    )
    return (query, key, value, *options, scale, bias, rel_pos_bias, *axis_biases, key_mask)


def _window_arguments(name, first, other_name, other, kernel_size, stride, dilation, is_causal, border) -> tuple:
    """Two tensors that share a window, cast as autocast has it, and the window's options."""
    _library.require_operators()
    _check_tensors({name: first, other_name: other})
    rank = first.dim() - 3
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{name} must be (batch, one to three spatial axes, heads, channels), got shape {tuple(first.shape)}"
        )
    first, other = _autocast.cast(first, other)
    return first, other, window_options(rank, kernel_size, stride, dilation, is_causal, border)


def _check_tensors(tensors: dict[str, Tensor | None]) -> None:
    """All are dense tensors, on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor (layout torch.strided), got {tensor.layout}")
        if tensor.device != first.device:
            raise RuntimeError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")
