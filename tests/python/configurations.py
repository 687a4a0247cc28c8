"""Random window attention problems, and running one on the package."""

import contextlib
import dataclasses
import math
import os

import numpy as np
import torch
from hypothesis import strategies as st

from localattn import _library

# Another seed gives other random problems.
SEED = int(os.environ.get("LOCALATTN_TEST_SEED", "0"))
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One problem; `seed` makes its numbers."""

    batch: int
    query_extent: tuple
    key_extent: tuple
    heads: int
    kv_heads: int
    channels: int
    value_channels: int
    kernel_size: tuple
    stride: tuple
    dilation: tuple
    is_causal: object
    border: str
    scale: float | None
    bias: tuple | None  # which of the axes of (batch, *query_extent, heads, window) are broadcast
    rel_pos_bias: bool
    axis_bias: tuple  # for each axis None or as for bias
    key_mask: bool
    gradient_of_lse: bool
    layout: str
    seed: int

    @property
    def options(self):
        return {name: getattr(self, name) for name in ("stride", "dilation", "is_causal", "border", "scale")}


LAYOUTS = ("contiguous", "channels_first", "sliced", "flipped_axes", "expanded_batch")


@st.composite
def configurations(draw):
    rank = draw(st.integers(1, 3))
    longest = {1: 40, 2: 8, 3: 4}[rank]
    query_extent = tuple(draw(st.integers(1, longest)) for _ in range(rank))
    if rank == 2 and draw(st.integers(0, 4)) == 0:  # wide enough for several vector tiles
        query_extent = (draw(st.integers(1, 2)), draw(st.integers(16, 40)))
    key_extent = query_extent
    if draw(st.integers(0, 2)) == 0:
        key_extent = tuple(draw(st.integers(1, longest)) for _ in range(rank))
    largest = {1: 11, 2: 5, 3: 3}[rank]
    is_causal = draw(st.one_of(st.just("raster"), st.tuples(*[st.booleans()] * rank), st.just((False,) * rank)))
    if is_causal == "raster":
        kernel_size = tuple(draw(st.integers(0, largest // 2)) * 2 + 1 for _ in range(rank))
        stride = (1,) * rank
        border = draw(st.sampled_from(["mask", "zero"]))
    else:
        kernel_size = tuple(draw(st.integers(1, largest)) for _ in range(rank))
        stride = tuple(1 if draw(st.booleans()) else draw(st.integers(1, k)) for k in kernel_size)
        border = draw(st.sampled_from(["mask", "zero", "shift"]))
    dilation = tuple(1 if draw(st.booleans()) else draw(st.integers(1, 3)) for _ in range(rank))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.sampled_from([1, 1, 2]))
    channels = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 17, 32, 40]))
    value_channels = channels if draw(st.booleans()) else draw(st.sampled_from([1, 3, 5, 8, 16, 20, 33]))
    broadcast = st.tuples(*[st.booleans()] * (rank + 3))
    optional = st.one_of(st.none(), broadcast)
    # Most problems carry no bias, so that the paths without one are well covered.
    biased = draw(st.booleans())
    return Configuration(
        batch=draw(st.sampled_from([1, 1, 2])),
        query_extent=query_extent,
        key_extent=key_extent,
        heads=heads,
        kv_heads=kv_heads,
        channels=channels,
        value_channels=value_channels,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        border=border,
        scale=draw(st.sampled_from([None, None, 0.0, 0.5, -1.25])),
        bias=draw(optional) if biased else None,
        rel_pos_bias=draw(st.booleans()) if biased else False,
        axis_bias=tuple(draw(optional) if biased else None for _ in range(rank)),
        key_mask=draw(st.integers(0, 3)) == 0,
        gradient_of_lse=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def laid_out(tensor, layout):
    """`tensor (batch, *spatial, heads, channels)` with the same numbers in another memory layout."""
    spatial = range(1, tensor.dim() - 2)
    if layout == "channels_first":
        return tensor.permute(0, -2, -1, *spatial).contiguous().permute(0, *(a + 2 for a in spatial), 1, 2)
    if layout == "sliced":  # as from one projection that makes query, key and value
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "flipped_axes":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "expanded_batch":
        return tensor[:1].expand(tensor.shape)
    return tensor


def tensors_of(configuration, dtype):
    """Its tensors by argument name, with `grad_output` and `grad_lse`."""
    c = configuration
    rng = np.random.default_rng(c.seed)

    def numbers(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    def bias(broadcast, entries):
        if broadcast is None:
            return None
        shape = (c.batch, *c.query_extent, c.heads, entries)
        return numbers(*(1 if b else size for b, size in zip(broadcast, shape)))

    tensors = {
        "query": laid_out(numbers(c.batch, *c.query_extent, c.heads, c.channels), c.layout),
        "key": laid_out(numbers(c.batch, *c.key_extent, c.kv_heads, c.channels), c.layout),
        "value": laid_out(numbers(c.batch, *c.key_extent, c.kv_heads, c.value_channels), c.layout),
        "bias": bias(c.bias, math.prod(c.kernel_size)),
        "rel_pos_bias": numbers(c.heads, *(2 * k - 1 for k in c.kernel_size)) if c.rel_pos_bias else None,
        "key_mask": torch.from_numpy(rng.random((c.batch, *c.key_extent)) < 0.6) if c.key_mask else None,
        "grad_output": laid_out(numbers(c.batch, *c.query_extent, c.heads, c.value_channels), c.layout),
        "grad_lse": None,
    }
    for axis, broadcast in enumerate(c.axis_bias):
        tensors[f"axis_bias[{axis}]"] = bias(broadcast, c.kernel_size[axis])
    if c.gradient_of_lse:
        tensors["grad_lse"] = numbers(c.batch, *c.query_extent, c.heads).to(accumulated(dtype))
    return tensors


def accumulated(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def differentiable(tensors):
    """Names of the floating arguments that are there."""
    return [
        name for name, t in tensors.items() if t is not None and name not in ("key_mask", "grad_output", "grad_lse")
    ]


def run(operator, configuration, tensors):
    """Output, lse and gradients by name, from `operator`, which has local_attention's signature."""
    names = differentiable(tensors)
    inputs = {name: tensors[name].detach().requires_grad_() for name in names}
    output, lse = operator(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        configuration.kernel_size,
        **configuration.options,
        bias=inputs.get("bias"),
        rel_pos_bias=inputs.get("rel_pos_bias"),
        axis_bias=[inputs.get(f"axis_bias[{axis}]") for axis in range(len(configuration.kernel_size))],
        key_mask=tensors["key_mask"],
        enable_gqa=True,
        return_lse=True,
    )
    roots, grads = [output], [tensors["grad_output"]]
    if tensors["grad_lse"] is not None:
        roots, grads = [output, lse], [tensors["grad_output"], tensors["grad_lse"]]
    gradients = torch.autograd.grad(roots, list(inputs.values()), grads)
    return output.detach(), lse.detach(), dict(zip(names, gradients))


def available_variants():
    """Names of the variants that this machine runs, best first."""
    return [v.name for v in _library.variants() if v.device == "cpu" and v.unavailable is None]


@contextlib.contextmanager
def forced(variant):
    """Forces a variant of the core library by name."""
    before = os.environ.get("LOCALATTN_CPU_ISA")
    os.environ["LOCALATTN_CPU_ISA"] = variant
    try:
        yield
    finally:
        del os.environ["LOCALATTN_CPU_ISA"]
        if before is not None:
            os.environ["LOCALATTN_CPU_ISA"] = before


def assert_close(name, got, expected, dtype, terms=1):
    """`got` (of `dtype`'s precision) equals the float64 array `expected` within what rounding in `dtype` explains.

    The bound is relative to the largest number expected, and grows as random errors do with the `terms` that a
    broadcast bias's gradient sums, each of which carries the rounding of the output it was computed from."""
    got = got.detach().double().numpy()
    assert got.shape == expected.shape, name
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite], err_msg=name)
    largest = max(1.0, float(np.abs(expected[finite]).max(initial=0)))
    tolerance = (
        (64 if dtype in (torch.float32, torch.float64) else 12) * torch.finfo(dtype).eps * largest * math.sqrt(terms)
    )
    error = float(np.abs(got[finite] - expected[finite]).max(initial=0))
    assert np.isfinite(got[finite]).all(), f"{name} is not finite"
    assert error <= tolerance, f"{name} is off by {error:.3g}, allowed is {tolerance:.3g}"
