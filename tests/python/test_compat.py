"""The compatibility layers: signatures, what the recorded cases leave open, differentiation, refusals."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import localattn
from localattn import nn, reference
from localattn.compat import image_local_attention as original
from localattn.compat import image_local_attention_fork as fork
from localattn.compat import natten, natten017
from localattn.compat.natten017 import functional as natten017_functional

EXTENTS = {1: (9,), 2: (6, 7), 3: (3, 5, 4)}
RANKS = pytest.mark.parametrize("rank", EXTENTS)


def close(got, expected, tolerance=1e-10):
    size = expected.detach().masked_fill(expected.isinf(), 0).abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, size))


def random(*shape, dtype=torch.float64, **options):
    return torch.randn(*shape, dtype=dtype, **options)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gradients(output, *inputs):
    return torch.autograd.grad(output.square().sum(), inputs)


# ---- NATTEN 0.21 -----------------------------------------------------------------------------------------------------


@RANKS
def test_natten_signature(rank):
    parameters = list(inspect.signature(getattr(natten, f"na{rank}d")).parameters)
    assert parameters[:11] == [
        "query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale", "additional_keys",
        "additional_values", "attention_kwargs",
    ]  # fmt: skip
    assert parameters[11] == "backend"
    assert parameters[-1] == "return_lse"


@RANKS
def test_natten_is_attention_with_border_shift(rank):
    query, key, value = random(3, 2, *EXTENTS[rank], 2, 4)
    call = getattr(natten, f"na{rank}d")
    kernel, stride, causal = (3,) * rank, (2,) * rank, (True,) + (False,) * (rank - 1)
    expected = reference.local_attention(query, key, value, kernel, stride=stride, is_causal=causal, border="shift")
    close(call(query, key, value, kernel, stride, 1, causal), expected)
    tuning = {
        "attention_kwargs": {"backend": "flex-fmha"}, "backend": "hopper-fna", "q_tile_shape": (8,) * rank,
        "kv_tile_shape": (8,) * rank, "backward_q_tile_shape": (8,) * rank, "backward_kv_tile_shape": (8,) * rank,
        "backward_kv_splits": (1,) * rank, "backward_use_pt_reduction": True, "run_persistent_kernel": False,
        "kernel_schedule": "pp", "torch_compile": True,
    }  # fmt: skip
    close(call(query, key, value, 3, stride=2, is_causal=causal, **tuning), expected)
    output, lse = call(query, key, value, 3, stride=2, is_causal=causal, return_lse=True)
    close(output, expected)
    assert lse.shape == query.shape[:-1]
    assert not call(query, key, value, 3, scale=0.0).allclose(call(query, key, value, 3))
    with pytest.raises(ValueError, match=f"na{rank}d takes query as"):
        call(query[0], key[0], value[0], 3)


def one_softmax(query, key, value, kernel, additional_keys, additional_values, scale, **window):
    """Neighbours and additional tokens in one softmax, with every score stored."""
    scores = reference.similarity(query, key, kernel, border="shift", **window)
    extra = torch.einsum("b...hd,bnhd->b...hn", query, additional_keys)
    scores = torch.cat((scores, extra), dim=-1) * scale
    weights = scores.softmax(-1)
    window_size = weights.shape[-1] - extra.shape[-1]
    output = reference.weighting(weights[..., :window_size], value, kernel, border="shift", **window)
    output = output + torch.einsum("b...hn,bnhd->b...hd", weights[..., window_size:], additional_values)
    return output, scores.logsumexp(-1)


@RANKS
@pytest.mark.parametrize("causal", [False, True])
def test_natten_additional_keys(rank, causal):
    query, key, value = (random(2, *EXTENTS[rank], 2, 4, requires_grad=True) for _ in range(3))
    more = [random(2, 5, 2, 4, requires_grad=True) for _ in range(2)]
    expected = one_softmax(query, key, value, 3, *more, 0.3, is_causal=causal)
    options = {"scale": 0.3, "is_causal": causal, "additional_keys": more[0], "additional_values": more[1]}
    call = getattr(natten, f"na{rank}d")
    got = call(query, key, value, 3, return_lse=True, **options)
    inputs = (query, key, value, *more)
    for part, wanted in zip(got, expected):
        close(part, wanted)
    for part, wanted in zip(
        gradients(got[0] + got[1][..., None], *inputs), gradients(expected[0] + expected[1][..., None], *inputs)
    ):
        close(part, wanted)
    close(call(query, key, value, 3, **options), expected[0])
    del options["is_causal"]
    close(getattr(natten017_functional, f"na{rank}d")(query, key, value, 3, is_causal=causal, **options), expected[0])


def test_natten_additional_keys_are_given_in_pairs():
    x = random(1, 5, 2, 4)
    for call in (natten.na1d, natten017_functional.na1d):
        with pytest.raises(ValueError, match="additional_keys and additional_values must be given both"):
            call(x, x, x, 3, additional_keys=x)
        none = x[:, :0]
        close(call(x, x, x, 3, additional_keys=none, additional_values=none), call(x, x, x, 3))


def test_natten_merge_attentions_accepts_its_arguments():
    outputs, lses = [random(2, 5, 2, 4) for _ in range(3)], [random(2, 5, 2) for _ in range(3)]
    expected = localattn.merge_attentions(outputs, lses)
    got = natten.merge_attentions(outputs, lses, torch_compile=False, use_autograd_fix=False)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("causal", [False, True])
def test_natten_attention(causal):
    query, key, value = random(3, 2, 7, 4, 8)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=causal)
    output, lse = natten.attention(query, key, value, causal, return_lse=True, backend="cutlass-fmha")
    close(output, expected.transpose(1, 2))
    assert lse.shape == (2, 7, 4)
    fewer = natten.attention(query, key[:, :5, :2], value[:, :5, :2])
    shared = (x[:, :5, :2].repeat_interleave(2, 2).transpose(1, 2) for x in (key, value))
    close(fewer, F.scaled_dot_product_attention(query.transpose(1, 2), *shared).transpose(1, 2))
    with pytest.raises(ValueError, match="as many keys as queries, got 5 and 7"):
        natten.attention(query, key[:, :5], value[:, :5], is_causal=True)


def test_natten_modules_are_the_packages():
    for rank in EXTENTS:
        name = f"NeighborhoodAttention{rank}D"
        assert getattr(natten, name) is getattr(nn, name)
        assert issubclass(getattr(natten017, name), getattr(nn, name))


@pytest.mark.parametrize("package", [natten, natten017])
def test_natten_switches_are_accepted(package):
    for name in package.__all__:
        if name.startswith(("use_", "enable_", "disable_", "allow_", "force_", "set_")):
            getattr(package, name)(True)
            getattr(package, name)()
        elif name.startswith(("is_", "are_", "has_")):
            assert getattr(package, name)() in (True, False)
    assert package.get_memory_usage_preference() == "strict"
    assert package.functional.na2d


# ---- NATTEN 0.17 -----------------------------------------------------------------------------------------------------


@RANKS
def test_natten017_signatures(rank):
    def names(function):
        return list(inspect.signature(getattr(natten017_functional, f"na{rank}d{function}")).parameters)

    assert names("_qk") == ["query", "key", "kernel_size", "dilation", "additional_keys", "is_causal", "rpb"]
    assert names("_av") == ["attn", "value", "kernel_size", "dilation", "additional_values", "is_causal"]
    assert names("")[:10] == [
        "query", "key", "value", "kernel_size", "dilation", "is_causal", "rpb", "scale", "additional_keys",
        "additional_values",
    ]  # fmt: skip
    module = list(inspect.signature(getattr(natten017, f"NeighborhoodAttention{rank}D")).parameters)
    assert module[:10] == [
        "dim", "num_heads", "kernel_size", "dilation", "is_causal", "rel_pos_bias", "qkv_bias", "qk_scale", "attn_drop",
        "proj_drop",
    ]  # fmt: skip


@RANKS
@pytest.mark.parametrize("causal", [False, True])
def test_natten017_unfused_is_fused(rank, causal):
    qk, av, fused = (getattr(natten017_functional, f"na{rank}d{part}") for part in ("_qk", "_av", ""))
    query, key, value = (random(2, 2, *EXTENTS[rank], 4, requires_grad=True) for _ in range(3))
    more = [random(2, 2, 5, 4, requires_grad=True) for _ in range(2)]
    rpb = random(2, *(5,) * rank, requires_grad=True)
    scores = qk(query, key, 3, 2, more[0], causal, rpb)
    assert scores.shape == (2, 2, *EXTENTS[rank], 3**rank + 5)
    if causal:
        first = scores[(slice(None), slice(None), *(0,) * rank)]  # the first query sees itself and the extra tokens
        assert (first > -math.inf).sum(-1).unique().item() == 1 + 5
        with pytest.raises(ValueError, match="must be odd"):
            qk(query, key, 2)
    output = av(scores.softmax(-1), value, 3, 2, more[1], causal)

    def last(x):
        return x.movedim(1, -2)

    expected = fused(last(query), last(key), last(value), 3, 2, causal, rpb, 1.0, last(more[0]), last(more[1])).movedim(
        -2, 1
    )
    close(output, expected)
    inputs = (query, key, value, rpb, *more)
    for got, wanted in zip(gradients(output, *inputs), gradients(expected, *inputs)):
        close(got, wanted)


def test_natten017_fifth_argument_is_dilation():
    query, key, value = random(3, 1, 9, 2, 4)
    close(
        natten017_functional.na1d(query, key, value, 3, 2),
        reference.local_attention(query, key, value, 3, dilation=2, border="shift"),
    )
    close(
        natten.na1d(query, key, value, 3, 2),
        reference.local_attention(query, key, value, 3, stride=2, border="shift"),
    )
    module = natten017.NeighborhoodAttention1D(8, 2, 3, 2, True, True)
    assert module.dilation == (2,)
    assert module.is_causal == (True,)
    assert module.rpb.shape == (2, 5)


def test_natten017_forward_mode():
    query, key, value = (random(1, 1, 4, 3, 2, requires_grad=True) for _ in range(3))
    more = [random(1, 1, 2, 2, requires_grad=True) for _ in range(2)]
    rpb = random(1, 5, 5, requires_grad=True)

    def unfused(query, key, value, rpb, more_keys, more_values):
        scores = natten017_functional.na2d_qk(query, key, 3, 1, more_keys, (True, False), rpb)
        return natten017_functional.na2d_av(scores.softmax(-1), value, 3, 1, more_values, (True, False))

    def fused(query, key, value, rpb, more_keys, more_values):
        last = [x.movedim(1, -2) for x in (query, key, value, more_keys, more_values)]
        return natten017_functional.na2d(*last[:3], 3, 1, (True, False), rpb, 0.7, *last[3:])

    def newest(query, key, value, more_keys, more_values):
        last = [x.movedim(1, -2) for x in (query, key, value, more_keys, more_values)]
        return natten.na2d(*last[:3], 3, additional_keys=last[3], additional_values=last[4])

    for call, inputs in (
        (unfused, (query, key, value, rpb, *more)),
        (fused, (query, key, value, rpb, *more)),
        (newest, (query, key, value, *more)),
    ):
        assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    module = natten017.NeighborhoodAttention2D(4, 2, 3, rel_pos_bias=True).double()
    x, tangent = random(2, 1, 4, 3, 4)
    _, derivative = torch.func.jvp(module, (x,), (tangent,))
    step = 1e-6
    close(derivative, (module(x + step * tangent) - module(x - step * tangent)) / (2 * step), 1e-6)


def test_natten017_second_derivative():
    query, key, value = (random(1, 1, 4, 3, 2, requires_grad=True) for _ in range(3))

    def unfused(query, key, value):
        scores = natten017_functional.na2d_qk(query, key, 3)
        return natten017_functional.na2d_av(scores.softmax(-1), value, 3)

    assert gradgradcheck(unfused, (query, key, value), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_natten017_dtypes(dtype):
    query, key, value = random(3, 2, 2, 6, 7, 8)
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float32: 1e-5}[dtype]

    def unfused(*maps):
        scores = natten017_functional.na2d_qk(maps[0], maps[1], 3)
        return natten017_functional.na2d_av(scores.softmax(-1), maps[2], 3)

    output = unfused(*(x.to(dtype) for x in (query, key, value)))
    assert output.dtype == dtype
    close(output.double(), unfused(query, key, value), tolerance)


def test_natten017_names_of_older_releases():
    query, key, rpb = random(1, 2, 6, 7, 4), random(1, 2, 6, 7, 4), random(2, 5, 5)
    new, old = natten017_functional, natten017_functional
    close(old.natten2dqkrpb(query, key, rpb, 3, 2), new.na2d_qk(query, key, 3, 2, rpb=rpb))
    close(
        old.natten2dav(old.natten2dqk(query, key, 3, 2), key, 3, 2),
        new.na2d_av(new.na2d_qk(query, key, 3, 2), key, 3, 2),
    )
    line, table = query[:, :, 0], rpb[:, 0]
    close(old.natten1dqkrpb(line, line, table, 3, 1), new.na1d_qk(line, line, 3, rpb=table))
    close(
        old.natten1dav(old.natten1dqk(line, line, 3, 1), line, 3, 1), new.na1d_av(new.na1d_qk(line, line, 3), line, 3)
    )
    volume, table = random(1, 2, 3, 6, 7, 4), random(2, 1, 5, 5)
    window = ((1, 3, 3), (1, 2, 2))
    close(old.natten3dqkrpb(volume, volume, table, 1, 3, 1, 2), new.na3d_qk(volume, volume, *window, rpb=table))
    scores = old.natten3dqk(volume, volume, 1, 3, 1, 2)
    close(scores, new.na3d_qk(volume, volume, *window))
    close(old.natten3dav(scores, volume, 1, 3, 1, 2), new.na3d_av(scores, volume, *window))


def test_natten017_refusals():
    x = random(1, 2, 6, 7, 4)
    with pytest.raises(ValueError, match=r"query must be \(batch, heads, one spatial axis, channels\)"):
        natten017_functional.na1d_qk(x, x, 3)
    with pytest.raises(ValueError, match="9 weights per query for its neighbours and 0 for additional values, got 10"):
        natten017_functional.na2d_av(random(1, 2, 6, 7, 10), x, 3)
    with pytest.raises(ValueError, match=r"attn .* 2 for additional values, got 9"):
        natten017_functional.na2d_av(random(1, 2, 6, 7, 9), x, 3, additional_values=random(1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"rpb must be \(heads, 5, 5\), got \(2, 3, 3\)"):
        natten017_functional.na2d_qk(x, x, 3, rpb=random(2, 3, 3))
    with pytest.raises(ValueError, match="dilation must be at least 1"):
        natten017_functional.na2d_qk(x, x, 3, 0)


# ---- compilation of functions ----------------------------------------------------------------------------------------


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (
            lambda q, k, v, e: natten.na2d(q, k, v, 3, additional_keys=e, additional_values=e),
            [(1, 5, 6, 2, 4)] * 3 + [(1, 3, 2, 4)],
        ),
        (lambda q, k: natten017_functional.na2d_qk(q, k, 3, is_causal=True), [(1, 2, 5, 6, 4)] * 2),
        (lambda a, v: natten017_functional.na1d_av(a, v, 3), [(1, 2, 5, 3), (1, 2, 5, 4)]),
        (lambda q, k: original.f_similar(q, k, 3, 4), [(2, 4, 5, 6)] * 2),
        (lambda v, w: original.f_weighting(v, w, 3, 4), [(2, 4, 5, 6), (2, 5, 6, 12)]),
        (lambda q, k: fork.f_similar(q, k, 3, 3, True), [(4, 4, 6, 6), (2, 4, 3, 2)]),
        (lambda v, w: fork.f_weighting(v, w, 3, 3, True), [(2, 4, 3, 2), (4, 6, 6, 5)]),
    ],
    ids=["na2d", "na2d_qk", "na1d_av", "f_similar", "f_weighting", "fork.f_similar", "fork.f_weighting"],
)
def test_functions_compile_and_export(function, shapes):
    inputs = tuple(random(*shape, dtype=torch.float32, requires_grad=True) for shape in shapes)
    expected = function(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs)
    close(compiled, expected, 1e-6)
    seen = expected.detach().isfinite()
    for got, wanted in zip(gradients(compiled[seen], *inputs), gradients(expected[seen], *inputs)):
        close(got, wanted, 1e-5)
    close(torch.export.export(Call(function), inputs).module()(*inputs), expected, 1e-6)


# ---- image local attention -------------------------------------------------------------------------------------------


def windows_of(x: torch.Tensor, kH: int, kW: int) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, kH * kW, H, W), zeros outside."""
    height, width = x.shape[2:]
    padded = F.pad(x, (kW // 2, kW, kH // 2, kH))
    shifts = [padded[:, :, dy : dy + height, dx : dx + width] for dy in range(kH) for dx in range(kW)]
    return torch.stack(shifts, dim=2)


KERNELS = pytest.mark.parametrize(("kH", "kW"), [(3, 3), (5, 2), (4, 6), (1, 1), (9, 11)])


@KERNELS
def test_original_functions(kH, kW):
    query, key, value = (random(2, 3, 6, 5, requires_grad=True) for _ in range(3))
    scores = original.f_similar(query, key, kH, kW)
    expected = torch.einsum("nchw,ncphw->nhwp", query, windows_of(key, kH, kW))
    close(scores, expected)
    outside = windows_of(torch.ones_like(key), kH, kW)[:, 0].permute(0, 2, 3, 1) == 0
    assert (scores[outside] == 0).all()
    weights = random(2, 6, 5, kH * kW, requires_grad=True)
    output = original.f_weighting(value, weights, kH, kW)
    combined = torch.einsum("nhwp,ncphw->nchw", weights, windows_of(value, kH, kW))
    close(output, combined)
    for got, wanted in zip(gradients(scores, query, key), gradients(expected, query, key)):
        close(got, wanted)
    got, wanted = gradients(output, value, weights), gradients(combined, value, weights)
    close(got[0], wanted[0])
    close(got[1], wanted[1])
    assert (got[1][outside] == 0).all()


@KERNELS
def test_original_module_is_its_plain_form(kH, kW):
    fused, plain = original.LocalAttention(3, 8, kH, kW).double(), original.TorchLocalAttention(3, 8, kH, kW).double()
    assert {n: tuple(p.shape) for n, p in fused.state_dict().items()} == {
        f"conv{i}.weight": (8, 3, 1, 1) for i in (1, 2, 3)
    }
    plain.load_state_dict(fused.state_dict(), strict=True)
    x = random(2, 3, 6, 5)
    close(fused(x), plain(x))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_original_functions_take_any_layout(layout):
    query, key = random(2, 2, 3, 6, 5)
    if layout == "channels_last":
        strided = [x.contiguous(memory_format=torch.channels_last) for x in (query, key)]
    elif layout == "sliced":
        strided = [torch.stack((x, x), -1).flatten(3)[..., ::2] for x in (query, key)]
    else:
        query, key = query[:1].expand(2, -1, -1, -1), key[:, :, :1].expand(-1, -1, 6, -1)
        strided = [query, key]
    strided = [x.detach().requires_grad_() for x in strided]
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (query, key)]
    results = []
    for q, k in (strided, plain):
        scores = original.f_similar(q, k, 3, 3)
        output = original.f_weighting(k, scores.softmax(-1), 3, 3)
        output.sum().backward()  # an expanded gradient
        results.append((scores.detach(), output.detach(), q.grad, k.grad))
    for got, wanted in zip(*results):
        close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_image_local_attention_dtypes(dtype):
    query, key = random(2, 2, 4, 6, 5)
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float32: 1e-5}[dtype]
    for module in (original, fork):
        scores = module.f_similar(query.to(dtype), key.to(dtype), 3, 3)
        assert scores.dtype == dtype
        close(scores.double(), module.f_similar(query, key, 3, 3), tolerance)
        output = module.f_weighting(key.to(dtype), scores.softmax(-1), 3, 3)
        assert output.dtype == dtype
        close(output.double(), module.f_weighting(key, scores.double().softmax(-1), 3, 3), tolerance)


def test_image_local_attention_second_derivative():
    query, key = (random(1, 2, 3, 3, requires_grad=True) for _ in range(2))

    def attend(query, key):
        return fork.f_weighting(key, fork.f_similar(query, key, 3, 3, True).softmax(-1), 3, 3, True)

    assert gradgradcheck(attend, (query, key), fast_mode=True)


@pytest.mark.unpoisoned  # the memory must stay untouched: filling it would take it all
@pytest.mark.parametrize("package", [original, fork])
def test_image_local_attention_offsets_beyond_two_to_the_31(package):
    far = 2**31 + 12345
    storage = torch.empty(far + 4096, dtype=torch.bfloat16)
    query, key = (storage.as_strided((1, 2, 5, 6), (0, far, 6, 1), offset) for offset in (0, 256))
    weight = storage.as_strided((1, 5, 6, 9), (0, 54, 9, 1), far + 512)
    for tensor in (query, key, weight):
        tensor.copy_(torch.randn(tensor.shape))
    assert torch.equal(package.f_similar(query, key, 3, 3), package.f_similar(query.clone(), key.clone(), 3, 3))
    assert torch.equal(package.f_weighting(key, weight, 3, 3), package.f_weighting(key.clone(), weight.clone(), 3, 3))


def test_original_refusals():
    x = random(2, 3, 6, 5)
    with pytest.raises(ValueError, match=r"x_loc must have the shape of x_ori, \(2, 3, 6, 5\), got \(2, 3, 6, 4\)"):
        original.f_similar(x, x[..., :4], 3, 3)
    with pytest.raises(ValueError, match=r"x_ori must be .* got shape"):
        original.f_similar(x[0], x, 3, 3)
    with pytest.raises(ValueError, match=r"x_weight must have shape \(2, 6, 5, 9\), got \(2, 6, 5, 8\)"):
        original.f_weighting(x, random(2, 6, 5, 8), 3, 3)
    with pytest.raises(ValueError, match=r"kernel_size.* is 0, but must be"):
        original.f_similar(x, x, 0, 3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("ratio", "repeats"), [((1, 1), 1), ((2, 3), 1), ((3, 1), 2)])
def test_fork_functions(causal, ratio, repeats):
    key = random(2, 4, 3, 4, requires_grad=True)
    query = random(2 * repeats, 4, 3 * ratio[0], 4 * ratio[1], requires_grad=True)
    scores = fork.f_similar(query, key, 3, 5, causal)
    entries = 8 if causal else 15

    def upsampled(x):  # every query's own window of keys
        full = windows_of(x, 3, 5)[:, :, :entries].repeat_interleave(repeats, 0)
        return full.repeat_interleave(ratio[0], -2).repeat_interleave(ratio[1], -1)

    outside = upsampled(torch.ones_like(key))[:, 0].permute(0, 2, 3, 1) == 0
    expected = torch.einsum("nchw,ncphw->nhwp", query, upsampled(key)).masked_fill(outside, -10000.0)
    close(scores, expected)
    assert (scores[outside] == -10000).all()
    for got, wanted in zip(gradients(scores, query, key), gradients(expected, query, key)):
        close(got, wanted)

    weights = random(*scores.shape, requires_grad=True)
    output = fork.f_weighting(key, weights, 3, 5, causal)
    combined = torch.einsum("nhwp,ncphw->nchw", weights, upsampled(key))
    close(output, combined)
    for got, wanted in zip(gradients(output, key, weights), gradients(combined, key, weights)):
        close(got, wanted)


def test_fork_border_is_the_same_in_half_precision():
    x = random(1, 2, 3, 3, dtype=torch.float16)
    assert fork.f_similar(x, x, 3, 3)[0, 0, 0, 0].item() == -10000


def test_fork_module():
    module, plain = fork.LocalAttention(3, 8, 3, 5).double(), fork.TorchLocalAttention(3, 8, 3, 5).double()
    assert fork.TorchLocalAttention is original.TorchLocalAttention
    plain.load_state_dict(module.state_dict(), strict=True)
    x = random(2, 3, 6, 5)
    query, key, value = (conv(x) for conv in (module.conv1, module.conv2, module.conv3))
    expected = fork.f_weighting(value, fork.f_similar(query, key, 3, 5).softmax(-1), 3, 5)
    close(module(x), expected)
    assert not module(x).allclose(plain(x))  # the border differs, as it does in the fork
    close(module(x)[:, :, 1:-1, 2:-2], plain(x)[:, :, 1:-1, 2:-2])


def test_fork_refusals():
    x = random(4, 3, 6, 5)
    with pytest.raises(ValueError, match="x_loc must have the 3 channels of x_ori, got 2"):
        fork.f_similar(x, x[:, :2], 3, 3)
    with pytest.raises(ValueError, match="x_ori must have a whole multiple of the 4 x 5 pixels of x_loc, got 6 x 5"):
        fork.f_similar(x, x[:, :, :4], 3, 3)
    with pytest.raises(ValueError, match="batch of x_loc must divide the queries' batch of 4, got 3"):
        fork.f_similar(x, x[:3], 3, 3)
    with pytest.raises(ValueError, match=r"x_weight must be \(batch, height, width, 5\)"):
        fork.f_weighting(x, random(4, 6, 5, 9), 3, 3, True)
    with pytest.raises(ValueError, match=r"kernel_size.*odd"):
        fork.f_similar(x, x, 4, 3, casual_mask=True)


@pytest.mark.parametrize(
    ("windows", "causal"),
    [(((9, 5), (5, 5)), False), (((9, 9), (7, 7)), True)],
    ids=["CogView2", "SwissArmyTransformer"],
)
def test_one_softmax_over_two_resolutions(windows, causal):
    """Fine and coarse keys in one softmax: merged fused calls are the unfused form, forward and backward."""
    query, fine_key, fine_value = (random(1, 4, 12, 12, requires_grad=True) for _ in range(3))
    coarse_key, coarse_value = (random(1, 4, 4, 4, requires_grad=True) for _ in range(2))
    fine, coarse = windows
    split = math.prod(fine) // 2 + 1 if causal else math.prod(fine)

    scores = (fork.f_similar(query, fine_key, *fine, causal), fork.f_similar(query, coarse_key, *coarse))
    weights = torch.cat(scores, dim=-1).softmax(-1)
    unfused = fork.f_weighting(fine_value, weights[..., :split], *fine, causal)
    unfused = unfused + fork.f_weighting(coarse_value, weights[..., split:], *coarse)

    def heads_last(x):
        return x.permute(0, 2, 3, 1).unsqueeze(-2)

    def attend(key, value, window, is_causal):
        maps = (heads_last(x) for x in (query, key, value))
        return localattn.local_attention(*maps, window, is_causal=is_causal, scale=1.0, return_lse=True)

    parts = (
        attend(fine_key, fine_value, fine, "raster" if causal else False),
        attend(coarse_key, coarse_value, coarse, False),
    )
    merged, _ = localattn.merge_attentions(*zip(*parts))
    fused = merged.squeeze(-2).permute(0, 3, 1, 2)

    close(fused, unfused)
    inputs = (query, fine_key, fine_value, coarse_key, coarse_value)
    for got, wanted in zip(gradients(fused, *inputs), gradients(unfused, *inputs)):
        close(got, wanted)
