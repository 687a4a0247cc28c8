"""The operators on CUDA tensors: on a GPU, or, started by test_emulated_cuda.py, on two emulated devices."""

from __future__ import annotations

import ctypes
import os

import pytest
import torch
from configurations import DTYPES, SEED, accumulated, assert_close, configurations, differentiable, tensors_of
from hypothesis import given, seed, settings

import localattn
from localattn import nn

EMULATED = os.environ.get("LOCALATTN_TEST_EMULATED_CUDA")
if EMULATED:
    torch.ops.load_library(EMULATED)
    DEVICES = 2
else:
    DEVICES = torch.cuda.device_count()
    if not DEVICES:
        pytest.skip("no CUDA device; test_emulated_cuda.py emulates one", allow_module_level=True)

needs_gpu = pytest.mark.skipif(bool(EMULATED), reason="the emulated device has no autograd, compiler or graphs")
EXAMPLES = 25 if EMULATED else 400


def placed(tensor: torch.Tensor | None, device: int = 0) -> torch.Tensor | None:
    """A copy on the device, in the same layout."""
    if tensor is None:
        return None
    flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    flat = torch.ops.emulated_cuda.place(flat, device) if EMULATED else flat.to(f"cuda:{device}")
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def operators(configuration, tensors):
    """Output, lse and gradients by name, as configurations.run, but without autograd."""
    names = differentiable(tensors)
    arguments = localattn.ops._native_arguments(
        tensors["query"], tensors["key"], tensors["value"], configuration.kernel_size, configuration.options["stride"],
        configuration.options["dilation"], configuration.options["is_causal"], configuration.options["border"],
        configuration.options["scale"], tensors["bias"], tensors["rel_pos_bias"],
        [tensors[f"axis_bias[{axis}]"] for axis in range(len(configuration.kernel_size))], tensors["key_mask"], True,
    )  # fmt: skip
    output, lse = torch.ops.localattn.attention(*arguments)
    slots = ("query", "key", "value", "bias", "rel_pos_bias", *(f"axis_bias[{axis}]" for axis in range(3)))
    gradients = torch.ops.localattn.attention_backward(
        tensors["grad_output"], tensors["grad_lse"], *arguments[:3], output, lse, *arguments[3:],
        [name in names for name in slots],
    )  # fmt: skip
    return output, lse, {name: gradient for name, gradient in zip(slots, gradients) if name in names}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_problems(dtype):
    """Against the same operators on the CPU in float64, which the other tests hold to the brute force."""

    @seed(10 * SEED + DTYPES.index(dtype))
    @settings(max_examples=EXAMPLES)
    @given(configurations())
    def checked(configuration):
        tensors = tensors_of(configuration, dtype)
        wide = {n: t if t is None or t.dtype == torch.bool else t.double() for n, t in tensors.items()}
        expected = operators(configuration, wide)
        output, lse, gradients = operators(configuration, {name: placed(t) for name, t in tensors.items()})
        assert output.device == lse.device == torch.device("cuda:0")
        assert_close("output", output.cpu(), expected[0].numpy(), dtype)
        assert_close("lse", lse.cpu(), expected[1].numpy(), accumulated(dtype))
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            terms = lse.numel() / max(1, gradient.shape[:-1].numel()) if "bias" in name else 1
            assert_close(f"gradient of {name}", gradient.cpu(), expected[2][name].numpy(), dtype, max(1, terms))

    checked()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fast_variant_is_chosen(dtype):
    x = placed(random(1, 9, 17, 2, 32, dtype=dtype))
    for backward in (False, True):
        assert localattn.attention_variant(x, x, x, 5, backward=backward)[0] == "cuda_sm80"


def test_channels_first_stays():
    x = placed(random(2, 16, 6, 9)).permute(0, 2, 3, 1).unflatten(-1, (2, 8))
    assert localattn.local_attention(x, x, x, 3).permute(0, 3, 4, 1, 2).is_contiguous()


def test_autocast():
    x = placed(random(1, 6, 6, 1, 8))
    before = torch.get_autocast_dtype("cuda")
    try:  # as torch.autocast does, which refuses where torch has no CUDA
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        output = localattn.local_attention(x, x, x, 3)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
    assert output.dtype == torch.bfloat16


def test_tensors_on_different_devices():
    here, there = random(1, 6, 6, 1, 8), placed(random(1, 6, 6, 1, 8))
    with pytest.raises(RuntimeError, match="key must be on the device of query"):
        localattn.local_attention(there, here, there, 3)
    options = ([3, 3], [1, 1], [1, 1], [False, False], False, "mask", None, *[None] * 6)
    with pytest.raises(RuntimeError, match=r"value must be on cuda:0 like the other tensors, got cpu"):
        torch.ops.localattn.attention(there, there, here, *options)


@pytest.mark.skipif(DEVICES < 2, reason="there is one device")
def test_second_device():
    x = random(1, 6, 6, 1, 8)
    output = localattn.local_attention(*[placed(x, 1)] * 3, 3)
    assert output.device == torch.device("cuda:1")
    torch.testing.assert_close(output.cpu(), localattn.local_attention(x, x, x, 3))
    current = torch.ops.emulated_cuda.current_device() if EMULATED else torch.cuda.current_device()
    assert current == 0


@pytest.mark.skipif(not EMULATED, reason="a GPU does not tell which stream a kernel was launched on")
def test_device_and_stream_reach_the_kernels():
    x = placed(random(1, 6, 6, 1, 8), 1)
    torch.ops.emulated_cuda.set_stream(1, 5)
    localattn.local_attention(x, x, x, 3)
    kernels = ctypes.CDLL(str(localattn._library.library_directory() / "liblocalattn_cuda.so"))
    assert kernels.localattn_emulated_device() == 1
    assert kernels.localattn_emulated_stream() == 0x2005  # as torch_device.cpp numbers them


@needs_gpu
def test_current_stream():
    """A call queued on a side stream must run after what that stream was given before."""
    x = random(1, 32, 32, 2, 32).cuda()
    expected = localattn.local_attention(x, x, x, 5)
    y = torch.full_like(x, 1e3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y.copy_(x)
        output = localattn.local_attention(y, y, y, 5)
    stream.synchronize()
    assert torch.equal(output, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph(dtype):
    x = random(1, 16, 16, 2, 32, dtype=dtype).cuda()
    localattn.local_attention(x, x, x, 5)  # opens the library, which is not allowed while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = localattn.local_attention(x, x, x, 5)
    x.copy_(random(1, 16, 16, 2, 32, dtype=dtype).flip(1))
    graph.replay()
    assert torch.equal(output, localattn.local_attention(x, x, x, 5))


@needs_gpu
def test_compile():
    x = random(1, 16, 16, 2, 32).cuda().requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x):
        return localattn.local_attention(x, x, x, 5).square().sum()

    (got,) = torch.autograd.grad(loss(x), x)
    (expected,) = torch.autograd.grad(localattn.local_attention(x, x, x, 5).square().sum(), x)
    torch.testing.assert_close(got, expected)


@needs_gpu
@pytest.mark.unpoisoned  # torch has no deterministic CUDA kernel for all that this calls
def test_second_derivatives():
    x = random(1, 4, 5, 1, 4, dtype=torch.float64).cuda().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: localattn.local_attention(x, x, x, 3), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: localattn.local_attention(x, x, x, 3), (x,), fast_mode=True)


MODULES = {
    "LocalAttention": lambda: (nn.LocalAttention(8, 16, 5, 5), (2, 8, 12, 12)),
    "NeighborhoodAttention2D": lambda: (nn.NeighborhoodAttention2D(32, 2, 5), (2, 12, 12, 32)),
    "HaloAttn": lambda: (nn.HaloAttn(32, num_heads=2, block_size=4, halo_size=1), (2, 32, 12, 12)),
    "BiLevelRoutingAttention": lambda: (nn.BiLevelRoutingAttention(32, num_heads=2, n_win=3, topk=2), (2, 12, 12, 32)),
    "EfficientAttention": lambda: (nn.EfficientAttention(32, 16, 2, 16), (2, 32, 12, 12)),
}


@needs_gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", MODULES)
def test_modules_train(name):
    torch.manual_seed(0)
    module, shape = MODULES[name]()
    x = random(*shape)
    results = []
    for device in ("cpu", "cuda"):
        module.to(device).zero_grad()
        output = module(x.to(device))
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    for on_cpu, on_gpu in zip(*results):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu.cpu(), rtol=1e-3, atol=1e-4)
