"""The operators under torch's machinery: opcheck, compile, export, vmap, FLOP counter."""

import brute_force
import pytest
import torch
from configurations import laid_out
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import localattn


def problem(extent=(5, 6), key_extent=None, layout="contiguous", dtype=torch.float64, requires_grad=True, batch=2):
    generator = torch.Generator().manual_seed(0)
    key_extent = key_extent or extent

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    shapes = ((batch, *extent, 4, 6), (batch, *key_extent, 2, 6), (batch, *key_extent, 2, 5))
    return [laid_out(numbers(*shape), layout).requires_grad_(requires_grad) for shape in shapes]


def options(extent=(5, 6), key_extent=None, dtype=torch.float64):
    """Every kind of argument at once, for a kernel_size of 3."""
    biases = [
        torch.randn(4, 9, dtype=dtype),
        torch.randn(4, 5, 5, dtype=dtype),
        torch.randn(1, 1, 6, 4, 3, dtype=dtype),
    ]
    bias, rel_pos_bias, axis_bias = (b.requires_grad_() for b in biases)
    return {
        "border": "zero",
        "is_causal": (False, True),
        "bias": bias,
        "rel_pos_bias": rel_pos_bias,
        "axis_bias": [None, axis_bias],
        "key_mask": torch.rand(2, *(key_extent or extent)) < 0.8,
        "enable_gqa": True,
    }


def native(query, key, value, **chosen):
    """The native operator's arguments."""
    defaults = {
        "stride": 1, "dilation": 1, "is_causal": False, "border": "mask", "scale": None, "bias": None,
        "rel_pos_bias": None, "axis_bias": None, "key_mask": None, "enable_gqa": True,
    }  # fmt: skip
    return localattn.ops._native_arguments(query, key, value, 3, **{**defaults, **chosen})


@pytest.mark.parametrize("layout", ["contiguous", "channels_first", "sliced", "flipped_axes", "expanded_batch"])
@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck(layout, with_options):
    arguments = native(*problem(layout=layout), **(options() if with_options else {}))
    torch.library.opcheck(torch.ops.localattn.attention.default, arguments)


@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
@pytest.mark.parametrize(("layout", "with_options"), [("contiguous", True), ("channels_first", False)])
def test_opcheck_of_the_backward(layout, with_options, check):
    if check == "test_aot_dispatch_dynamic" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip("before torch 2.13 index_select at a symbolic size fails inside torch.func.vjp: isIntList()")
    arguments = native(*problem(layout=layout), **(options() if with_options else {}))
    output, lse = (t.detach() for t in torch.ops.localattn.attention(*arguments))
    needed = [True] * 3 + [b is not None for b in arguments[10:15]]
    grads = (torch.randn_like(output, requires_grad=True), torch.randn_like(lse, requires_grad=True))
    torch.library.opcheck(
        torch.ops.localattn.attention_backward.default,
        (*grads, *arguments[:3], output, lse, *arguments[3:], needed),
        test_utils=check,
    )


def step(query, key, value, chosen):
    output, lse = localattn.local_attention(query, key, value, 3, return_lse=True, **chosen)
    return output * 2, lse.exp()


def gradients(function, inputs, chosen):
    leaves = [*inputs, *(t for name in ("bias", "rel_pos_bias") if (t := chosen.get(name)) is not None)]
    output, weight = function(*inputs, chosen)
    return (output, weight, *torch.autograd.grad(output.square().sum() + weight.sum(), leaves))


@pytest.mark.parametrize(
    ("backend", "layout", "with_options"),
    [
        ("aot_eager", "contiguous", True),
        ("aot_eager", "channels_first", False),
        ("aot_eager", "sliced", True),
        ("inductor", "contiguous", False),
        ("inductor", "channels_first", True),
        ("inductor", "sliced", False),
    ],
)
def test_compiled_forward_and_backward(backend, layout, with_options):
    torch.compiler.reset()
    inputs, chosen = problem(layout=layout), options() if with_options else {"enable_gqa": True}
    expected = gradients(step, inputs, chosen)
    got = gradients(torch.compile(step, fullgraph=True, backend=backend), inputs, chosen)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)
        assert g.stride() == e.stride()


def test_compiled_between_other_operators():
    """Inductor may choose the layouts of what it computes itself; the results stay the same."""
    torch.compiler.reset()

    def block(image, weight):
        qkv = torch.nn.functional.conv2d(image, weight).unflatten(1, (3, 2, 4)).permute(0, 4, 5, 1, 2, 3)
        query, key, value = qkv.unbind(3)
        output = localattn.local_attention(query.sin(), key * 2, value, 3, border="shift")
        return output.permute(0, 3, 4, 1, 2).flatten(1, 2) + 1

    image = torch.randn(2, 5, 8, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(24, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    expected = block(image, weight)
    got = torch.compile(block, fullgraph=True)(image, weight)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()
    for g, e in zip(*(torch.autograd.grad(r.square().sum(), (image, weight)) for r in (got, expected))):
        torch.testing.assert_close(g, e)


def test_dynamic_shapes_do_not_recompile():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v: localattn.local_attention(q, k, v, 3, enable_gqa=True).sin(),
        fullgraph=True, dynamic=True, backend=counter,
    )  # fmt: skip
    # No two sizes are equal at first: dynamo takes equal ones for the same symbol.
    for extent, batch in (((7, 9), 3), ((11, 8), 10), ((16, 7), 5)):
        inputs = problem(extent, batch=batch)
        torch.testing.assert_close(compiled(*inputs), localattn.local_attention(*inputs, 3, enable_gqa=True).sin())
    assert counter.frame_count == 1


def test_compiled_under_autocast():
    torch.compiler.reset()
    inputs = problem(dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(*inputs, {"enable_gqa": True}), step(*inputs, {"enable_gqa": True})
    assert got[0].dtype == torch.bfloat16
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)


def test_compiled_readable_definition():
    torch.compiler.reset()
    inputs, chosen = problem(), options()

    def definition(*inputs):
        return localattn.reference.local_attention(*inputs, 3, **chosen)

    compiled = torch.compile(definition, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), definition(*inputs))


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return localattn.local_attention(query, key, value, 3, border="shift", enable_gqa=True, return_lse=True)


def test_export():
    inputs = problem(requires_grad=False)
    batch, height = torch.export.Dim("batch", min=1), torch.export.Dim("height", min=2)
    shapes = ({0: batch, 1: height},) * 3
    program = torch.export.export(Attention(), tuple(inputs), dynamic_shapes=shapes)
    assert "localattn.attention.default" in str(program.graph)
    for extent, batch_size in (((5, 6), 2), ((11, 6), 3)):
        inputs = problem(extent, batch=batch_size, requires_grad=False)
        for got, expected in zip(program.module()(*inputs), Attention()(*inputs)):
            assert torch.equal(got, expected)


def test_deepcopy_and_state_of_saved_program(tmp_path):
    inputs = problem(requires_grad=False)
    program = torch.export.export(Attention(), tuple(inputs))
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2")
    for got, expected in zip(loaded.module()(*inputs), Attention()(*inputs)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, 1), (2, 0, None)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_vmap(in_dims, with_bias):
    inputs = problem(requires_grad=False)
    stacked = [
        t if dim is None else torch.stack([t, t * 0.5, t + 1], dim) for t, dim in zip(inputs, in_dims, strict=True)
    ]
    bias = torch.randn(4, 9, dtype=torch.float64) if with_bias else None

    def function(query, key, value):
        return localattn.local_attention(query, key, value, 3, enable_gqa=True, bias=bias, return_lse=True)

    slices = [[t if dim is None else t.select(dim, i) for t, dim in zip(stacked, in_dims)] for i in range(3)]
    expected = [torch.stack(results) for results in zip(*(function(*s) for s in slices))]
    for got, e in zip(torch.vmap(function, in_dims)(*stacked), expected):
        torch.testing.assert_close(got, e)


@pytest.mark.parametrize("with_bias", [False, True])
def test_vectorised_jacobian(with_bias):
    """Batched gradients: vmap over the backward operator."""
    query, key, value = (t.detach() for t in problem((2, 3), batch=1))
    bias = torch.randn(4, 9, dtype=torch.float64) if with_bias else torch.zeros(9, dtype=torch.float64)

    def function(query, key, value, bias):
        return localattn.local_attention(query, key, value, 3, enable_gqa=True, bias=bias if with_bias else None).sum(
            (3, 4)
        )

    inputs = (query, key, value, bias)
    got = torch.autograd.functional.jacobian(function, inputs, vectorize=True)
    for g, e in zip(got, torch.autograd.functional.jacobian(function, inputs)):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"border": "zero", "dilation": (2, 1)},
        {"border": "shift", "stride": 3},
        {"is_causal": True},
        {"is_causal": "raster", "border": "zero"},
    ],
    ids=str,
)
@pytest.mark.parametrize("key_extent", [(5, 6), (3, 13), (0, 6)])
def test_flop_counter(chosen, key_extent):
    inputs = problem(key_extent=key_extent)
    arguments = {"stride": 1, "dilation": 1, "is_causal": (False, False), "border": "mask", **chosen}
    for name in ("stride", "dilation"):
        arguments[name] = localattn.ops.window_options(2, 3, arguments[name], 1, False, "mask").stride
    if arguments["is_causal"] is True:
        arguments["is_causal"] = (True, True)
    pairs = sum(
        kind == brute_force.KEY
        for y in range(5)
        for x in range(6)
        for kind, *_ in brute_force.map_window((y, x), (5, 6), key_extent, (3, 3), **arguments)
    )
    with FlopCounterMode(display=False) as counter:
        localattn.local_attention(*inputs, 3, enable_gqa=True, **chosen).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    forward = 2 * 4 * pairs * 2 * (6 + 5)  # batch, heads, pairs, and two products of widths 6 and 5
    assert counts[torch.ops.localattn.attention] == forward
    assert counts[torch.ops.localattn.attention_backward] == forward * 5 // 2


def test_flop_counter_on_fake_tensors():
    with torch._subclasses.FakeTensorMode(), FlopCounterMode(display=False) as counter:
        query = torch.empty(1, 64, 48, 2, 8)
        localattn.local_attention(query, query, query, (1, 1))
    assert counter.get_total_flops() == 64 * 48 * 2 * 4 * 8
