"""Random configurations of every option of the published systems, against their formulas written pixel by pixel:
results and every gradient, whatever the input's memory layout; parameter names are those the formulas read."""

import os

import published_systems as formulas
import pytest
import torch
from configurations import SEED
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from localattn import compat, nn

EXAMPLES = int(os.environ.get("LOCALATTN_TEST_EXAMPLES", "10"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def random_cases(build):
    """A test of that many random cases in each dtype; ``build(draw)`` makes a case, which says how it fails."""

    def decorated(check):
        @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
        def test(dtype):
            @seed(SEED)
            @settings(max_examples=EXAMPLES)
            @given(
                st.composite(build)(), st.integers(0, 2**31 - 1), st.sampled_from(["contiguous", "permuted", "sliced"])
            )
            def checked(case, numbers, layout):
                torch.manual_seed(numbers)
                check(case, dtype, layout)

            checked()

        test.__name__ = check.__name__
        test.__doc__ = check.__doc__
        return test

    return decorated


def laid_out(x, layout):
    """The same numbers, otherwise in memory."""
    if layout == "permuted":
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    elif layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        x = wide[..., 1::2]
    return x.detach().requires_grad_()


def random_parameters(module):
    """Of a size at which every parameter matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape) * fan_in**-0.5)
    return module


def agree(got, expected, got_inputs, expected_inputs, dtype):
    """All results, and the gradients of their weighted sum with respect to the inputs (by name)."""

    def close(what, one, other):
        size = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        torch.testing.assert_close(
            one.to(other.dtype), other, rtol=0, atol=TOLERANCE[dtype] * size, msg=lambda text: f"{what}: {text}"
        )

    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.dtype == (dtype if one.is_floating_point() else torch.int64)
        assert one.shape == other.shape, number
        close(f"result {number}", one, other)
    floating = [number for number, other in enumerate(expected) if other.requires_grad]
    weights = {number: torch.randn_like(expected[number]) for number in floating}
    sums = [
        sum((weights[number].to(results[number].dtype) * results[number]).sum() for number in floating)
        for results in (got, expected)
    ]
    assert got_inputs.keys() == expected_inputs.keys()
    for name in got_inputs:
        one, other = (
            torch.autograd.grad(total, inputs[name], retain_graph=True, allow_unused=True)[0]
            for total, inputs in zip(sums, (got_inputs, expected_inputs))
        )
        if other is None:
            other = torch.zeros_like(expected_inputs[name])
        close(f"gradient of {name}", torch.zeros_like(other, dtype=dtype) if one is None else one, other)


def check_module(module, formula, inputs, dtype, layout, **more):
    """``module(*inputs)`` against ``formula(state, *inputs)``, which give as many results."""
    module = random_parameters(module).to(dtype)
    state = {name: p.detach().double().requires_grad_() for name, p in module.state_dict().items()}
    ours = {str(i): laid_out(x.to(dtype), layout) for i, x in enumerate(inputs)}
    exact = {name: x.detach().double().requires_grad_() for name, x in ours.items()}
    got, expected = module(*ours.values(), **more), formula(state, *exact.values())
    got, expected = (results if isinstance(results, tuple) else (results,) for results in (got, expected))
    agree(got, expected, {**dict(module.named_parameters()), **ours}, {**state, **exact}, dtype)


def sizes(draw, low, high, multiple=1):
    return tuple(draw(st.integers(low, high)) * multiple for _ in range(2))


# ---- image local attention and its fork ------------------------------------------------------------------------------


def _image_local(draw):
    fork = draw(st.booleans())
    causal = fork and draw(st.booleans())
    kernel = tuple(2 * k + 1 for k in sizes(draw, 0, 3)) if causal else sizes(draw, 1, 7)
    extent, ratio = sizes(draw, 1, 6), sizes(draw, 1, 3) if fork else (1, 1)
    return {
        "fork": fork,
        "causal": causal,
        "kernel": kernel,
        "keys": (draw(st.integers(1, 2)), draw(st.integers(1, 20)), *extent),
        "repeats": draw(st.integers(1, 2)) if fork else 1,
        "extent": tuple(a * b for a, b in zip(extent, ratio)),
    }


@random_cases(_image_local)
def test_image_local_attention_functions(case, dtype, layout):
    package = compat.image_local_attention_fork if case["fork"] else compat.image_local_attention
    arguments = (*case["kernel"], *([case["causal"]] if case["fork"] else []))
    batch, channels = case["keys"][0] * case["repeats"], case["keys"][1]
    query, key, value = (
        laid_out(torch.randn(shape).to(dtype), layout)
        for shape in ((batch, channels, *case["extent"]), case["keys"], case["keys"])
    )
    entries = case["kernel"][0] * case["kernel"][1]
    weight = torch.randn(batch, *case["extent"], entries // 2 + 1 if case["causal"] else entries)
    weight = laid_out(weight.to(dtype), layout)
    inputs = {"query": query, "key": key, "value": value, "weight": weight}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    outside = -10000.0 if case["fork"] else 0.0
    got = (package.f_similar(query, key, *arguments), package.f_weighting(value, weight, *arguments))
    expected = (
        formulas.f_similar(exact["query"], exact["key"], case["kernel"], case["causal"], outside),
        formulas.f_weighting(exact["value"], exact["weight"], case["kernel"], case["causal"]),
    )
    inside = expected[0] != outside  # compared apart, so that -10000 is not what errors are measured by
    assert torch.equal(got[0] == outside, ~inside)
    got, expected = ((scores.masked_fill(~inside, 0), pixels) for scores, pixels in (got, expected))
    agree(got, expected, inputs, exact, dtype)


def _image_local_module(draw):
    where = draw(st.sampled_from(["nn", "original", "plain", "fork"]))
    return where, (draw(st.integers(1, 4)), draw(st.integers(1, 18)), *sizes(draw, 1, 7)), sizes(draw, 1, 8)


@random_cases(_image_local_module)
def test_image_local_attention_modules(case, dtype, layout):
    where, arguments, size = case
    make = {
        "nn": nn.LocalAttention,
        "original": compat.image_local_attention.LocalAttention,
        "plain": compat.image_local_attention.TorchLocalAttention,
        "fork": compat.image_local_attention_fork.LocalAttention,
    }[where]
    outside = -10000.0 if where == "fork" else 0.0
    x = torch.randn(2, arguments[0], *size)
    check_module(
        make(*arguments),
        lambda state, x: formulas.image_local_attention(state, x, arguments[2:], outside),
        (x,), dtype, layout,
    )  # fmt: skip


# ---- neighbourhood attention -----------------------------------------------------------------------------------------


def _neighbourhood(draw):
    release = draw(st.sampled_from([17, 21]))
    rank = draw(st.integers(1, 3))
    longest, largest = {1: (16, 9), 2: (7, 5), 3: (4, 3)}[rank]

    def per_axis(strategy):
        return tuple(draw(strategy) for _ in range(rank))

    kernel = per_axis(st.integers(1, largest))
    return {
        "release": release,
        "extent": per_axis(st.integers(1, longest)),
        "kernel": kernel,
        "stride": tuple(draw(st.integers(1, k)) for k in kernel) if release == 21 else (1,) * rank,
        "dilation": per_axis(st.integers(1, 3)),
        "causal": per_axis(st.booleans()),
        "heads": draw(st.integers(1, 3)),
        "width": draw(st.integers(1, 9)),
        "bias": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.0, 0.7])),
        "more": draw(st.sampled_from([0, 0, 1, 3])),
    }


@random_cases(_neighbourhood)
def test_neighborhood_attention_calls(case, dtype, layout):
    rank, heads, width = len(case["extent"]), case["heads"], case["width"]
    shape = (2, *case["extent"], heads, width)
    inputs = {name: laid_out(torch.randn(shape).to(dtype), layout) for name in ("query", "key", "value")}
    if case["more"]:
        for name in ("more_keys", "more_values"):
            inputs[name] = laid_out(torch.randn(2, case["more"], heads, width).to(dtype), layout)
    if case["bias"] and case["release"] == 17:
        inputs["rpb"] = laid_out(torch.randn(heads, *(2 * k - 1 for k in case["kernel"])).to(dtype), layout)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    scale = width**-0.5 if case["scale"] is None else case["scale"]
    expected = formulas.neighborhood_attention(
        exact["query"], exact["key"], exact["value"], case["kernel"], case["stride"], case["dilation"], case["causal"],
        scale, exact.get("rpb"), exact.get("more_keys"), exact.get("more_values"),
    )  # fmt: skip
    maps = (inputs["query"], inputs["key"], inputs["value"], case["kernel"])
    more = {"additional_keys": inputs.get("more_keys"), "additional_values": inputs.get("more_values")}
    if case["release"] == 21:
        call = getattr(compat.natten, f"na{rank}d")
        got = call(*maps, case["stride"], case["dilation"], case["causal"], case["scale"], **more, return_lse=True)
    else:
        call = getattr(compat.natten017.functional, f"na{rank}d")
        got = (call(*maps, case["dilation"], case["causal"], inputs.get("rpb"), case["scale"], **more),)
        expected = expected[:1]
    agree(got, expected, inputs, exact, dtype)
    if case["release"] == 17 and all(k % 2 for k in case["kernel"]):
        query, key, value = (x.movedim(-2, 1) for x in maps[:3])
        more = {name: None if x is None else x.transpose(1, 2) for name, x in more.items()}
        window = {"kernel_size": case["kernel"], "dilation": case["dilation"], "is_causal": case["causal"]}
        functional = compat.natten017.functional
        scores = getattr(functional, f"na{rank}d_qk")(
            query * scale, key, additional_keys=more["additional_keys"], rpb=inputs.get("rpb"), **window
        )
        unfused = getattr(functional, f"na{rank}d_av")(
            scores.softmax(-1), value, additional_values=more["additional_values"], **window
        )
        agree((unfused.movedim(1, -2),), expected, inputs, exact, dtype)


@random_cases(_neighbourhood)
def test_neighborhood_attention_modules(case, dtype, layout):
    heads, rank = case["heads"], len(case["extent"])
    dim = heads * case["width"]
    options = {"kernel_size": case["kernel"], "dilation": case["dilation"], "is_causal": case["causal"]}
    options |= {"rel_pos_bias": case["bias"], "qkv_bias": case["more"] != 1, "qk_scale": case["scale"]}
    name = f"NeighborhoodAttention{rank}D"
    if case["release"] == 17:
        module = getattr(compat.natten017, name)(dim, heads, **options)
    else:
        module = getattr(compat.natten, name)(dim, heads, stride=case["stride"], **options)
    check_module(
        module,
        lambda state, x: formulas.neighborhood_module(
            state, x, heads, case["kernel"], case["stride"], case["dilation"], case["causal"], case["scale"]
        ),
        (torch.randn(2, *case["extent"], dim),), dtype, layout,
    )  # fmt: skip


# ---- halo attention --------------------------------------------------------------------------------------------------


def _halo(draw):
    block = draw(st.integers(1, 8))
    auto_pad = draw(st.integers(0, 3)) == 0
    heads = draw(st.sampled_from([1, 2, 4]))
    options = {
        "dim": draw(st.sampled_from([3, 8, 12])),
        "dim_out": draw(st.sampled_from([None, 4, 8, 20, 40])),
        "stride": draw(st.integers(1, 2)),
        "num_heads": heads,
        "dim_head": draw(st.sampled_from([None, 1, 3, 17])),
        "block_size": block,
        "halo_size": draw(st.integers(0, 5)),
        "qk_ratio": draw(st.sampled_from([1.0, 0.5, 1.7])),
        "qkv_bias": draw(st.booleans()),
        "avg_down": draw(st.booleans()),
        "scale_pos_embed": draw(st.booleans()),
    }
    if options["dim"] == 3 and options["dim_out"] is None:
        options["dim_out"] = 4
    if options["dim_head"] is None and heads == 4:
        options["qk_ratio"] = 1.7
    size = sizes(draw, 1, 12) if auto_pad else sizes(draw, 1, 3, block)
    if options["stride"] == 2:
        size = tuple(max(2, length) for length in size)
    return options, draw(st.sampled_from(["zero", "zero", "mask"])), auto_pad, size


@random_cases(_halo)
def test_halo_attention(case, dtype, layout):
    options, border, auto_pad, size = case
    # Averages at the edges of maps that are no multiple of the blocks are this module's own.
    pooled = options["stride"] == 2 and (options["avg_down"] or options["block_size"] % 2)
    auto_pad = auto_pad and not pooled
    if not auto_pad:
        block = options["block_size"]
        size = tuple(-(-length // block) * block for length in size)
    check_module(
        nn.HaloAttn(**options, border=border, auto_pad=auto_pad),
        lambda state, x: formulas.halo_attention(
            state, x, options["num_heads"], options["block_size"], options["halo_size"], options["stride"],
            options["avg_down"], options["scale_pos_embed"], border,
        ),
        (torch.randn(2, options["dim"], *size),), dtype, layout,
    )  # fmt: skip


# ---- bi-level routing ------------------------------------------------------------------------------------------------


def _routing(draw, dim=None):
    n_win = draw(st.integers(1, 4))
    heads = draw(st.sampled_from([1, 2, 4]))
    mode = draw(st.sampled_from(["identity", "identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]))
    soft = draw(st.booleans())
    diff = soft and draw(st.booleans())
    region = sizes(draw, 1, 5)
    ratio = draw(st.integers(1, min(region)))
    size = [n_win * length for length in region]
    auto_pad = draw(st.booleans())
    if auto_pad:  # fewer pixels, of which regions are as large
        size = [max(1, length - draw(st.integers(0, n_win - 1))) for length in size]
    options = {
        "dim": dim or draw(st.sampled_from([4, 8, 12])),
        "num_heads": heads,
        "n_win": n_win,
        "qk_dim": draw(st.sampled_from([None, 4, 20])),
        "qk_scale": draw(st.sampled_from([None, 0.6])),
        "kv_per_win": draw(st.integers(1, 4)),
        "kv_downsample_ratio": ratio,
        "kv_downsample_mode": mode,
        "topk": draw(st.integers(1, n_win**2)),
        "param_attention": draw(st.sampled_from(["qkvo", "qkv"])),
        "param_routing": diff and draw(st.booleans()),
        "diff_routing": diff,
        "soft_routing": soft,
        "side_dwconv": draw(st.sampled_from([0, 1, 3, 5])),
        "auto_pad": auto_pad,
    }
    return options, size


def routing_formula(options):
    return {
        "heads": options["num_heads"],
        "n_win": options["n_win"],
        "qk_dim": options["qk_dim"] or options["dim"],
        "qk_scale": options["qk_scale"],
        "kv_per_win": options["kv_per_win"],
        "ratio": options["kv_downsample_ratio"],
        "mode": options["kv_downsample_mode"],
        "soft": options["soft_routing"],
        "diff": options["diff_routing"],
    }


@random_cases(_routing)
def test_bilevel_routing(case, dtype, layout):
    options, size = case
    check_module(
        nn.BiLevelRoutingAttention(**options),
        lambda state, x: formulas.bilevel_routing(state, x, topk=options["topk"], **routing_formula(options)),
        (torch.randn(2, *size, options["dim"]),), dtype, layout, ret_attn_mask=True,
    )  # fmt: skip


def _nchw_routing(draw):
    n_win = draw(st.integers(1, 4))
    size = sizes(draw, n_win, 11)
    regions = 1
    for length in size:
        regions *= -(-length // (length // n_win))
    options = {
        "dim": draw(st.sampled_from([4, 8, 20])),
        "num_heads": draw(st.sampled_from([1, 2, 4])),
        "n_win": n_win,
        "qk_scale": draw(st.sampled_from([None, 0.6])),
        "topk": draw(st.integers(1, regions)),
        "side_dwconv": draw(st.sampled_from([0, 3, 5])),
        "auto_pad": draw(st.booleans()),
    }
    return options, size


@random_cases(_nchw_routing)
def test_nchw_routing(case, dtype, layout):
    options, size = case
    check_module(
        nn.nchwBRA(**options),
        lambda state, x: formulas.nchw_routing(
            state, x, options["num_heads"], options["n_win"], options["topk"], options["qk_scale"]
        ),
        (torch.randn(2, options["dim"], *size),), dtype, layout, ret_attn_mask=True,
    )  # fmt: skip


def _block(draw):
    options, size = _routing(draw, dim=8)
    options["topk"] = draw(st.sampled_from([-2, -1, 0, options["topk"], options["topk"]]))
    options |= {
        "layer_scale_init_value": draw(st.sampled_from([-1, 0.5])),
        "mlp_ratio": draw(st.sampled_from([1, 3, 2.5])),
        "mlp_dwconv": draw(st.booleans()),
        "before_attn_dwconv": draw(st.sampled_from([0, 3])),
        "pre_norm": draw(st.booleans()),
        "param_attention": "qkvo",
    }
    if options["topk"] == 0:
        options["side_dwconv"] = 5
    return options, size


@random_cases(_block)
def test_block(case, dtype, layout):
    options, size = case
    check_module(
        nn.Block(**options),
        lambda state, x: formulas.block(state, x, options["topk"], options["pre_norm"], routing_formula(options)),
        (torch.randn(2, 8, *size),), dtype, layout,
    )  # fmt: skip


# ---- efficient attention ---------------------------------------------------------------------------------------------


def _efficient(draw):
    heads = draw(st.integers(1, 3))
    return {
        "heads": heads,
        "channels": (draw(st.integers(1, 9)), *(heads * draw(st.integers(1, 17)) for _ in range(2))),
        "size": sizes(draw, 1, 20),
        "context": (draw(st.integers(1, 5)), *sizes(draw, 1, 9)) if draw(st.booleans()) else None,
        "masked": draw(st.booleans()),
    }


@random_cases(_efficient)
def test_efficient_attention(case, dtype, layout):
    channels, key_channels, value_channels = case["channels"]
    inputs = [torch.randn(2, channels, *case["size"])]
    if case["context"] is not None:
        inputs.append(torch.randn(2, *case["context"]))
    mask = None
    if case["masked"]:
        mask = torch.rand(2, *inputs[-1].shape[2:]) < 0.7
        mask[:, 0, 0] = True
    context_channels = None if case["context"] is None else case["context"][0]
    check_module(
        nn.EfficientAttention(
            channels, key_channels, case["heads"], value_channels, context_channels=context_channels
        ),
        lambda state, *x: formulas.efficient_attention(state, x[0], case["heads"], x[1] if x[1:] else None, mask),
        inputs, dtype, layout, key_mask=mask, return_maps=True,
    )  # fmt: skip
