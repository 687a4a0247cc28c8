"""Random configurations over every option, on every variant, against the brute force; forward and backward."""

import brute_force
import pytest
import torch
from configurations import (
    DTYPES,
    SEED,
    accumulated,
    assert_close,
    available_variants,
    configurations,
    differentiable,
    forced,
    run,
    tensors_of,
)
from hypothesis import given, seed, settings

import localattn


def expected_of(configuration, tensors):
    arrays = {name: None if t is None else t.detach().to(torch.float64).numpy() for name, t in tensors.items()}
    return brute_force.attention(
        arrays["query"],
        arrays["key"],
        arrays["value"],
        configuration.kernel_size,
        **configuration.options,
        bias=arrays["bias"],
        rel_pos_bias=arrays["rel_pos_bias"],
        axis_bias=[arrays[f"axis_bias[{axis}]"] for axis in range(len(configuration.kernel_size))],
        key_mask=None if tensors["key_mask"] is None else tensors["key_mask"].numpy(),
        grad_output=arrays["grad_output"],
        grad_lse=arrays["grad_lse"],
    )


def check(operator, configuration, tensors, dtype, expected):
    output, lse, gradients = run(operator, configuration, tensors)
    expected_output, expected_lse, expected_gradients = expected
    assert_close("output", output, expected_output, dtype)
    assert_close("lse", lse, expected_lse, accumulated(dtype))
    for name in differentiable(tensors):
        assert gradients[name].dtype == dtype
        terms = lse.numel() / max(1, gradients[name].shape[:-1].numel()) if "bias" in name else 1
        assert_close(f"gradient of {name}", gradients[name], expected_gradients[name], dtype, max(1, terms))


@pytest.mark.parametrize("part", range(2))  # so that parallel workers share the work
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_variant(dtype, part):
    @seed(10 * SEED + 2 * DTYPES.index(dtype) + part)
    @settings(max_examples=400)
    @given(configurations())
    def checked(configuration):
        tensors = tensors_of(configuration, dtype)
        expected = expected_of(configuration, tensors)
        for variant in available_variants():
            with forced(variant):
                check(localattn.local_attention, configuration, tensors, dtype, expected)

    checked()


@seed(10 * SEED + 9)
@settings(max_examples=400)
@given(configurations())
def test_readable_definition(configuration):
    tensors = tensors_of(configuration, torch.float64)
    expected = expected_of(configuration, tensors)
    check(localattn.reference.local_attention, configuration, tensors, torch.float64, expected)
