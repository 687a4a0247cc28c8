"""similarity and weighting against the readable definition: values, derivatives of two orders, tracing, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import localattn
from localattn import reference

WINDOWS = {
    "plain": ((6, 7), (6, 7), {"kernel_size": (3, 5)}),
    "zero": ((6, 7), (6, 7), {"kernel_size": (4, 3), "border": "zero"}),
    "shift": ((5, 6), (5, 6), {"kernel_size": 3, "border": "shift"}),
    "larger than the image": ((3, 2), (3, 2), {"kernel_size": 5, "border": "shift"}),
    "stride": ((7, 8), (7, 8), {"kernel_size": 5, "stride": (2, 3)}),
    "dilation": ((7, 9), (7, 9), {"kernel_size": 3, "dilation": (2, 3), "border": "zero"}),
    "causal": ((6, 6), (6, 6), {"kernel_size": 3, "is_causal": (True, False)}),
    "raster": ((5, 6), (5, 6), {"kernel_size": 3, "is_causal": "raster", "border": "zero"}),
    "finer queries": ((6, 9), (3, 3), {"kernel_size": 3, "border": "zero"}),
    "finer keys": ((3, 4), (7, 9), {"kernel_size": (2, 3)}),
    "1D": ((19,), (19,), {"kernel_size": 5}),
    "3D": ((3, 4, 5), (3, 4, 5), {"kernel_size": (1, 2, 3)}),
}


def inputs(name, dtype=torch.float64, channels=3, requires_grad=False):
    query_extent, key_extent, options = WINDOWS[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def random(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_(requires_grad)

    query, key = random(2, *query_extent, 2, channels), random(2, *key_extent, 2, channels)
    window = reference.similarity(query.detach(), key.detach(), **options).shape[-1]
    return query, key, random(2, *query_extent, 2, window), options


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equal_to_the_definition(name, dtype, variant):
    query, key, weights, options = inputs(name, dtype)
    tolerance = {
        "rtol": 4 * torch.finfo(dtype).eps,
        "atol": 20 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps,
    }
    wanted = reference.similarity(query, key, **options)
    torch.testing.assert_close(localattn.similarity(query, key, **options), wanted, **tolerance)
    wanted = reference.weighting(weights, key, **options)
    torch.testing.assert_close(localattn.weighting(weights, key, **options), wanted, **tolerance)


@pytest.mark.parametrize("name", WINDOWS)
def test_gradients(name, variant):
    query, key, weights, options = inputs(name, requires_grad=True)
    similarity = lambda q, k: localattn.similarity(q, k, fill=2.0, **options).clamp(min=-1e3)  # noqa: E731
    weighting = lambda w, v: localattn.weighting(w, v, **options)  # noqa: E731
    for function, arguments in ((similarity, (query, key)), (weighting, (weights, key))):
        assert torch.autograd.gradcheck(function, arguments, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "raster", "finer queries"])
def test_third_derivative_exists(name):
    query, key, _, options = inputs(name, requires_grad=True)
    result = localattn.similarity(query, key, fill=0.0, **options).clamp(min=-9).pow(4).sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(result, query, create_graph=True)
        result = gradient.pow(2).sum()
    assert result.isfinite()
    assert result.item() != 0


@pytest.mark.parametrize("border", ["mask", "zero", "shift"])
@pytest.mark.parametrize("fill", [None, -10000.0, math.nan])
def test_fill(border, fill):
    query = torch.randn(1, 4, 5, 1, 3)
    options = {"kernel_size": 3, "border": border, "fill": fill}
    torch.testing.assert_close(
        localattn.similarity(query, query, **options), reference.similarity(query, query, **options), equal_nan=True
    )


def test_what_is_no_key_is_ignored():
    weights = torch.randn(1, 4, 5, 1, 9)
    value = torch.randn(1, 4, 5, 1, 3)
    scores = localattn.similarity(value, value, 3)
    poisoned = weights.masked_fill(scores == -math.inf, math.nan).requires_grad_()
    output = localattn.weighting(poisoned, value, 3)
    assert torch.equal(output, localattn.weighting(weights, value, 3))
    output.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[scores == -math.inf] == 0).all()


def test_the_pair_with_a_softmax_is_local_attention():
    query, key, value = (torch.randn(2, 9, 10, 2, 8) for _ in range(3))
    weights = localattn.similarity(query * 8**-0.5, key, 5).softmax(-1)
    torch.testing.assert_close(
        localattn.weighting(weights, value, 5), localattn.local_attention(query, key, value, 5), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["plain", "raster", "finer keys"])
def test_opcheck(name):
    query, key, weights, options = inputs(name, torch.float32, requires_grad=True)
    rank = query.dim() - 3
    window = localattn._arguments.window_options(
        rank, options["kernel_size"], 1, 1, options.get("is_causal", False), options.get("border", "mask")
    )
    torch.library.opcheck(torch.ops.localattn.similarity, (query, key, *window, 0.0))
    torch.library.opcheck(torch.ops.localattn.similarity, (query, key, *window, None, True))
    torch.library.opcheck(torch.ops.localattn.weighting, (weights, key, *window))
    torch.library.opcheck(torch.ops.localattn.weighting_transpose, (weights, query, key.shape[1:-2], *window))


def test_channels_first_stays_channels_first():
    maps = [torch.randn(2, 6, 5, 7) for _ in range(2)]
    query, key = (x.unflatten(1, (2, 3)).permute(0, 3, 4, 1, 2) for x in maps)
    weights = localattn.similarity(query, key, 3, border="zero")
    output = localattn.weighting(weights, key, 3)
    assert output.permute(0, 3, 4, 1, 2).is_contiguous()
    assert weights.is_contiguous()
    expected = localattn.weighting(weights, key.contiguous(), 3)
    assert expected.is_contiguous()
    torch.testing.assert_close(output, expected)


def test_compile_and_export():
    query, key, _, _ = inputs("plain", torch.float32, requires_grad=True)

    class Pair(torch.nn.Module):
        def forward(self, query, key):
            weights = localattn.similarity(query, key, (3, 5)).softmax(-1)
            return localattn.weighting(weights, key, (3, 5))

    expected = Pair()(query, key)
    torch.testing.assert_close(torch.compile(Pair(), fullgraph=True)(query, key), expected)
    exported = torch.export.export(Pair(), (query, key)).module()
    torch.testing.assert_close(exported(query, key), expected)


def test_vmap():
    query, key = torch.randn(3, 2, 5, 6, 1, 4), torch.randn(2, 5, 6, 1, 4)
    mapped = torch.vmap(lambda q: localattn.similarity(q, key, 3))(query)
    torch.testing.assert_close(mapped, torch.stack([localattn.similarity(q, key, 3) for q in query]))
    mapped = torch.vmap(lambda w: localattn.weighting(w, key, 3))(mapped)
    assert mapped.shape == query.shape


def test_flops():
    query = torch.randn(2, 6, 7, 3, 4, requires_grad=True)
    pairs = int((localattn.similarity(query[:1, :, :, :1], query[:1, :, :, :1], 3) > -math.inf).sum())
    with FlopCounterMode(display=False) as counter:
        scores = localattn.similarity(query, query, 3, fill=0.0)
        localattn.weighting(scores, query, 3).sum().backward()
    assert counter.get_total_flops() == 6 * (2 * 3 * pairs * 2 * 4)


def test_autocast():
    query = torch.randn(1, 5, 5, 1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert localattn.similarity(query, query, 3).dtype == torch.bfloat16
        assert localattn.weighting(torch.randn(1, 5, 5, 1, 9), query, 3).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 0}, ValueError, r"kernel_size\[0\] is 0, but must be from 1"),
        ({"stride": 4}, ValueError, r"stride\[0\] is 4, but must be at most kernel_size"),
        ({"border": "wrap"}, ValueError, "border must be one of 'mask', 'zero', 'shift', got 'wrap'"),
        ({"key": torch.zeros(1, 4, 4, 1, 5)}, ValueError, "key must have the width of query, 3"),
        ({"key": torch.zeros(1, 4, 4, 2, 3)}, ValueError, "key must have the heads of query, 1"),
        ({"key": torch.zeros(2, 4, 4, 1, 3)}, ValueError, "key must have the batch of query, 1"),
        ({"key": torch.zeros(1, 4, 4, 3)}, ValueError, "key must have as many dimensions as query, 5"),
        ({"key": torch.zeros(1, 4, 4, 1, 3, dtype=torch.float64)}, TypeError, "key must have dtype"),
        ({"key": None}, TypeError, "key must be a Tensor, got NoneType"),
        ({"query": torch.zeros(1, 4, 4, 1, 3, dtype=torch.int32), "key": torch.zeros(1, 4, 4, 1, 3, dtype=torch.int32)},
         TypeError, "query must be float32, float64, float16 or bfloat16"),
    ],
)  # fmt: skip
def test_similarity_refuses(change, error, message):
    arguments = {"query": torch.zeros(1, 4, 4, 1, 3), "key": torch.zeros(1, 4, 4, 1, 3), "kernel_size": 3, **change}
    with pytest.raises(error, match=message):
        localattn.similarity(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.zeros(1, 4, 4, 1, 8)}, ValueError, "weights must have 9 window entries, got 8"),
        ({"is_causal": "raster"}, ValueError, "weights must have 5 window entries, got 9"),
        ({"value": torch.zeros(1, 4, 4, 2, 3)}, ValueError, "value must have the heads of weights, 1"),
        ({"value": torch.zeros(1, 4, 4, 1, 0)}, ValueError, "value must have at least 1 channel"),
    ],
)
def test_weighting_refuses(change, error, message):
    arguments = {"weights": torch.zeros(1, 4, 4, 1, 9), "value": torch.zeros(1, 4, 4, 1, 3), "kernel_size": 3, **change}
    with pytest.raises(error, match=message):
        localattn.weighting(**arguments)


@pytest.mark.parametrize("shape", [(0, 4, 4, 1, 3), (1, 0, 4, 1, 3)])
def test_empty(shape):
    query = torch.zeros(shape, requires_grad=True)
    scores = localattn.similarity(query, query, 3)
    assert scores.shape == (*shape[:-1], 9)
    output = localattn.weighting(scores, query, 3)
    assert output.shape == shape
    output.sum().backward()
    assert query.grad.shape == shape


def test_no_keys():
    query, key = torch.randn(1, 4, 4, 1, 3), torch.zeros(1, 0, 4, 1, 3)
    assert (localattn.similarity(query, key, 3, border="zero") == -math.inf).all()
    assert (localattn.weighting(torch.randn(1, 4, 4, 1, 9), key, 3) == 0).all()
