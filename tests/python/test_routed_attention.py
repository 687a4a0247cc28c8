"""routed_attention against the readable definition: values, derivatives of two orders, tracing, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import localattn
from localattn import reference

# Grid of regions, pixels of a query region, pixels of a key region, choices.
CASES = {
    "squares": ((2, 3), (4, 4), (4, 4), 2),
    "one pixel": ((3, 3), (1, 1), (1, 1), 4),
    "fewer keys": ((2, 2), (6, 5), (2, 3), 3),
    "large regions": ((2, 1), (9, 15), (7, 11), 2),
    "all regions": ((2, 2), (3, 4), (3, 4), 4),
    "no choice": ((2, 2), (3, 3), (3, 3), 0),
}


def inputs(name, dtype=torch.float64, channels=5, width=6, heads=2, requires_grad=False):
    grid, size, kv_size, topk = CASES[name]
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        return torch.randn(2, *shape, generator=generator).to(dtype).requires_grad_(requires_grad)

    query = random(grid[0] * size[0], grid[1] * size[1], heads, channels)
    key = random(grid[0] * kv_size[0], grid[1] * kv_size[1], heads, channels)
    value = random(grid[0] * kv_size[0], grid[1] * kv_size[1], heads, width)
    regions = grid[0] * grid[1]
    index = torch.randint(0, regions, (2, regions, topk), generator=generator)  # with duplicates
    weight = random(regions, topk)
    return query, key, value, index, weight, {"region_size": size, "kv_region_size": kv_size}


@pytest.mark.parametrize("step", [0.02, 2.0, 60.0, 3e4])
def test_scores_that_rise_and_fall_from_key_to_key(step, variant):
    """The softmax streams over the keys: for half of the queries each score is higher than all before, by little, or
    by more than an exponential holds; for the others lower; some queries see all alike."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 20, 20, 1, channels) for channels in (3, 3, 5))
    query[..., 0] = torch.randint(-1, 2, query.shape[:-1])
    index = torch.arange(4).expand(1, 4, 4)
    of_region = torch.arange(400.0).view(2, 2, 10, 10).transpose(1, 2).reshape(1, 20, 20, 1)
    key[..., 0] = (of_region - 200) * step
    results = [
        function.routed_attention(*tensors, index, 10, scale=1.0, return_lse=True)
        for function, tensors in (
            (localattn, (query, key, value)),
            (reference, (query.double(), key.double(), value.double())),
        )
    ]
    for got, want in zip(*results):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_to_the_definition(name, dtype, weighted, variant):
    if variant == "reference" and name == "large regions" and dtype != torch.float32:
        pytest.skip("the slow variant takes large regions in float32 alone")
    *tensors, index, weight, sizes = inputs(name, dtype, requires_grad=True)
    tensors = [*tensors, weight] if weighted else tensors
    wide = [x.detach().double().requires_grad_() for x in tensors]
    results = []
    for function, (query, key, value, *weights) in ((localattn, tensors), (reference, wide)):
        results.append(
            function.routed_attention(
                query, key, value, index, **sizes, region_weight=weights[0] if weights else None, return_lse=True
            )
        )
    eps = torch.finfo(dtype).eps
    for got, want in zip(*results):
        torch.testing.assert_close(got.double(), want, rtol=64 * eps, atol=64 * eps)
    torch.manual_seed(1)
    ones = [torch.randn_like(x) for x in results[0]]
    got = torch.autograd.grad(results[0], tensors, ones)
    if name == "no choice":
        assert all(x.count_nonzero() == 0 for x in got)
        return
    for x, y in zip(got, torch.autograd.grad(results[1], wide, [x.double() for x in ones])):
        torch.testing.assert_close(x.double(), y, rtol=64 * eps, atol=128 * eps * max(1, y.abs().max().item()))


@pytest.mark.parametrize("name", ["squares", "one pixel", "fewer keys"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients(name, weighted, variant):
    query, key, value, index, weight, sizes = inputs(name, channels=2, width=3, heads=1, requires_grad=True)

    def function(query, key, value, weight=None):
        return localattn.routed_attention(
            query, key, value, index, **sizes, region_weight=weight, scale=0.7, return_lse=True
        )

    tensors = (query, key, value, weight) if weighted else (query, key, value)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    if variant != "reference":  # whose second derivatives are the same code
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_routing_to_all_regions_is_global_attention():
    query, key, value, _, _, sizes = inputs("all regions")
    index = torch.arange(4).expand(2, 4, 4)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).unflatten(1, query.shape[1:3])
    torch.testing.assert_close(localattn.routed_attention(query, key, value, index, **sizes), expected)


def test_a_duplicate_counts_twice():
    query, key, value, index, _, sizes = inputs("squares")
    once = index[..., :1]
    output, lse = localattn.routed_attention(query, key, value, once, **sizes, return_lse=True)
    twice, twice_lse = localattn.routed_attention(query, key, value, once.expand(-1, -1, 2), **sizes, return_lse=True)
    torch.testing.assert_close(twice, output)
    torch.testing.assert_close(twice_lse, lse + math.log(2))


@pytest.mark.parametrize("which", range(4))
def test_one_gradient_alone(which):
    query, key, value, index, weight, sizes = inputs("fewer keys", requires_grad=True)
    tensors = [query, key, value, weight]

    def gradient_of(tensors, wanted):
        query, key, value, weight = tensors
        output = localattn.routed_attention(query, key, value, index, **sizes, region_weight=weight)
        return torch.autograd.grad(output.pow(2).sum(), wanted)

    among = gradient_of(tensors, tensors)[which]
    alone = [x.detach() for x in tensors]
    alone[which].requires_grad_()
    assert torch.equal(gradient_of(alone, alone[which])[0], among)


def test_threads_change_no_bit():
    query, key, value, index, weight, sizes = inputs("large regions", torch.float32, requires_grad=True)
    tensors = (query, key, value, weight)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            output = localattn.routed_attention(query, key, value, index, **sizes, region_weight=weight)
            results.append((output, *torch.autograd.grad(output.pow(2).sum(), tensors)))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others))


def test_any_layout():
    query, key, value, index, weight, sizes = inputs("fewer keys")
    expected = localattn.routed_attention(query, key, value, index, **sizes, region_weight=weight)
    channels_first = [x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for x in (query, key, value)]
    output = localattn.routed_attention(
        *channels_first, index.mT.contiguous().mT, **sizes, region_weight=weight.mT.contiguous().mT
    )
    assert output.permute(0, 3, 4, 1, 2).is_contiguous()
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted):
    query, key, value, index, weight, sizes = inputs("fewer keys", torch.float32, requires_grad=True)
    options = (index, list(sizes["region_size"]), list(sizes["kv_region_size"]), weight if weighted else None, None)
    torch.library.opcheck(torch.ops.localattn.routed_attention, (query, key, value, *options))
    output, lse = (x.detach() for x in torch.ops.localattn.routed_attention(query, key, value, *options))
    arguments = (torch.randn_like(output), torch.randn_like(lse), query, key, value, output, lse, *options)
    torch.library.opcheck(torch.ops.localattn.routed_attention_backward, (*arguments, [True, True, True, weighted]))


def test_compile_and_export():
    query, key, value, index, weight, sizes = inputs("squares", torch.float32, requires_grad=True)

    class Module(torch.nn.Module):
        def forward(self, query, key, value, index, weight):
            return localattn.routed_attention(query, key, value, index, **sizes, region_weight=weight)

    arguments = (query, key, value, index, weight)
    expected = Module()(*arguments)
    compiled = torch.compile(Module(), fullgraph=True)(*arguments)
    torch.testing.assert_close(compiled, expected)
    compiled.sum().backward()
    torch.testing.assert_close(torch.export.export(Module(), arguments).module()(*arguments), expected)


def test_vmap():
    query, key, value, index, weight, sizes = inputs("squares")
    queries = torch.stack([query, 2 * query, -query])

    def function(query):
        return localattn.routed_attention(query, key, value, index, **sizes, region_weight=weight)

    torch.testing.assert_close(torch.vmap(function)(queries), torch.stack([function(q) for q in queries]))


def test_flops():
    query, key, value, index, _, sizes = inputs("squares", requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        localattn.routed_attention(query, key, value, index, **sizes).sum().backward()
    forward = 2 * 2 * (8 * 12) * (2 * 16) * 2 * (5 + 6)
    assert counter.get_total_flops() == forward + forward * 5 // 2


def test_autocast():
    query, key, value, index, weight, sizes = inputs("squares", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = localattn.routed_attention(query, key, value, index, **sizes, region_weight=weight)
    assert output.dtype == torch.bfloat16


def test_empty_batch():
    query, key, value, index, weight, sizes = inputs("squares", requires_grad=True)
    output = localattn.routed_attention(query[:0], key[:0], value[:0], index[:0], **sizes, region_weight=weight[:0])
    assert output.shape == (0, 8, 12, 2, 6)
    output.sum().backward()
    assert all((x.grad == 0).all() for x in (query, key, value, weight))


@pytest.mark.parametrize("bad", [-1, 6])
def test_an_index_out_of_range_is_refused(bad):
    query, key, value, index, _, sizes = inputs("squares")
    index[1, 2, 1] = bad
    with pytest.raises(ValueError, match=f"batch 1, region 2, choice 1 is {bad}, but must be from 0 to 5"):
        localattn.routed_attention(query, key, value, index, **sizes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(1, 4, 2, 3)}, ValueError, r"query must be \(batch, height, width, heads, channels\)"),
        ({"key": torch.zeros(1, 4, 4, 1, 3)}, ValueError, "key must have the heads of query, 2"),
        ({"value": torch.zeros(1, 4, 2, 2, 3)}, ValueError, "value must have the batch, extents and heads of key"),
        ({"region_size": 3}, ValueError, r"region_size\[0\] is 3, but must divide query_extent\[0\], which is 4"),
        ({"region_size": 0}, ValueError, "region_size must be at least 1"),
        ({"kv_region_size": 1}, ValueError, r"kv_region_size\[0\] is 1, which makes 4 regions"),
        ({"region_index": torch.zeros(1, 4, 2)}, TypeError, "region_index must have dtype"),
        ({"region_index": torch.zeros(1, 3, 2, dtype=torch.int64)}, ValueError, "region_index must have shape"),
        ({"region_weight": torch.zeros(1, 4, 1)}, ValueError, "region_weight must have shape"),
        ({"region_weight": torch.zeros(1, 4, 2).double()}, TypeError, "region_weight must have dtype"),
    ],
)
def test_refuses(change, error, message):
    arguments = {name: torch.zeros(1, 4, 4, 2, 3) for name in ("query", "key", "value")}
    arguments |= {"region_index": torch.zeros(1, 4, 2, dtype=torch.int64), "region_size": 2, **change}
    with pytest.raises(error, match=message):
        localattn.routed_attention(**arguments)
