"""Window attention written as loops over every query and head, in float64 numpy. It follows the definition's words and
shares no code with the package: the tests' judge."""

import itertools
import math

import numpy as np

KEY, ZERO, ABSENT = "key", "zero", "absent"


def axis_window(query, queries, keys, kernel, stride, dilation, causal, border):
    """The window of one query along one axis: for each entry what it is, its position, and its offset from the centre
    in dilated coordinates. ZERO stands for every entry outside the map, whatever the border makes of it."""
    if keys == 0:
        return [(ABSENT, None, 0)] * kernel
    nearest = math.floor((2 * query + 1) * keys / (2 * queries))
    members = [position for position in range(keys) if position % dilation == nearest % dilation]
    centre, last = nearest // dilation, len(members) - 1
    group = centre // stride
    leader = group * stride + (stride - 1 if causal else stride // 2)
    if causal or border == "shift":
        leader = min(leader, last)
    if causal:
        start = max(leader - (kernel - 1), 0)
    elif border == "shift":
        start = max(0, min(leader - kernel // 2, len(members) - kernel))
    else:
        start = leader - kernel // 2
    window = []
    for member in range(start, start + kernel):
        if (causal and member > centre) or (border == "shift" and member > last):
            window.append((ABSENT, None, member - centre))
        elif 0 <= member <= last:
            window.append((KEY, members[member], member - centre))
        else:
            window.append((ZERO, None, member - centre))
    return window


def map_window(query, query_extent, key_extent, kernel_size, stride, dilation, is_causal, border):
    """The window of the query at a coordinate tuple, in raster order: (kind, key place, offsets, entry per axis)."""
    raster = is_causal == "raster"
    causal = (False,) * len(kernel_size) if raster else is_causal
    axes = [
        axis_window(*arguments, border)
        for arguments in zip(query, query_extent, key_extent, kernel_size, stride, dilation, causal)
    ]
    entries = []
    for index in itertools.product(*(range(k) for k in kernel_size)):
        parts = [axis[i] for axis, i in zip(axes, index)]
        kinds = {part[0] for part in parts}
        kind = ABSENT if ABSENT in kinds else ZERO if ZERO in kinds else KEY
        entries.append((kind, tuple(part[1] for part in parts), tuple(part[2] for part in parts), index))
    return entries[: math.prod(kernel_size) // 2 + 1] if raster else entries


def attention(
    query, key, value, kernel_size, stride, dilation, is_causal, border, scale, bias=None, rel_pos_bias=None,
    axis_bias=(), key_mask=None, grad_output=None, grad_lse=None,
):  # fmt: skip
    """Output and log-sum-exp, and, given their gradients, those of every floating argument, by name. All arrays are
    float64; biases may be broadcastable."""
    batch, *query_extent, heads, channels = query.shape
    key_extent, kv_heads = key.shape[1:-2], key.shape[-2]
    scale = channels**-0.5 if scale is None else scale
    window_size = math.prod(kernel_size)

    def full(tensor, entries):
        return None if tensor is None else np.broadcast_to(tensor, (batch, *query_extent, heads, entries))

    full_bias = full(bias, window_size)
    full_axis_bias = [full(tensor, k) for tensor, k in zip(axis_bias, kernel_size)]
    mask = np.ones((batch, *key_extent), bool) if key_mask is None else np.broadcast_to(key_mask, (batch, *key_extent))
    offset_shift = np.array(kernel_size) - 1  # a relative position table starts at offset -(kernel - 1)
    output = np.full((*query.shape[:-1], value.shape[-1]), np.nan)
    lse = np.full(query.shape[:-1], np.nan)
    grads = {name: np.zeros(tensor.shape) for name, tensor in (("query", query), ("key", key), ("value", value))}
    grads["bias"] = None if bias is None else np.zeros(full_bias.shape)
    grads["rel_pos_bias"] = None if rel_pos_bias is None else np.zeros(rel_pos_bias.shape)
    for axis, tensor in enumerate(full_axis_bias):
        grads[f"axis_bias[{axis}]"] = None if tensor is None else np.zeros(tensor.shape)

    for at in itertools.product(*(range(extent) for extent in query_extent)):
        window = map_window(at, query_extent, key_extent, kernel_size, stride, dilation, is_causal, border)
        for b, h in itertools.product(range(batch), range(heads)):
            here, kv_head = (b, *at, h), h // (heads // kv_heads)
            # The entries in the softmax: first the keys, then the zeros outside the map.
            keys = [u for u, (kind, place, _, _) in enumerate(window) if kind == KEY and mask[(b, *place)]]
            zeros = [u for u, (kind, _, _, _) in enumerate(window) if kind == ZERO and border == "zero"]
            entries = keys + zeros
            places = (b, *np.array([window[u][1] for u in keys], int).reshape(-1, len(at)).T, kv_head)
            relative = (h, *(np.array([window[u][2] for u in entries], int).reshape(-1, len(at)) + offset_shift).T)
            per_axis = np.array([window[u][3] for u in entries], int).reshape(-1, len(at)).T

            key_scores = scale * key[places] @ query[here]
            scores = np.concatenate([key_scores, np.zeros(len(zeros))])
            if bias is not None:
                scores = scores + full_bias[here][entries]
            if rel_pos_bias is not None:
                scores = scores + rel_pos_bias[relative]
            for axis, tensor in enumerate(full_axis_bias):
                if tensor is not None:
                    scores = scores + tensor[here][per_axis[axis]]
            largest = max(scores, default=-math.inf)
            if largest == -math.inf:
                output[here], lse[here] = 0, -math.inf
                continue
            weights = np.exp(scores - largest)
            lse[here] = largest + math.log(weights.sum())
            weights = weights / weights.sum()
            output[here] = weights[: len(keys)] @ value[places]
            if grad_output is None:
                continue
            along = grad_output[here]
            towards = np.concatenate([value[places] @ along, np.zeros(len(zeros))])
            grad_scores = weights * (towards - weights @ towards + (0.0 if grad_lse is None else grad_lse[here]))
            grad_keys = grad_scores[: len(keys)]
            grads["query"][here] = scale * grad_keys @ key[places]
            np.add.at(grads["key"], places, scale * np.outer(grad_keys, query[here]))
            np.add.at(grads["value"], places, np.outer(weights[: len(keys)], along))
            if bias is not None:
                grads["bias"][here][entries] = grad_scores
            if rel_pos_bias is not None:
                np.add.at(grads["rel_pos_bias"], relative, grad_scores)
            for axis, tensor in enumerate(full_axis_bias):
                if tensor is not None:
                    np.add.at(grads[f"axis_bias[{axis}]"][here], per_axis[axis], grad_scores)

    def summed_to(gradient, tensor):
        if tensor is None:
            return None
        gradient = gradient.sum(axis=tuple(range(gradient.ndim - tensor.ndim)))
        stretched = tuple(i for i, size in enumerate(tensor.shape) if size == 1 and gradient.shape[i] != 1)
        return gradient.sum(axis=stretched, keepdims=True)

    grads["bias"] = summed_to(grads["bias"], bias)
    for axis, tensor in enumerate(axis_bias):
        grads[f"axis_bias[{axis}]"] = summed_to(grads[f"axis_bias[{axis}]"], tensor)
    return output, lse, grads
