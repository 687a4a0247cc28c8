"""The readable definition: the operations beside local_attention (which test_random.py checks) against loops, and that
they fit together."""

import itertools
import math

import brute_force
import numpy as np
import pytest
import torch
from configurations import SEED, configurations
from hypothesis import given, seed, settings
from torch.autograd import gradcheck, gradgradcheck

from localattn import reference


def numbers(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def problem_of(configuration):
    """Query, key and value with one head count, the options, and each query's brute-force window."""
    c = configuration
    query = numbers(c.batch, *c.query_extent, 2, c.channels, seed=c.seed)
    key = numbers(c.batch, *c.key_extent, 2, c.channels, seed=c.seed + 1)
    value = numbers(c.batch, *c.key_extent, 2, c.value_channels, seed=c.seed + 2)
    options = {name: getattr(c, name) for name in ("stride", "dilation", "is_causal", "border")}
    windows = {
        at: brute_force.map_window(at, c.query_extent, c.key_extent, c.kernel_size, **options)
        for at in itertools.product(*(range(extent) for extent in c.query_extent))
    }
    return query, key, value, options, windows


@seed(SEED)
@settings(max_examples=100)
@given(configurations())
def test_similarity(configuration):
    query, key, _, options, windows = problem_of(configuration)
    for fill in (None, -10000.0):
        got = reference.similarity(query, key, configuration.kernel_size, **options, fill=fill).detach().numpy()
        outside = fill if fill is not None else 0 if configuration.border == "zero" else -math.inf
        expected = np.full(got.shape, np.nan)
        q, k = query.detach().numpy(), key.detach().numpy()
        for at, window in windows.items():
            for b, u in itertools.product(range(len(q)), range(len(window))):
                kind, place = window[u][:2]
                for head in range(2):
                    if kind == brute_force.KEY:
                        score = q[(b, *at, head)] @ k[(b, *place, head)]
                    else:
                        score = outside if kind == brute_force.ZERO else -math.inf
                    expected[(b, *at, head, u)] = score
        np.testing.assert_allclose(got, expected, atol=1e-12)


@seed(SEED)
@settings(max_examples=100)
@given(configurations())
def test_weighting(configuration):
    query, _, value, options, windows = problem_of(configuration)
    entries = len(next(iter(windows.values())))
    weights = numbers(*query.shape[:-1], entries)
    w, v = weights.detach().numpy().copy(), value.detach().numpy()
    expected = np.zeros((*w.shape[:-1], v.shape[-1]))
    for at, window in windows.items():
        for b, u, head in itertools.product(range(len(w)), range(entries), range(2)):
            kind, place = window[u][:2]
            if kind == brute_force.KEY:
                expected[(b, *at, head)] += w[(b, *at, head, u)] * v[(b, *place, head)]
            else:
                w[(b, *at, head, u)] = math.nan  # is ignored
    got = reference.weighting(torch.from_numpy(w), value, configuration.kernel_size, **options)
    np.testing.assert_allclose(got.detach().numpy(), expected, atol=1e-12)


@seed(SEED)
@settings(max_examples=100)
@given(configurations())
def test_unfused_equals_fused(configuration):
    """softmax between similarity and weighting is local_attention, absent windows aside."""
    query, key, value, options, _ = problem_of(configuration)
    kernel_size = configuration.kernel_size
    output, lse = reference.local_attention(query, key, value, kernel_size, **options, scale=1.0, return_lse=True)
    scores = reference.similarity(query, key, kernel_size, **options)
    unfused = reference.weighting(scores.softmax(-1), value, kernel_size, **options)
    torch.testing.assert_close(output, unfused)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


@pytest.mark.parametrize("options", [{}, {"border": "zero"}, {"border": "shift", "stride": 2}, {"is_causal": "raster"}])
def test_derivatives_of_the_unfused_operations(options):
    query, key, value = numbers(1, 3, 4, 2, 2), numbers(1, 3, 4, 2, 2, seed=1), numbers(1, 3, 4, 2, 3, seed=2)

    def similarity(query, key):
        scores = reference.similarity(query, key, 3, **options)
        return scores.masked_fill(scores.detach() == -math.inf, 0)

    weights = numbers(*similarity(query, key).shape)
    assert gradcheck(similarity, (query, key), fast_mode=True)
    assert gradgradcheck(similarity, (query, key), fast_mode=True)
    assert gradcheck(lambda w, v: reference.weighting(w, v, 3, **options), (weights, value), fast_mode=True)
    assert gradgradcheck(lambda w, v: reference.weighting(w, v, 3, **options), (weights, value), fast_mode=True)


def test_unfused_keeps_the_dtype():
    query = torch.randn(1, 4, 4, 2, 8, dtype=torch.bfloat16)
    scores = reference.similarity(query, query, 3)
    assert scores.dtype == torch.bfloat16
    assert reference.weighting(scores.softmax(-1), query, 3).dtype == torch.bfloat16


def routed_by_loops(query, key, value, index, size, kv_size, weight, scale):
    batch, height, width, heads, _ = query.shape
    grid_width = width // size[1]
    kv_grid_width = key.shape[2] // kv_size[1]
    output, lse = np.zeros((*query.shape[:-1], value.shape[-1])), np.zeros(query.shape[:-1])
    for b, y, x, h in itertools.product(range(batch), range(height), range(width), range(heads)):
        region = y // size[0] * grid_width + x // size[1]
        scores, values = [], []
        for slot, chosen in enumerate(index[b, region]):
            factor = 1.0 if weight is None else weight[b, region, slot]
            top, left = chosen // kv_grid_width * kv_size[0], chosen % kv_grid_width * kv_size[1]
            for v, u in itertools.product(range(top, top + kv_size[0]), range(left, left + kv_size[1])):
                scores.append(scale * query[b, y, x, h] @ (factor * key[b, v, u, h]))
                values.append(factor * value[b, v, u, h])
        scores = np.array(scores)
        lse[b, y, x, h] = scores.max() + math.log(np.exp(scores - scores.max()).sum())
        output[b, y, x, h] = np.exp(scores - lse[b, y, x, h]) @ np.array(values)
    return output, lse


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("size", "kv_size"), [(2, None), ((2, 3), (1, 2))])
def test_routed_attention(size, kv_size, weighted):
    both = (2, 2) if size == 2 else size
    kv_both = both if kv_size is None else kv_size
    grid = (2, 3)
    query = numbers(2, grid[0] * both[0], grid[1] * both[1], 2, 4)
    key = numbers(2, grid[0] * kv_both[0], grid[1] * kv_both[1], 2, 4, seed=1)
    value = numbers(2, grid[0] * kv_both[0], grid[1] * kv_both[1], 2, 3, seed=2)
    index = torch.randint(0, 6, (2, 6, 3), generator=torch.Generator().manual_seed(0))
    index[0, 0] = 5  # a region chosen three times
    weight = numbers(2, 6, 3, seed=3) if weighted else None
    options = {"kv_region_size": kv_size, "region_weight": weight}
    output, lse = reference.routed_attention(query, key, value, index, size, **options, return_lse=True)
    arrays = [t.detach().numpy() for t in (query, key, value, index)]
    expected = routed_by_loops(*arrays, both, kv_both, None if weight is None else weight.detach().numpy(), 4**-0.5)
    np.testing.assert_allclose(output.detach().numpy(), expected[0], atol=1e-12)
    np.testing.assert_allclose(lse.detach().numpy(), expected[1], atol=1e-12)
    inputs = (query, key, value, *([weight] if weighted else []))
    assert gradcheck(
        lambda q, k, v, w=None: reference.routed_attention(
            q, k, v, index, size, kv_region_size=kv_size, region_weight=w, scale=0.7, return_lse=True
        ),
        inputs,
        fast_mode=True,
    )


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"query": torch.zeros(2, 4, 2, 4)}, ValueError, "query"),
        ({"key": torch.zeros(2, 4, 6, 2, 3)}, ValueError, "key"),
        ({"value": torch.zeros(2, 4, 6, 1, 4)}, ValueError, "value"),
        ({"region_size": 3}, ValueError, "region_size"),
        ({"region_size": 0}, ValueError, "region_size"),
        ({"kv_region_size": (4, 3)}, ValueError, "kv_region_size"),
        ({"kv_region_size": 5}, ValueError, "kv_region_size"),
        ({"region_index": torch.zeros(2, 5, 1, dtype=torch.int64)}, ValueError, "region_index"),
        ({"region_index": torch.full((2, 6, 1), 6)}, ValueError, "region_index"),
        ({"region_index": torch.full((2, 6, 1), -1)}, ValueError, "region_index"),
        ({"region_index": torch.zeros(2, 6, 1, dtype=torch.int32)}, TypeError, "region_index"),
    ],
)
def test_bad_input_of_routed_attention(change, error, name):
    x = torch.zeros(2, 4, 6, 2, 4)
    good = {"query": x, "key": x, "value": x, "region_index": torch.zeros(2, 6, 1, dtype=torch.int64), "region_size": 2}
    reference.routed_attention(**good)
    with pytest.raises(error, match=name):
        reference.routed_attention(**{**good, **change})


@pytest.mark.parametrize("extents", [((3, 4), (3, 4)), ((7,), (5,)), ((2, 2, 2), (1, 3, 2))])
def test_linear_attention(extents):
    query, key, value = (numbers(2, *extents[i > 0], 2, 3 + (i > 1), seed=i) for i in range(3))
    mask = torch.rand(2, *extents[1], generator=torch.Generator().manual_seed(0)) < 0.7
    mask[1] = False
    q, k, v = (t.detach().flatten(1, -3) for t in (query, key, value))
    expected = torch.zeros(2, q.shape[1], 2, 4, dtype=torch.float64)
    weights = k[0][mask[0].flatten()].softmax(0)
    context = torch.einsum("phc,phd->hcd", weights, v[0][mask[0].flatten()])
    expected[0] = torch.einsum("phc,hcd->phd", q[0].softmax(-1), context)
    got = reference.linear_attention(query, key, value, key_mask=mask)
    torch.testing.assert_close(got, expected.unflatten(1, extents[0]))
    assert gradcheck(lambda *t: reference.linear_attention(*t, key_mask=mask), (query, key, value), fast_mode=True)
    assert gradgradcheck(lambda *t: reference.linear_attention(*t, key_mask=mask), (query, key, value), fast_mode=True)
    no_keys = reference.linear_attention(query, key[:, :0], value[:, :0])
    assert torch.equal(no_keys, torch.zeros_like(got))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("key", lambda x: reference.similarity(x, x[..., :3], 3)),
        ("weights", lambda x: reference.weighting(x, x, 3)),
        ("value", lambda x: reference.weighting(x.new_zeros(1, 4, 4, 2, 9), x[:, :, :, :1], 3)),
        ("kernel_size", lambda x: reference.similarity(x, x, 0)),
        ("stride", lambda x: reference.similarity(x, x, 3, stride=4)),
        ("dilation", lambda x: reference.similarity(x, x, 3, dilation=0)),
        ("border", lambda x: reference.similarity(x, x, 3, border="wrap")),
        ("raster", lambda x: reference.similarity(x, x, 2, is_causal="raster")),
        ("raster", lambda x: reference.similarity(x, x, 3, is_causal="raster", stride=2)),
        ("raster", lambda x: reference.similarity(x, x, 3, is_causal="raster", border="shift")),
        ("enable_gqa", lambda x: reference.local_attention(x, x[..., :1, :], x[..., :1, :], 3)),
        ("query", lambda x: reference.linear_attention(x[0, 0], x, x)),
        ("value", lambda x: reference.linear_attention(x, x, x[:, :3])),
    ],
)
def test_bad_input(name, call):
    with pytest.raises(ValueError, match=name):
        call(torch.zeros(1, 4, 4, 2, 5))
