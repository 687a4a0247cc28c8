"""The published systems from their formulas, pixel by pixel, on a module's ``state_dict``: the tests' judge, which
shares no code with the package. Differentiable, any dtype, channels where each system has them."""

import itertools
import math

import torch
import torch.nn.functional as F


def pointwise(state, name, x):
    """A 1x1 convolution of ``x (B, C, H, W)``."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    result = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x)
    return result if bias is None else result + bias[:, None, None]


def linear(state, name, x):
    """Of the last axis."""
    weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
    return x @ weight.T if bias is None else x @ weight.T + bias


def depthwise(state, name, x):
    """A depthwise convolution of ``x (B, C, H, W)`` that keeps its size."""
    weight = state[f"{name}.weight"]
    size = weight.shape[-1]
    padded = F.pad(x, (size // 2,) * 4)
    height, width = x.shape[2:]
    return state[f"{name}.bias"][:, None, None] + sum(
        weight[:, 0, i, j, None, None] * padded[:, :, i : i + height, j : j + width]
        for i, j in itertools.product(range(size), repeat=2)
    )


# ---- image local attention and its fork ------------------------------------------------------------------------------


def window_entries(fine, coarse, kernel, causal):
    """For each entry of the window around the places of a map's pixels on a coarser one: the pixel's rows and columns
    there, ``(height, width)``, and which of them are on the map."""
    y = torch.arange(fine[0])[:, None] // (fine[0] // coarse[0])
    x = torch.arange(fine[1])[None] // (fine[1] // coarse[1])
    for p in range(kernel[0] * kernel[1] // 2 + 1 if causal else kernel[0] * kernel[1]):
        v, u = torch.broadcast_tensors(y + p // kernel[1] - kernel[0] // 2, x + p % kernel[1] - kernel[1] // 2)
        there = (v >= 0) & (v < coarse[0]) & (u >= 0) & (u < coarse[1])
        yield v.clamp(0, coarse[0] - 1), u.clamp(0, coarse[1] - 1), there


def f_similar(query, key, kernel, causal=False, outside=0.0):
    key = key.repeat_interleave(query.shape[0] // key.shape[0], 0)
    return torch.stack(
        [
            (query * key[:, :, v, u]).sum(1).masked_fill(~there, outside)
            for v, u, there in window_entries(query.shape[2:], key.shape[2:], kernel, causal)
        ],
        -1,
    )


def f_weighting(value, weight, kernel, causal=False):
    value = value.repeat_interleave(weight.shape[0] // value.shape[0], 0)
    entries = window_entries(weight.shape[1:3], value.shape[2:], kernel, causal)
    return sum(
        weight[..., p].masked_fill(~there, 0)[:, None] * value[:, :, v, u] for p, (v, u, there) in enumerate(entries)
    )


def image_local_attention(state, x, kernel, outside=0.0):
    query, key, value = (pointwise(state, name, x) for name in ("conv1", "conv2", "conv3"))
    return f_weighting(value, f_similar(query, key, kernel, outside=outside).softmax(-1), kernel)


# ---- neighbourhood attention -----------------------------------------------------------------------------------------


def neighbours(i, length, kernel, stride, dilation, causal):
    """The neighbours of token i, ascending."""
    group = [j for j in range(length) if j % dilation == i % dilation]
    at = group.index(i)
    if causal:
        leader = min(at // stride * stride + stride - 1, len(group) - 1)
        start = max(leader - kernel + 1, 0)
        return [group[j] for j in range(start, min(start + kernel, len(group))) if group[j] <= i]
    leader = min(at // stride * stride + stride // 2, len(group) - 1)
    start = min(max(leader - kernel // 2, 0), max(len(group) - kernel, 0))
    return group[start : start + kernel]


def neighborhood_attention(
    query, key, value, kernel, stride, dilation, causal, scale, rpb=None, more_keys=None, more_values=None
):
    """``(B, *spatial, heads, D)``; the options one value per axis. Also the log-sum-exps."""
    extent = query.shape[1:-2]
    outputs, lses = [], []
    for i in itertools.product(*map(range, extent)):
        axes = [neighbours(*of_axis) for of_axis in zip(i, extent, kernel, stride, dilation, causal)]
        places = list(itertools.product(*axes))
        index = (slice(None), *torch.tensor(places).T)
        keys, values = key[index], value[index]  # (B, neighbours, heads, D)
        scores = scale * torch.einsum("bhd,bnhd->bhn", query[(slice(None), *i)], keys)
        if rpb is not None:
            offsets = [[(j - c) // d + k - 1 for j, c, d, k in zip(place, i, dilation, kernel)] for place in places]
            scores = scores + rpb[(slice(None), *torch.tensor(offsets).T)]
        if more_keys is not None:
            more = scale * torch.einsum("bhd,bnhd->bhn", query[(slice(None), *i)], more_keys)
            scores, values = torch.cat((scores, more), -1), torch.cat((values, more_values), 1)
        outputs.append(torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outputs, 1).unflatten(1, extent), torch.stack(lses, 1).unflatten(1, extent)


def neighborhood_module(state, x, heads, kernel, stride, dilation, causal, scale):
    qkv = linear(state, "qkv", x).unflatten(-1, (3, heads, -1))
    query, key, value = qkv.unbind(-3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output, _ = neighborhood_attention(query, key, value, kernel, stride, dilation, causal, scale, rpb=state.get("rpb"))
    return linear(state, "proj", output.flatten(-2))


# ---- halo attention --------------------------------------------------------------------------------------------------


def halo_attention(state, x, heads, block, halo, stride, avg_down, scale_pos_embed, border="zero"):
    height_rel, width_rel = state["pos_embed.height_rel"], state["pos_embed.width_rel"]
    dk = height_rel.shape[1]
    pooled = stride == 2 and (avg_down or block % 2 == 1)
    step = 1 if pooled else stride
    query = pointwise(state, "q", x)[:, :, ::step, ::step].unflatten(1, (heads, dk))
    kv = pointwise(state, "kv", x).unflatten(1, (heads, -1))
    win, (height, width) = block + 2 * halo, x.shape[2:]
    u, v = (entry.flatten() for entry in torch.meshgrid(torch.arange(win), torch.arange(win), indexing="ij"))
    pixels = []
    for y, x_ in itertools.product(range(query.shape[3]), range(query.shape[4])):
        by, i = divmod(y * step, block)
        bx, j = divmod(x_ * step, block)
        i, j = i // step, j // step
        q, row, column = query[..., y, x_], by * block - halo + u, bx * block - halo + v
        there = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        content = kv[..., row.clamp(0, height - 1), column.clamp(0, width - 1)].masked_fill(~there, 0)
        position = q @ height_rel[u - i + win - 1].T + q @ width_rel[v - j + win - 1].T
        logits = torch.einsum("bhd,bhde->bhe", q, content[:, :, :dk]) * dk**-0.5
        logits = logits + position * (dk**-0.5 if scale_pos_embed else 1)
        if border == "mask":
            logits = logits.masked_fill(~there, -math.inf)
        pixels.append(torch.einsum("bhe,bhde->bhd", logits.softmax(-1), content[:, :, dk:]).flatten(1))
    output = torch.stack(pixels, -1).unflatten(-1, query.shape[3:])
    if not pooled:
        return output
    rows, across = output.shape[2] // 2, output.shape[3] // 2
    return output[:, :, : 2 * rows, : 2 * across].unflatten(3, (across, 2)).unflatten(2, (rows, 2)).mean((3, 5))


# ---- bi-level routing ------------------------------------------------------------------------------------------------


def pool_region(x, mode, tokens, ratio):
    """A region ``(rows, columns, channels)`` to its ``(tokens, channels)``."""
    if mode == "identity":
        return x.flatten(0, 1)
    rows, columns = x.shape[:2]
    reduce = (lambda part: part.flatten(0, 1).amax(0)) if "max" in mode else (lambda part: part.mean((0, 1)))
    if mode.startswith("ada_"):

        def cuts(length):
            return [(i * length // tokens, -(-(i + 1) * length // tokens)) for i in range(tokens)]

        return torch.stack([reduce(x[a:b, c:d]) for a, b in cuts(rows) for c, d in cuts(columns)])
    parts = itertools.product(range(rows // ratio), range(columns // ratio))
    return torch.stack([reduce(x[i * ratio : (i + 1) * ratio, j * ratio : (j + 1) * ratio]) for i, j in parts])


def attend(query, key, value, heads, scale):
    """``(queries, C)``, ``(keys, C)``, ``(keys, Cv)`` to the output and the weights ``(heads, queries, keys)``."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (query, key, value))
    weights = (scale * query @ key.transpose(1, 2)).softmax(-1)
    return (weights @ value).transpose(0, 1).flatten(1), weights


def bilevel_routing(
    state, x, heads, n_win, topk, qk_dim, qk_scale=None, kv_per_win=4, ratio=4, mode="identity", soft=False, diff=False
):
    """``(B, H, W, dim)``, padded where ``n_win`` does not divide it; also the routing and the attention matrix."""
    original = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -original[1] % n_win, 0, -original[0] % n_win))
    height, width = x.shape[1] // n_win, x.shape[2] // n_win
    scale = qk_scale or qk_dim**-0.5
    query, key, value = linear(state, "qkv.qkv", x).split((qk_dim, qk_dim, x.shape[-1]), -1)
    attended = torch.zeros_like(x)
    matrices, all_weights, all_indices = [], [], []
    for b in range(x.shape[0]):

        def region(part, r, b=b):
            y, x_ = r // n_win * height, r % n_win * width
            return part[b, y : y + height, x_ : x_ + width]

        regions = range(n_win**2)
        means = [torch.stack([region(part, r).mean((0, 1)) for r in regions]) for part in (query, key)]
        if not diff:
            means = [mean.detach() for mean in means]
        if "router.emb.weight" in state:
            means = [linear(state, "router.emb", mean) for mean in means]
        logits = scale * means[0] @ means[1].T
        index = logits.argsort(-1, descending=True)[:, :topk]
        weight = logits.gather(1, index).softmax(-1)
        all_indices.append(index)
        all_weights.append(weight)
        pooled = [[pool_region(region(part, r), mode, kv_per_win, ratio) for r in regions] for part in (key, value)]
        rows = []
        for r in regions:
            factors = weight[r] if soft else torch.ones_like(weight[r])
            keys, values = (torch.cat([factors[n] * part[index[r, n]] for n in range(topk)]) for part in pooled)
            output, matrix = attend(region(query, r).flatten(0, 1), keys, values, heads, scale)
            rows.append(output.unflatten(0, (height, width)))
            matrices.append(matrix)
        grid = [torch.cat(rows[i * n_win : (i + 1) * n_win], 1) for i in range(n_win)]
        attended = torch.cat((attended[:b], torch.cat(grid)[None], attended[b + 1 :]))
    if "lepe.weight" in state:
        attended = attended + depthwise(state, "lepe", value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    if "wo.weight" in state:
        attended = linear(state, "wo", attended)
    output = attended[:, : original[0], : original[1]]
    return output, torch.stack(all_weights), torch.stack(all_indices), torch.stack(matrices)


def nchw_routing(state, x, heads, n_win, topk, qk_scale=None):
    """``(B, dim, H, W)``; also the attention matrix ``(B, heads, regions, pixels, topk * pixels)``."""
    batch, dim, *extent = x.shape
    size = [length // n_win for length in extent]
    grid = [-(-length // of_region) for length, of_region in zip(extent, size)]
    scale = qk_scale or dim**-0.5
    query, key, value = pointwise(state, "qkv_linear", x).split(dim, 1)
    padding = [n * of_region - length for n, of_region, length in zip(grid, size, extent)]
    padded = [F.pad(part, (0, padding[1], 0, padding[0])) for part in (query, key, value)]
    maps, matrices = [], []
    for b in range(batch):

        def region(part, r, b=b):
            y, x_ = r // grid[1] * size[0], r % grid[1] * size[1]
            return part[b, :, y : y + size[0], x_ : x_ + size[1]]

        regions = range(grid[0] * grid[1])
        # Means of the pixels that are on the map.
        means = [torch.stack([region(part, r).mean((1, 2)) for r in regions]) for part in (query, key)]
        index = (means[0] @ means[1].T).argsort(-1, descending=True)[:, :topk]
        result = torch.zeros_like(padded[0][b])
        for r in regions:
            pixels = [
                torch.cat([region(part, n).flatten(1).T for n in ([r] if which == 0 else index[r].tolist())])
                for which, part in enumerate(padded)
            ]
            output, matrix = attend(*pixels, heads, scale)
            y, x_ = r // grid[1] * size[0], r % grid[1] * size[1]
            after = [result.shape[1] - y - size[0], result.shape[2] - x_ - size[1]]
            result = result + F.pad(output.T.unflatten(1, size), (x_, after[1], y, after[0]))
            matrices.append(matrix)
        maps.append(result[:, : extent[0], : extent[1]])
    attended = torch.stack(maps)
    if "lepe.weight" in state:
        attended = attended + depthwise(state, "lepe", value)
    matrices = torch.stack(matrices).unflatten(0, (batch, -1)).transpose(1, 2)
    return pointwise(state, "output_linear", attended), matrices


def full_attention(state, prefix, x, heads=8):
    """``(B, H, W, dim)``, with a depthwise convolution of the input where there is one."""
    dim = x.shape[-1]
    query, key, value = linear(state, f"{prefix}.qkv", x).flatten(1, 2).split(dim, -1)
    pixels = [attend(*of_one, heads, (dim // heads) ** -0.5)[0] for of_one in zip(query, key, value)]
    attended = torch.stack(pixels).unflatten(1, x.shape[1:3])
    if f"{prefix}.lepe.weight" in state:
        attended = attended + depthwise(state, f"{prefix}.lepe", x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return linear(state, f"{prefix}.proj", attended)


def block(state, x, topk, pre_norm, routing):
    """BiFormer's block; ``routing`` holds what :func:`bilevel_routing` takes."""

    def norm(name, y):
        y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return y * state[f"{name}.weight"] + state[f"{name}.bias"]

    def of_attention(y):
        if topk > 0:
            part = {name.removeprefix("attn."): p for name, p in state.items() if name.startswith("attn.")}
            return bilevel_routing(part, y, topk=topk, **routing)[0]
        if topk < 0:
            return full_attention(state, "attn", y)
        y = pointwise(state, "attn.1", y.permute(0, 3, 1, 2))
        return pointwise(state, "attn.3", depthwise(state, "attn.2", y)).permute(0, 2, 3, 1)

    def of_mlp(y):
        y = linear(state, "mlp.0", y)
        if "mlp.1.dwconv.weight" in state:
            y = depthwise(state, "mlp.1.dwconv", y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return linear(state, "mlp.3", 0.5 * y * (1 + torch.erf(y / math.sqrt(2))))

    if "pos_embed.weight" in state:
        x = x + depthwise(state, "pos_embed", x)
    x = x.permute(0, 2, 3, 1)
    for number, branch in ((1, of_attention), (2, of_mlp)):
        gamma = state.get(f"gamma{number}", 1)
        if pre_norm:
            x = x + gamma * branch(norm(f"norm{number}", x))
        else:
            x = norm(f"norm{number}", x + gamma * branch(x))
    return x.permute(0, 3, 1, 2)


# ---- efficient attention ---------------------------------------------------------------------------------------------


def efficient_attention(state, x, heads, context=None, mask=None):
    """Also the maps of queries and of keys, ``(B, heads, D, H, W)``."""
    context = x if context is None else context
    query = pointwise(state, "queries", x).unflatten(1, (heads, -1))
    key = pointwise(state, "keys", context).unflatten(1, (heads, -1))
    value = pointwise(state, "values", context).unflatten(1, (heads, -1))
    query = query.exp() / query.exp().sum(2, keepdim=True)
    weights = key.exp()
    if mask is not None:
        weights = weights * mask[:, None, None]
    key = weights / weights.sum((3, 4), keepdim=True)
    summed = torch.einsum("bhcyx,bhdyx->bhcd", key, value)
    attended = torch.einsum("bhcd,bhcyx->bhdyx", summed, query).flatten(1, 2)
    return pointwise(state, "reprojection", attended) + x, query, key
