"""Derivatives: gradcheck and gradgradcheck in float64 over every option, and how gradients come back."""

import pytest
import torch
from configurations import forced
from torch.autograd import gradcheck, gradgradcheck

import localattn

QUERY, KEY, VALUE = (1, 3, 4, 2, 2), (1, 3, 4, 2, 2), (1, 3, 4, 2, 3)
CASES = {
    "mask": {},
    "zero": {"border": "zero"},
    "shift": {"border": "shift"},
    "causal": {"is_causal": True},
    "causal_one_axis": {"is_causal": (False, True), "border": "zero"},
    "causal_shift": {"is_causal": True, "border": "shift"},
    "raster": {"is_causal": "raster"},
    "raster_zero": {"is_causal": "raster", "border": "zero"},
    "even_kernel": {"kernel_size": (2, 4)},
    "larger_than_map": {"kernel_size": (5, 7), "border": "shift"},
    "stride": {"stride": 2, "border": "shift"},
    "stride_mask": {"stride": (1, 3)},
    "dilation": {"dilation": 2},
    "dilation_shift": {"dilation": (1, 2), "border": "shift", "kernel_size": 2},
    "halo": {"kernel_size": 4, "stride": 2, "border": "zero"},
    "scale": {"scale": -0.7},
    "scale_zero": {"scale": 0.0},
    "bias": {"bias": (1, 3, 4, 2, 9)},
    "bias_broadcast": {"bias": (4, 1, 9)},
    "bias_one_number": {"bias": (1,)},
    "rel_pos_bias": {"rel_pos_bias": (2, 5, 5)},
    "rel_pos_bias_shift": {"rel_pos_bias": (2, 5, 5), "border": "shift"},
    "axis_bias": {"axis_bias": ((1, 3, 4, 2, 3), (3, 4, 1, 3)), "border": "zero"},
    "axis_bias_one_axis": {"axis_bias": (None, (1, 3, 4, 2, 3))},
    "all_biases_raster": {
        "bias": (2, 9),
        "rel_pos_bias": (2, 5, 5),
        "axis_bias": ((1, 3, 4, 2, 3), None),
        "is_causal": "raster",
        "border": "zero",
    },
    "key_mask": {"key_mask": (1, 3, 4)},
    "key_mask_zero": {"key_mask": (1, 3, 4), "border": "zero"},
    "finer_keys": {"key": (1, 6, 5, 2, 2), "value": (1, 6, 5, 2, 3)},
    "coarser_keys": {"key": (1, 2, 2, 2, 2), "value": (1, 2, 2, 2, 3), "border": "shift"},
    "no_keys": {"key": (1, 0, 4, 2, 2), "value": (1, 0, 4, 2, 3)},
    "gqa": {"key": (1, 3, 4, 1, 2), "value": (1, 3, 4, 1, 3), "enable_gqa": True},
    "one_axis": {"query": (1, 5, 2, 2), "key": (1, 5, 2, 2), "value": (1, 5, 2, 2)},
    "three_axes": {
        "query": (1, 2, 2, 3, 1, 2),
        "key": (1, 2, 2, 3, 1, 2),
        "value": (1, 2, 2, 3, 1, 2),
        "kernel_size": (1, 2, 3),
        "is_causal": (True, False, False),
    },
}


def problem(case, seed=0):
    """A function of the case's differentiable tensors, and those tensors."""
    options = dict(CASES[case])
    generator = torch.Generator().manual_seed(seed)

    def numbers(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    tensors = {
        "query": numbers(options.pop("query", QUERY)),
        "key": numbers(options.pop("key", KEY)),
        "value": numbers(options.pop("value", VALUE)),
    }
    for name in ("bias", "rel_pos_bias"):
        if name in options:
            tensors[name] = numbers(options.pop(name))
    axis_bias = options.pop("axis_bias", ())
    for axis, shape in enumerate(axis_bias):
        if shape is not None:
            tensors[f"axis_bias[{axis}]"] = numbers(shape)
    if "key_mask" in options:
        options["key_mask"] = torch.rand(options["key_mask"], generator=generator) < 0.6
    kernel_size = options.pop("kernel_size", 3)

    def function(*arguments):
        given = dict(zip(tensors, arguments))
        output, lse = localattn.local_attention(
            given["query"],
            given["key"],
            given["value"],
            kernel_size,
            bias=given.get("bias"),
            rel_pos_bias=given.get("rel_pos_bias"),
            axis_bias=[given.get(f"axis_bias[{axis}]") for axis in range(len(axis_bias))] or None,
            return_lse=True,
            **options,
        )
        # gradcheck cannot take differences of -inf, which is what a query without keys has, whatever the inputs.
        return output, lse.masked_fill(lse.detach() == -torch.inf, 0)

    return function, tuple(tensors.values())


# The fast mode checks the Jacobian along random directions, in a thousandth of the time.
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, variant):
    assert gradcheck(*problem(case), fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_gradgradcheck(case):
    assert gradgradcheck(*problem(case), fast_mode=True)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_whole_jacobian(check):
    query, key, value = (torch.randn(1, 2, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias):
        return localattn.local_attention(query, key, value, 3, border="zero", bias=bias, return_lse=True)

    assert check(function, (query, key, value, bias))


def test_third_derivative():
    function, inputs = problem("zero")

    def gradient(*tensors):
        return torch.autograd.grad(function(*tensors)[0].pow(2).sum(), tensors, create_graph=True)

    assert gradgradcheck(gradient, inputs, fast_mode=True)


@pytest.mark.parametrize("used", ["output", "lse", "both"])
def test_gradients_through_output_and_lse(used):
    function, inputs = problem("zero")
    expected_output, expected_lse = localattn.reference.local_attention(*inputs, 3, border="zero", return_lse=True)
    output, lse = function(*inputs)
    losses = {
        "output": lambda o, _: o.sin().sum(),
        "lse": lambda _, s: s.cos().sum(),
        "both": lambda o, s: o.sum() * s.sum(),
    }
    got = torch.autograd.grad(losses[used](output, lse), inputs, allow_unused=True)
    got = [torch.zeros_like(t) if g is None else g for g, t in zip(got, inputs)]
    expected = torch.autograd.grad(losses[used](expected_output, expected_lse), inputs, materialize_grads=True)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)


def test_only_needed_gradients_are_computed():
    (query, key, value), bias = problem("mask")[1], torch.randn(9, dtype=torch.float64)
    value = value.detach()
    localattn.local_attention(query, key.detach(), value, 3, bias=bias).sum().backward()
    assert query.grad is not None
    assert key.grad is value.grad is bias.grad is None


def test_one_tensor_in_every_role():
    x = torch.randn(2, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: localattn.local_attention(x, x, x, 3), (x,))
    assert gradgradcheck(lambda x: localattn.local_attention(x, x, x, 3), (x,))


def test_expanded_grad_output():
    query, key, value = problem("mask")[1]
    got = torch.autograd.grad(localattn.local_attention(query, key, value, 3).sum(), (query, key, value))
    output = localattn.local_attention(query, key, value, 3)
    expected = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    for g, e in zip(got, expected):
        assert torch.equal(g, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_gradient_has_the_bias_dtype_and_shape(dtype):
    query = torch.randn(2, 4, 4, 2, 8, dtype=dtype)
    bias = torch.randn(1, 1, 4, 2, 9, dtype=dtype, requires_grad=True)
    localattn.local_attention(query, query, query, 3, bias=bias).sum().backward()
    assert bias.grad.shape == bias.shape
    assert bias.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivative_in_lower_precision(dtype):
    function, inputs = problem("bias")
    tensors = [t.detach().to(dtype).requires_grad_() for t in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        (gradient,) = torch.autograd.grad(function(*tensors)[0].square().sum(), tensors[0], create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    (gradient,) = torch.autograd.grad(function(*exact)[0].square().sum(), exact[0], create_graph=True)
    for got, expected in zip(second, torch.autograd.grad(gradient.square().sum(), exact)):
        assert got.dtype == dtype
        tolerance = (2e-5 if dtype == torch.float32 else 0.1) * expected.abs().max()
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=float(tolerance))


def test_backward_twice_needs_retain_graph():
    query, key, value = problem("mask")[1]
    output = localattn.local_attention(query, key, value, 3).sum()
    output.backward(retain_graph=True)
    first = query.grad.clone()
    output.backward()
    assert torch.equal(query.grad, 2 * first)
    with pytest.raises(RuntimeError, match="retain_graph"):
        output.backward()


def test_backward_is_deterministic(variant):
    query, key, value = (torch.randn(2, 9, 17, 3, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 25, requires_grad=True)
    inputs, weight = (query, key, value, bias), torch.randn(2, 9, 17, 3, 8)

    def gradients():
        output = localattn.local_attention(query, key, value, 5, bias=bias)
        return torch.autograd.grad((output * weight).sum(), inputs)

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients()))


def test_variants_agree_on_gradients():
    inputs = [torch.randn(1, 7, 33, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with forced("reference"):
        expected = torch.autograd.grad(localattn.local_attention(*inputs, 5).square().sum(), inputs)
    got = torch.autograd.grad(localattn.local_attention(*inputs, 5).square().sum(), inputs)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e)
