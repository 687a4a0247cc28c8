"""The operators through the C API alone, for a torch that no binding was built for: the schemas, checks and allocations
of bindings/torch/, by way of ctypes. A call costs some tens of microseconds more than through a binding, and on the CPU
it runs on threads of the core's own, as many as torch.set_num_threads allows.

The structs' layouts are read from the header that is installed with the library.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._memory_order import empty_ordered_as

# ---- the header ------------------------------------------------------------------------------------------------------

_TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "size_t": ctypes.c_size_t, "double": ctypes.c_double}


def _read_header() -> tuple[dict[str, int], dict[str, type[ctypes.Structure]]]:
    """The header's enumerators and structs, by name without the prefix."""
    path = _library.library_directory().parent / "include" / "localattn" / "localattn.h"
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    enumerators = {name: int(value) for name, value in re.findall(r"\bLOCALATTN_([A-Z0-9_]+) = (\d+)", text)}
    structs: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"typedef struct localattn_(\w+) \{(.*?)\} localattn_\1;", text, flags=re.DOTALL):
        fields = []
        # A pointer to a function, `void (*run)(...)`, is a pointer here.
        body = re.sub(r"void \(\*(\w+)\)\(.*\);", r"void *\1;", body)
        for kind, pointer, field, count in re.findall(r"([\w ]+?) ?(\*?)(\w+)(?:\[(\d+)\])?;", body):
            kind = kind.strip()
            base = ctypes.c_void_p if pointer else _TYPES.get(kind) or structs[kind.removeprefix("localattn_")]
            fields.append((field, base * int(count) if count else base))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return enumerators, structs


_ENUMERATORS, _STRUCTS = _read_header()
_CORE = _library.core()
_CORE.localattn_last_error.restype = ctypes.c_char_p
_CORE.localattn_status_name.restype = ctypes.c_char_p
_DTYPES = {getattr(torch, name): _ENUMERATORS[name.upper()] for name in ("float32", "float64", "float16", "bfloat16")}
_EXCEPTIONS = {"INVALID_ARGUMENT": ValueError, "UNSUPPORTED_DTYPE": TypeError, "UNSUPPORTED": NotImplementedError}
_EXCEPTIONS = {_ENUMERATORS[name]: kind for name, kind in _EXCEPTIONS.items()}


# ---- calls -----------------------------------------------------------------------------------------------------------


def _require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def _check(status: int) -> None:
    if status:
        message = _CORE.localattn_last_error().decode()
        if status not in _EXCEPTIONS:
            message = f"{_CORE.localattn_status_name(status).decode()}: {message}"
        raise _EXCEPTIONS.get(status, RuntimeError)(message)


def _context(device: torch.device):
    """Where a call runs: on torch's number of threads, or on torch's current stream of a CUDA device."""
    context = _STRUCTS["context"](struct_size=ctypes.sizeof(_STRUCTS["context"]))
    if device.type == "cuda":
        context.device_type, context.device_index = _ENUMERATORS["CUDA"], device.index
        context.stream = torch.cuda.current_stream(device).cuda_stream
    else:
        context.device_type, context.num_threads = _ENUMERATORS["CPU"], torch.get_num_threads()
    return context


def _run(operation: str, direction: str, params, of: Tensor) -> None:
    """One pass of an operation whose tensors lie where `of` does."""
    context = _context(of.device)
    references = ctypes.byref(context), ctypes.byref(params)
    workspace = None
    if of.device.type == "cuda":  # on the CPU the library takes what it needs
        size = ctypes.c_size_t()
        ask = getattr(_CORE, f"localattn_{operation}_workspace_size")
        _check(ask(*references, _ENUMERATORS[direction.upper()], ctypes.byref(size)))
        # Its memory serves the stream's next calls when this goes.
        workspace = torch.empty(size.value, dtype=torch.uint8, device=of.device)
        context.workspace, context.workspace_size = workspace.data_ptr(), size.value
    _check(getattr(_CORE, f"localattn_{operation}_{direction}")(*references))


def _params(operation: str, of: Tensor, name: str, **fields):
    """The params of one operation, for the dtype of `of`."""
    _require(
        of.dtype in _DTYPES,
        f"{name} must be float32, float64, float16 or bfloat16, got {of.dtype}",
        TypeError,
    )
    kind = _STRUCTS[f"{operation}_params"]
    params = kind(struct_size=ctypes.sizeof(kind), dtype=_DTYPES[of.dtype])
    for field, value in fields.items():
        if isinstance(value, (list, tuple)):
            getattr(params, field)[: len(value)] = value
        else:
            setattr(params, field, value)
    return params


_EMPTY = ctypes.create_string_buffer(64)  # what an empty tensor points to: NULL would say that it is absent


def _described(tensor: Tensor, roles: str):
    """A tensor as the C API sees it; `roles` are its axes: b(atch), s(patial), h(ead), c(hannel)."""
    result = _STRUCTS["tensor"](data=tensor.data_ptr() if tensor.numel() else ctypes.addressof(_EMPTY))
    spatial = 0
    for role, stride in zip(roles, tensor.stride()):
        if role == "s":
            result.spatial_stride[spatial] = stride
            spatial += 1
        else:
            setattr(result, {"b": "batch_stride", "h": "head_stride", "c": "channel_stride"}[role], stride)
    return result


def _full(tensor: Tensor):
    """(batch, *spatial, heads, channels)"""
    return _described(tensor, "b" + "s" * (tensor.dim() - 3) + "hc")


def _per_query(tensor: Tensor):
    """(batch, *spatial, heads)"""
    return _described(tensor, "b" + "s" * (tensor.dim() - 2) + "h")


def _mask(tensor: Tensor, key: Tensor):
    _check_kind("key_mask", tensor, key, torch.bool)
    return _described(_broadcast("key_mask", tensor, key.shape[:-2]), "b" + "s" * (key.dim() - 3))


# ---- checks: what makes tensors into one problem; the ranges of all numbers are the core's to check ------------------


def _shape(sizes: Sequence[int]) -> str:
    return str(list(sizes))


def _check_kind(name: str, tensor: Tensor, of: Tensor, dtype: torch.dtype | None = None) -> None:
    """`tensor` lies where `of` does and has its dtype, or the one told."""
    expected = dtype or of.dtype
    _require(tensor.dtype == expected, f"{name} must have dtype {expected}, got {tensor.dtype}", TypeError)
    where = f"{name} must be on the device of query, {of.device}, got {tensor.device}"
    _require(tensor.device == of.device, where, RuntimeError)


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    _require(
        list(tensor.shape) == list(expected), f"{name} must have shape {_shape(expected)}, got {_shape(tensor.shape)}"
    )


def _broadcast(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    fits = tensor.dim() <= len(shape) and all(s in (1, t) for s, t in zip(reversed(tensor.shape), reversed(shape)))
    _require(fits, f"{name} must be broadcastable to shape {_shape(shape)}, got {_shape(tensor.shape)}")
    return tensor.expand(shape)


def _check_map(name: str, tensor: Tensor, last: str = "channels") -> None:
    got = f"got shape {_shape(tensor.shape)}"
    _require(4 <= tensor.dim() <= 6, f"{name} must be (batch, one to three spatial axes, heads, {last}), {got}")


def _check_filled(name: str, tensor: Tensor) -> None:
    _require(tensor.shape[-2] > 0, f"{name} must have at least 1 head, got shape {_shape(tensor.shape)}")
    _require(tensor.shape[-1] > 0, f"{name} must have at least 1 channel, got shape {_shape(tensor.shape)}")


def _check_pair(name: str, tensor: Tensor, of: str, other: Tensor, heads: bool = True, width: bool = False) -> None:
    """`tensor` belongs to `of`: as many axes, the same batch, dtype and, where asked for, heads and width."""
    got = f"got shape {_shape(tensor.shape)}"
    _require(tensor.dim() == other.dim(), f"{name} must have as many dimensions as {of}, {other.dim()}, {got}")
    _require(tensor.shape[0] == other.shape[0], f"{name} must have the batch of {of}, {other.shape[0]}, {got}")
    if heads:
        _require(tensor.shape[-2] == other.shape[-2], f"{name} must have the heads of {of}, {other.shape[-2]}, {got}")
    if width:
        _require(tensor.shape[-1] == other.shape[-1], f"{name} must have the width of {of}, {other.shape[-1]}, {got}")
    _check_kind(name, tensor, other)


def _check_value(value: Tensor, key: Tensor) -> None:
    _require(
        value.shape[:-1] == key.shape[:-1],
        f"value must have the batch, extents and heads of key, {_shape(key.shape[:-1])}, got {_shape(value.shape)}",
    )
    _require(value.shape[-1] > 0, f"value must have at least 1 channel, got shape {_shape(value.shape)}")
    _check_kind("value", value, key)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of log-sum-exps, and of gradients that are summed over many queries."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _window(query_extent, key_extent, kernel_size, stride, dilation, is_causal, raster_causal, border) -> dict:
    """The window's fields, of any of the params that have them."""
    rank = len(query_extent)
    options = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    for name, values in options.items():
        _require(
            len(values) == rank,
            f"{name} must have one entry for each of the {rank} spatial axes, got {len(values)}",
        )
        # The C API takes a zero of these for a default.
        _require(name not in ("stride", "dilation") or 0 not in values, f"{name} must be at least 1, got {values}")
        limit = 2**63 - 1  # so that nothing wraps; the core rejects such sizes with their limits
        options[name] = [max(-limit, min(int(value), limit)) for value in values]
    _require(border in ("mask", "zero", "shift"), f"border must be 'mask', 'zero' or 'shift', got '{border}'")
    return {
        "rank": rank,
        "query_extent": list(query_extent),
        "key_extent": list(key_extent),
        **options,
        "raster_causal": raster_causal,
        "border": _ENUMERATORS[f"BORDER_{border.upper()}"],
    }


def _scale(scale: float | None) -> dict:
    return {"has_scale": scale is not None, "scale": scale or 0.0}


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention_problem(query, key, value, *options):
    """The params that both passes take, what keeps their tensors alive, and the shape that each bias broadcasts to."""
    *window, scale, bias, rel_pos_bias, axis_bias_0, axis_bias_1, axis_bias_2, key_mask = options
    rank = query.dim() - 3
    _check_map("query", query)
    _check_filled("query", query)
    _check_pair("key", key, "query", query, heads=False, width=True)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    _require(
        kv_heads > 0 and heads % kv_heads == 0,
        f"the heads of key must divide the {heads} heads of query, got shape {_shape(key.shape)}",
    )
    _check_value(value, key)
    params = _params(
        "attention", query, "query", batch=query.shape[0], heads=heads, kv_heads=kv_heads, channels=query.shape[-1],
        value_channels=value.shape[-1], query=_full(query), key=_full(key), value=_full(value), **_scale(scale),
        **_window(query.shape[1:-2], key.shape[1:-2], *window),
    )  # fmt: skip
    per_query = list(query.shape[:-1])
    sizes = [min(max(size, 0), 2**20) for size in window[0]]
    entries = 1
    for size in sizes:
        entries *= size
    biases = {
        "bias": (bias, [*per_query, entries]),
        "rel_pos_bias": (rel_pos_bias, [heads, *(2 * size - 1 for size in sizes)]),
    }
    for axis, tensor in enumerate((axis_bias_0, axis_bias_1, axis_bias_2)):
        name = f"axis_bias[{axis}]"
        _require(axis < rank or tensor is None, f"{name} must be None for {rank} spatial axes")
        biases[name] = (tensor, [*per_query, sizes[axis]] if axis < rank else [])
    for name, (tensor, shape) in biases.items():
        if tensor is not None:
            _check_kind(name, tensor, query)
            if name == "rel_pos_bias":
                _check_shape(name, tensor, shape)
            _set_bias(params, name, _broadcast(name, tensor, shape))
    if key_mask is not None:
        params.key_mask = _mask(key_mask, key)
    return params, biases


def _set_bias(params, name: str, full: Tensor, prefix: str = "", data: int | None = None) -> None:
    described = _described(full, "h" + "s" * (full.dim() - 1)) if name == "rel_pos_bias" else _full(full)
    if data is not None:
        described.data = data
    if name.startswith("axis_bias"):
        getattr(params, f"{prefix}axis_bias")[int(name[-2])] = described
    else:
        setattr(params, prefix + name, described)


def _attention(query, key, value, *options):
    params, _ = _attention_problem(query, key, value, *options)
    output = empty_ordered_as(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=_wide(query.dtype))
    params.output, params.lse = _full(output), _per_query(lse)
    _run("attention", "forward", params, query)
    return output, lse


def _attention_backward(grad_output, grad_lse, query, key, value, output, lse, *options):
    *options, needs_gradient = options
    params, biases = _attention_problem(query, key, value, *options)
    wide = _wide(query.dtype)
    _check_results(params, query, value, grad_output, grad_lse, output, lse)
    gradients = []
    for name, tensor, needed in zip(("query", "key", "value"), (query, key, value), needs_gradient):
        gradients.append(empty_ordered_as(tensor, tensor.shape[-1]) if needed else query.new_empty(0))
        if needed:
            setattr(params, f"grad_{name}", _full(gradients[-1]))
    for (name, (tensor, shape)), needed in zip(biases.items(), needs_gradient[3:]):
        if tensor is None or not needed:
            gradients.append(query.new_empty(0))
            continue
        # In the bias's own shape: seen in the full one its broadcast axes have stride 0, over which the core sums.
        gradient = query.new_empty(tensor.shape, dtype=wide)
        data = gradient.data_ptr() if gradient.numel() else None  # though it may be seen as empty
        _set_bias(params, name, gradient.expand(shape), "grad_", data)
        gradients.append(gradient)
    _run("attention", "backward", params, query)
    return tuple(gradient.to(query.dtype) for gradient in gradients)


def _check_results(params, query, value, grad_output, grad_lse, output, lse) -> None:
    per_query, wide = query.shape[:-1], _wide(query.dtype)
    for name, tensor in (("output", output), ("grad_output", grad_output)):
        _check_shape(name, tensor, [*per_query, value.shape[-1]])
        _check_kind(name, tensor, query)
        setattr(params, name, _full(tensor))
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        if tensor is not None:
            _check_shape(name, tensor, per_query)
            _check_kind(name, tensor, query, wide)
            setattr(params, name, _per_query(tensor))


def _attention_variant(*options):
    *options, backward = options
    params, _ = _attention_problem(*options)
    query, _, value = options[:3]
    # As the passes allocate them: variants may care for layouts.
    results = empty_ordered_as(query, value.shape[-1]), *(empty_ordered_as(x, x.shape[-1]) for x in options[:3])
    params.output = params.grad_output = _full(results[0])
    if backward:
        params.grad_query, params.grad_key, params.grad_value = map(_full, results[1:])
    name, report = ctypes.c_char_p(), ctypes.create_string_buffer(4096)
    _check(
        _CORE.localattn_attention_variant(
            ctypes.byref(_context(query.device)),
            ctypes.byref(params),
            _ENUMERATORS["BACKWARD" if backward else "FORWARD"],
            ctypes.byref(name),
            report,
            ctypes.c_size_t(len(report)),
        )
    )
    return (name.value or b"").decode(), report.value.decode()


# ---- similarity and weighting ----------------------------------------------------------------------------------------


def _window_entries(kernel_size, raster_causal: bool) -> int:
    entries = 1
    for size in kernel_size:
        entries *= min(max(size, 0), 2**20)
    return entries // 2 + 1 if raster_causal else entries


def _check_window(name: str, tensor: Tensor, window) -> None:
    entries = _window_entries(window[0], window[4])
    _require(tensor.shape[-1] == entries, f"{name} must have {entries} window entries, got {tensor.shape[-1]}")


def _window_params(operation: str, of: Tensor, name: str, query_extent, key_extent, window):
    shape = {"batch": of.shape[0], "heads": of.shape[-2], "channels": of.shape[-1]}
    return _params(operation, of, name, **shape, **_window(query_extent, key_extent, *window))


def _similarity(
    query, key, kernel_size, stride, dilation, is_causal, raster_causal, border, fill, as_gradient=False
):  # torch leaves out an argument that has the schema's default
    window = (kernel_size, stride, dilation, is_causal, raster_causal, border)
    _check_map("query", query)
    _check_filled("query", query)
    _check_pair("key", key, "query", query, width=True)
    extents = query.shape[1:-2], key.shape[1:-2]
    shape = (*query.shape[:-1], _window_entries(window[0], window[4]))
    if as_gradient:
        params = _window_params("weighting", query, "query", *extents, window)
        scores = query.new_empty(shape)
        params.grad_output, params.value, params.grad_weights = _full(query), _full(key), _full(scores)
        _run("weighting", "backward", params, query)
        return scores
    params = _window_params("similarity", query, "query", *extents, window)
    params.has_fill, params.fill = fill is not None, fill or 0.0
    scores = query.new_empty(shape)
    params.query, params.key, params.scores = _full(query), _full(key), _full(scores)
    _run("similarity", "forward", params, query)
    return scores


def _weighting(weights, value, *window):
    _check_map("weights", weights, "window")
    _check_pair("value", value, "weights", weights)
    _check_filled("value", value)
    _check_window("weights", weights, window)
    params = _window_params("weighting", value, "value", weights.shape[1:-2], value.shape[1:-2], window)
    output = empty_ordered_as(value, value.shape[-1], weights.shape[1:-2])
    params.weights, params.value, params.output = _full(weights), _full(value), _full(output)
    _run("weighting", "forward", params, value)
    return output


def _weighting_transpose(weights, query, key_extent, *window):
    _check_map("query", query)
    _check_filled("query", query)
    _check_pair("weights", weights, "query", query)
    extents = query.shape[1:-2]
    _require(
        weights.shape[1:-2] == extents,
        f"weights must have the extents of query, {_shape(extents)}, got shape {_shape(weights.shape)}",
    )
    _require(
        len(key_extent) == len(extents),
        f"key_extent must have one entry for each of the {len(extents)} spatial axes, got {len(key_extent)}",
    )
    _check_window("weights", weights, window)
    params = _window_params("weighting", query, "query", extents, key_extent, window)
    value = empty_ordered_as(query, query.shape[-1], key_extent)
    params.weights, params.grad_output, params.grad_value = _full(weights), _full(query), _full(value)
    _run("weighting", "backward", params, query)
    return value


# ---- linear attention ------------------------------------------------------------------------------------------------


def _linear_problem(query, key, value, key_mask):
    _check_map("query", query)
    _check_pair("key", key, "query", query, width=True)
    _check_filled("query", query)
    _check_value(value, key)
    params = _params(
        "linear_attention", query, "query", rank=query.dim() - 3, batch=query.shape[0], heads=query.shape[-2],
        channels=query.shape[-1], value_channels=value.shape[-1], query_extent=list(query.shape[1:-2]),
        key_extent=list(key.shape[1:-2]), query=_full(query), key=_full(key), value=_full(value),
    )  # fmt: skip
    if key_mask is not None:
        params.key_mask = _mask(key_mask, key)
    context_shape = (query.shape[0], query.shape[-2], query.shape[-1], value.shape[-1])
    return params, context_shape


def _linear_attention(query, key, value, key_mask):
    params, context_shape = _linear_problem(query, key, value, key_mask)
    output = empty_ordered_as(query, value.shape[-1])
    context = query.new_empty(context_shape, dtype=_wide(query.dtype))
    key_lse = query.new_empty(context_shape[:-1], dtype=_wide(query.dtype))
    params.output = _full(output)
    params.context, params.key_lse = _described(context, "bhsc"), _described(key_lse, "bhc")
    _run("linear_attention", "forward", params, query)
    return output, context, key_lse


def _linear_attention_backward(grad_output, query, key, value, context, key_lse, key_mask, needs_gradient):
    params, context_shape = _linear_problem(query, key, value, key_mask)
    _check_shape("grad_output", grad_output, [*query.shape[:-1], value.shape[-1]])
    _check_kind("grad_output", grad_output, query)
    for name, tensor, shape in (("context", context, context_shape), ("key_lse", key_lse, context_shape[:-1])):
        _check_shape(name, tensor, shape)
        _check_kind(name, tensor, query, _wide(query.dtype))
    params.grad_output = _full(grad_output)
    params.context, params.key_lse = _described(context, "bhsc"), _described(key_lse, "bhc")
    gradients = []
    for name, tensor, needed in zip(("query", "key", "value"), (query, key, value), needs_gradient):
        gradients.append(empty_ordered_as(tensor, tensor.shape[-1]) if needed else query.new_empty(0))
        if needed:
            setattr(params, f"grad_{name}", _full(gradients[-1]))
    _run("linear_attention", "backward", params, query)
    return tuple(gradients)


# ---- routed attention ------------------------------------------------------------------------------------------------


def _routed_problem(query, key, value, region_index, region_size, kv_region_size, region_weight, scale):
    for name, tensor in (("query", query), ("key", key)):
        got = f"got shape {_shape(tensor.shape)}"
        _require(tensor.dim() == 5, f"{name} must be (batch, height, width, heads, channels), {got}")
    _check_pair("key", key, "query", query, width=True)
    _check_filled("query", query)
    _check_value(value, key)
    for name, size in (("region_size", region_size), ("kv_region_size", kv_region_size)):
        _require(len(size) == 2, f"{name} must have 2 entries, got {len(size)}")
        # The C API takes a zero of these for a default.
        _require(min(size) > 0, f"{name} must be at least 1, got {list(size)}")
    _check_kind("region_index", region_index, query, torch.int64)
    got = f"got shape {_shape(region_index.shape)}"
    _require(region_index.dim() == 3, f"region_index must be (batch, regions, topk), {got}")
    (height, width), (rows, columns) = query.shape[1:3], region_size
    topk = region_index.shape[2]
    if height % rows == 0 and width % columns == 0:  # where not, the core says so before it looks at an index
        _check_shape("region_index", region_index, [query.shape[0], (height // rows) * (width // columns), topk])
    params = _params(
        "routed_attention", query, "query", batch=query.shape[0], heads=query.shape[-2], channels=query.shape[-1],
        value_channels=value.shape[-1], query_extent=list(query.shape[1:3]), key_extent=list(key.shape[1:3]),
        region_size=list(region_size), kv_region_size=list(kv_region_size), topk=topk, query=_full(query),
        key=_full(key), value=_full(value), region_index=_described(region_index, "bsc"), **_scale(scale),
    )  # fmt: skip
    if region_weight is not None:
        _check_shape("region_weight", region_weight, region_index.shape)
        _check_kind("region_weight", region_weight, query)
        params.region_weight = _described(region_weight, "bsc")
    return params


def _routed_attention(query, key, value, *options):
    params = _routed_problem(query, key, value, *options)
    output = empty_ordered_as(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=_wide(query.dtype))
    params.output, params.lse = _full(output), _per_query(lse)
    _run("routed_attention", "forward", params, query)
    return output, lse


def _routed_attention_backward(grad_output, grad_lse, query, key, value, output, lse, *options):
    *options, needs_gradient = options
    params = _routed_problem(query, key, value, *options)
    _check_results(params, query, value, grad_output, grad_lse, output, lse)
    gradients = []
    for name, tensor, needed in zip(("query", "key", "value"), (query, key, value), needs_gradient):
        gradients.append(empty_ordered_as(tensor, tensor.shape[-1]) if needed else query.new_empty(0))
        if needed:
            setattr(params, f"grad_{name}", _full(gradients[-1]))
    region_weight = options[3]
    if needs_gradient[3] and region_weight is not None:
        gradients.append(query.new_empty(region_weight.shape, dtype=_wide(query.dtype)))
        params.grad_region_weight = _described(gradients[-1], "bsc")
    else:
        gradients.append(query.new_empty(0))
    _run("routed_attention", "backward", params, query)
    return tuple(gradient.to(query.dtype) for gradient in gradients)


# ---- registration ----------------------------------------------------------------------------------------------------

_WINDOW = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, bool raster_causal, str border"
_INPUTS = "Tensor query, Tensor key, Tensor value"
_BIASES = "Tensor? bias, Tensor? rel_pos_bias, Tensor? axis_bias_0, Tensor? axis_bias_1, Tensor? axis_bias_2"
_ATTENTION = f"{_WINDOW}, float? scale, {_BIASES}, Tensor? key_mask"
_ROUTED = "Tensor region_index, int[] region_size, int[] kv_region_size, Tensor? region_weight, float? scale"
_GRADIENTS = "Tensor grad_query, Tensor grad_key, Tensor grad_value"

# As in the binding; a test compares them.
SCHEMAS = {
    f"attention({_INPUTS}, {_ATTENTION}) -> (Tensor output, Tensor lse)": _attention,
    f"attention_backward(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, Tensor lse, {_ATTENTION}, "
    f"bool[8] needs_gradient) -> ({_GRADIENTS}, Tensor grad_bias, Tensor grad_rel_pos_bias, Tensor grad_axis_bias_0, "
    "Tensor grad_axis_bias_1, Tensor grad_axis_bias_2)": _attention_backward,
    f"attention_variant({_INPUTS}, {_ATTENTION}, bool backward) -> (str name, str report)": _attention_variant,
    f"similarity(Tensor query, Tensor key, {_WINDOW}, float? fill, bool as_gradient=False) -> Tensor": _similarity,
    f"weighting(Tensor weights, Tensor value, {_WINDOW}) -> Tensor": _weighting,
    f"weighting_transpose(Tensor weights, Tensor query, SymInt[] key_extent, {_WINDOW}) -> Tensor": (
        _weighting_transpose
    ),
    f"linear_attention({_INPUTS}, Tensor? key_mask) -> (Tensor output, Tensor context, Tensor key_lse)": (
        _linear_attention
    ),
    f"linear_attention_backward(Tensor grad_output, {_INPUTS}, Tensor context, Tensor key_lse, Tensor? key_mask, "
    f"bool[3] needs_gradient) -> ({_GRADIENTS})": _linear_attention_backward,
    f"routed_attention({_INPUTS}, {_ROUTED}) -> (Tensor output, Tensor lse)": _routed_attention,
    f"routed_attention_backward(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, Tensor lse, {_ROUTED}, "
    f"bool[4] needs_gradient) -> ({_GRADIENTS}, Tensor grad_region_weight)": _routed_attention_backward,
}


def register() -> torch.library.Library:
    """Defines the operators; they are there for as long as what this returns."""
    library = torch.library.Library("localattn", "DEF")
    for schema, function in SCHEMAS.items():
        library.define(schema)
        for device in ("CPU", "CUDA"):
            library.impl(schema.partition("(")[0], function, device)
    return library
