"""linear_attention against the readable definition: values, derivatives of two orders, masks, tracing, errors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import localattn
from localattn import reference


def inputs(query_extent, key_extent=None, dtype=torch.float64, channels=5, width=6, heads=2, requires_grad=False):
    generator = torch.Generator().manual_seed(3)
    key_extent = query_extent if key_extent is None else key_extent
    shapes = ((*query_extent, heads, channels), (*key_extent, heads, channels), (*key_extent, heads, width))
    return tuple(
        (2 * torch.randn(2, *shape, generator=generator)).to(dtype).requires_grad_(requires_grad) for shape in shapes
    )


@pytest.mark.parametrize("extents", [((5, 7),), ((300,),), ((3, 4, 5), (2, 9, 8)), ((70, 70), (64, 65))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_the_definition(extents, dtype, masked, variant):
    query, key, value = inputs(*extents, dtype=dtype, requires_grad=True)
    if variant == "reference" and query[0, ..., 0, 0].numel() > 4000:
        query, key, value = (x[:, ::3, ::3].detach().requires_grad_() for x in (query, key, value))
    mask = torch.rand(key.shape[:-2]) < 0.7 if masked else None
    eps = torch.finfo(dtype).eps
    # float64 is compared with float64, whose own sums of thousands of terms round as much.
    allowed = (512 if dtype == torch.float64 else 16) * eps
    wide = tuple(x.detach().double().requires_grad_() for x in (query, key, value))
    expected = reference.linear_attention(*wide, key_mask=mask)
    output = localattn.linear_attention(query, key, value, key_mask=mask)
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=allowed)
    gradient = torch.randn_like(output)
    plain = reference.linear_attention(query, key, value, key_mask=mask)
    for got, near, want in zip(
        torch.autograd.grad(output, (query, key, value), gradient),
        torch.autograd.grad(plain, (query, key, value), gradient),
        torch.autograd.grad(expected, wide, gradient.double()),
    ):
        reached = (near - want).abs().max().item()
        torch.testing.assert_close(
            got.double(), want, rtol=4 * eps, atol=4 * reached + allowed * max(1, want.abs().max().item())
        )


@pytest.mark.parametrize("extents", [((3, 4),), ((6,), (9,)), ((2, 2, 3),)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(extents, masked, variant):
    tensors = inputs(*extents, channels=3, width=2, heads=1, requires_grad=True)
    mask = torch.arange(tensors[1][0, ..., 0, 0].numel()).reshape(tensors[1].shape[1:-2]) % 3 != 1 if masked else None

    def function(query, key, value):
        return localattn.linear_attention(query, key, value, key_mask=mask)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("which", range(3))
def test_one_gradient_alone(which):
    tensors = list(inputs((6, 7)))
    for x in tensors:
        x.requires_grad_()
    among = torch.autograd.grad(localattn.linear_attention(*tensors).pow(2).sum(), tensors)[which]
    alone = [x.detach() for x in tensors]
    alone[which].requires_grad_()
    (gradient,) = torch.autograd.grad(localattn.linear_attention(*alone).pow(2).sum(), alone[which])
    assert torch.equal(gradient, among)


def test_all_keys_masked_gives_zeros(variant):
    tensors = inputs((4, 5), requires_grad=True)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[1] = True
    output = localattn.linear_attention(*tensors, key_mask=mask)
    assert (output[0] == 0).all()
    torch.testing.assert_close(output[1:], localattn.linear_attention(*(x[1:] for x in tensors)))
    output.sum().backward()
    assert all((x.grad[0] == 0).all() and x.grad.isfinite().all() for x in tensors)


def test_masked_keys_may_hold_anything():
    query, key, value = inputs((4, 5))
    mask = torch.rand(2, 4, 5) < 0.5
    poisoned = [x.masked_fill(~mask[..., None, None], float("nan")) for x in (key, value)]
    expected = localattn.linear_attention(query, key, value, key_mask=mask)
    assert torch.equal(localattn.linear_attention(query, *poisoned, key_mask=mask), expected)


def test_threads_change_no_bit():
    tensors = inputs((90, 70), dtype=torch.float32, requires_grad=True)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            output = localattn.linear_attention(*tensors)
            results.append((output, *torch.autograd.grad(output.pow(2).sum(), tensors)))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others))


def test_channels_first_stays_channels_first():
    maps = [torch.randn(2, 8, 9, 11) for _ in range(3)]
    tensors = [x.unflatten(1, (2, 4)).permute(0, 3, 4, 1, 2) for x in maps]
    output = localattn.linear_attention(*tensors)
    assert output.permute(0, 3, 4, 1, 2).is_contiguous()
    torch.testing.assert_close(output, localattn.linear_attention(*(x.contiguous() for x in tensors)))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    tensors = inputs((4, 5), dtype=torch.float32, requires_grad=True)
    mask = torch.rand(2, 4, 5) < 0.7 if masked else None
    torch.library.opcheck(torch.ops.localattn.linear_attention, (*tensors, mask))
    output, context, key_lse = (x.detach() for x in torch.ops.localattn.linear_attention(*tensors, mask))
    arguments = (torch.randn_like(output), *tensors, context, key_lse, mask, [True, True, True])
    torch.library.opcheck(torch.ops.localattn.linear_attention_backward, arguments)


def test_compile_and_export():
    tensors = inputs((6, 7), dtype=torch.float32, requires_grad=True)
    expected = localattn.linear_attention(*tensors)
    compiled = torch.compile(localattn.linear_attention, fullgraph=True)(*tensors)
    torch.testing.assert_close(compiled, expected)
    compiled.sum().backward()

    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return localattn.linear_attention(query, key, value)

    torch.testing.assert_close(torch.export.export(Module(), tensors).module()(*tensors), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_vmap(masked):
    query, key, value = inputs((4, 5))
    mask = torch.rand(2, 4, 5) < 0.7 if masked else None
    queries = torch.stack([query, 2 * query, -query])
    mapped = torch.vmap(lambda q: localattn.linear_attention(q, key, value, key_mask=mask))(queries)
    expected = torch.stack([localattn.linear_attention(q, key, value, key_mask=mask) for q in queries])
    torch.testing.assert_close(mapped, expected)


def test_flops():
    tensors = inputs((4, 5), (3, 3), requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        localattn.linear_attention(*tensors).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 2 * 2 * 5 * 6 * (20 + 9))


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert localattn.linear_attention(*inputs((4, 5), dtype=torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("extents", [((0, 4), (3, 3)), ((3, 3), (0, 4))])
def test_empty_maps(extents, variant):
    tensors = inputs(*extents, requires_grad=True)
    output = localattn.linear_attention(*tensors)
    assert (output == 0).all()
    output.sum().backward()
    assert all((x.grad == 0).all() for x in tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 2)}, ValueError, r"query must be \(batch, one to three spatial axes"),
        ({"key": torch.zeros(2, 3, 2, 5)}, ValueError, "key must have the width of query, 4"),
        ({"key": torch.zeros(2, 3, 1, 4)}, ValueError, "key must have the heads of query, 2"),
        ({"value": torch.zeros(2, 4, 2, 4)}, ValueError, "value must have the batch, extents and heads of key"),
        ({"value": torch.zeros(2, 3, 2, 4).double()}, TypeError, "value must have dtype"),
        ({"value": None}, TypeError, "value must be a Tensor, got NoneType"),
        ({"key_mask": torch.zeros(2, 3)}, TypeError, "key_mask must have dtype"),
        ({"key_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "key_mask must be broadcastable"),
    ],
)
def test_refuses(change, error, message):
    arguments = {name: torch.zeros(2, 3, 2, 4) for name in ("query", "key", "value")} | change
    with pytest.raises(error, match=message):
        localattn.linear_attention(**arguments)
