"""local_attention on the inputs that break kernels: layouts, extremes, non-finite numbers, threads, forks."""

import concurrent.futures
import math

import brute_force
import pytest
import torch
from configurations import DTYPES, accumulated, assert_close, forced, laid_out
from torch.utils.data import DataLoader, Dataset

import localattn


def random_problem(extent=(6, 19), heads=2, channels=8, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *extent, heads, channels)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


def assert_matches_brute_force(query, key, value, kernel_size, dtype, **options):
    """Forward against the brute force, with its defaults filled in."""
    rank = query.dim() - 3
    arguments = {"stride": (1,) * rank, "dilation": (1,) * rank, "is_causal": (False,) * rank, "border": "mask"}
    arguments.update(options)
    arrays = [t.detach().double().numpy() for t in (query, key, value)]
    output, lse = localattn.local_attention(query, key, value, kernel_size, **options, return_lse=True)
    expected_output, expected_lse, _ = brute_force.attention(*arrays, kernel_size, **arguments, scale=None)
    assert_close("output", output, expected_output, dtype)
    assert_close("lse", lse, expected_lse, accumulated(dtype))


def test_poison_works():
    assert torch.empty(64).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("border", ["mask", "zero", "shift"])
@pytest.mark.parametrize(
    ("extent", "kernel_size"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (7, 7)),
        ((1, 50), (3, 3)),
        ((50, 1), (3, 3)),
        ((3, 4), (9, 11)),
        ((7, 33), (5, 5)),
        ((2, 3), (1, 21)),
        ((129,), (2,)),
        ((1,), (5,)),
        ((2, 1, 17), (3, 3, 3)),
        ((1, 1, 1), (2, 3, 4)),
    ],
    ids=str,
)
def test_extents_and_windows(extent, kernel_size, border, dtype, variant):
    query, key, value = random_problem(extent, heads=1, channels=4, batch=1, dtype=dtype)
    assert_matches_brute_force(query, key, value, kernel_size, dtype, border=border)


@pytest.mark.parametrize("channels", [1, 2, 5, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128])
def test_channels(channels, variant):
    query, key, value = random_problem((3, 18), heads=1, channels=channels, batch=1)
    assert_matches_brute_force(query, key, value[..., : max(1, channels // 2)], (3, 3), torch.float32)


@pytest.mark.parametrize("layout", ["channels_first", "sliced", "flipped_axes", "expanded_batch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout, dtype, variant):
    plain = random_problem(dtype=dtype)
    if layout == "expanded_batch":
        plain = [laid_out(t, layout).contiguous() for t in plain]
    results = []
    for tensors in (plain, [laid_out(t, layout) for t in plain]):
        inputs = [t.detach().requires_grad_() for t in tensors]
        output = localattn.local_attention(*inputs, 3)
        results.append((output, *torch.autograd.grad(output, inputs, laid_out(plain[0], layout))))
    for expected, got in zip(*results):
        tolerance = 8 * torch.finfo(dtype).eps * expected.detach().abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_overlapping_view(variant):
    signal = torch.randn(40)
    overlapping = signal.as_strided((1, 12, 1, 8), (0, 2, 0, 1))  # a sliding window itself
    copy = overlapping.clone()
    torch.testing.assert_close(
        localattn.local_attention(overlapping, overlapping, overlapping, 5),
        localattn.local_attention(copy, copy, copy, 5),
    )


@pytest.mark.unpoisoned  # the memory must stay untouched: filling it would take it all
def test_offsets_beyond_two_to_the_31(variant):
    far = 2**31 + 12345
    storage = torch.empty(far + 4096, dtype=torch.bfloat16)
    shape, strides = (1, 2, 20, 1, 8), (0, far, 8, 0, 1)
    tensors = [storage.as_strided(shape, strides, offset) for offset in (0, 256, 512)]
    for tensor, numbers in zip(tensors, random_problem((2, 20), 1, 8, 1, torch.bfloat16)):
        tensor.copy_(numbers)
    assert_matches_brute_force(*tensors, (3, 3), torch.bfloat16)


@pytest.mark.parametrize(
    ("query", "key", "output"),
    [
        ((0, 4, 4, 2, 8), (0, 4, 4, 2, 8), (0, 4, 4, 2, 8)),
        ((2, 0, 4, 2, 8), (2, 4, 4, 2, 8), (2, 0, 4, 2, 8)),
        ((2, 4, 0, 2, 8), (2, 4, 0, 2, 8), (2, 4, 0, 2, 8)),
        ((2, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 4, 2, 8)),
        ((2, 4, 4, 2, 8), (2, 0, 0, 2, 8), (2, 4, 4, 2, 8)),
        ((2, 0, 2, 8), (2, 0, 2, 8), (2, 0, 2, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("border", ["mask", "zero", "shift"])
def test_empty(query, key, output, border, variant):
    inputs = [torch.randn(shape, requires_grad=True) for shape in (query, key, key)]
    bias = torch.randn(2, 1, requires_grad=True)
    result, lse = localattn.local_attention(*inputs, 3, border=border, bias=bias, return_lse=True)
    assert result.shape == output
    assert torch.equal(result, torch.zeros(output))
    assert torch.equal(lse, torch.full(output[:-1], -math.inf))
    for tensor, gradient in zip((*inputs, bias), torch.autograd.grad(result.sum() + lse.sum(), (*inputs, bias))):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_without_keys(dtype, variant):
    query, key, value = (t.requires_grad_() for t in random_problem(dtype=dtype))
    mask = torch.ones(key.shape[:3], dtype=torch.bool)
    mask[:, :, :9] = False  # the windows of the first columns hold no key
    bias = torch.randn(2, 9).to(dtype).requires_grad_()
    output, lse = localattn.local_attention(query, key, value, 3, key_mask=mask, bias=bias, return_lse=True)
    assert torch.equal(output[:, :, :8], torch.zeros_like(output[:, :, :8]))
    assert (lse[:, :, :8] == -math.inf).all()
    assert lse[:, :, 8:].isfinite().all()
    gradients = torch.autograd.grad((output.sum(), lse.sum()), (query, key, value, bias))
    assert all(g.isfinite().all() for g in gradients)
    assert torch.equal(gradients[0][:, :, :8], torch.zeros_like(gradients[0][:, :, :8]))
    assert torch.equal(gradients[1][:, :, :9], torch.zeros_like(gradients[1][:, :, :9]))


def test_scores_of_minus_infinity(variant):
    query, key, value = (t.requires_grad_() for t in random_problem())
    bias = torch.zeros(2, 9)
    bias[0] = -math.inf
    bias.requires_grad_()
    output, lse = localattn.local_attention(query, key, value, 3, bias=bias, return_lse=True)
    assert torch.equal(output[..., 0, :], torch.zeros_like(output[..., 0, :]))
    assert (lse[..., 0] == -math.inf).all()
    gradients = torch.autograd.grad((output.sum(), lse.sum()), (query, key, value, bias))
    assert all(g.isfinite().all() for g in gradients)
    assert torch.equal(gradients[3][0], torch.zeros(9))


def test_scores_of_plus_infinity(variant):
    # As torch.softmax and torch.logsumexp: NaN, and infinity.
    query, key, value = (t.requires_grad_() for t in random_problem())
    bias = torch.zeros(2, 9)
    bias[0, 4] = math.inf  # the centre, which every window has
    output, lse = localattn.local_attention(query, key, value, 3, bias=bias, return_lse=True)
    assert output[..., 0, :].isnan().all()
    assert (lse[..., 0] == math.inf).all()
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    for got in (output, lse.unsqueeze(-1), *gradients):
        assert got[..., 1, :].isfinite().all()
    assert all(g[..., 0, :].isnan().all() for g in gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_not_finite_numbers_stay_in_their_windows(bad, where, variant):
    tensors = dict(zip(("query", "key", "value"), random_problem()))
    clean = localattn.local_attention(**tensors, kernel_size=5)
    tensors[where] = tensors[where].clone()
    tensors[where][1, 3, 9, 0, 2] = bad
    got, lse = localattn.local_attention(**tensors, kernel_size=5, return_lse=True)
    touched = torch.zeros(got.shape[:-1], dtype=torch.bool)
    if where == "query":
        touched[1, 3, 9, 0] = True
    else:
        touched[1, 1:6, 7:12, 0] = True
    torch.testing.assert_close(got[~touched], clean[~touched])
    expected, expected_lse = localattn.reference.local_attention(**tensors, kernel_size=5, return_lse=True)
    torch.testing.assert_close(got, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)


def test_large_scores_do_not_overflow(variant):
    query, key, value = random_problem()
    assert_close(
        "output",
        localattn.local_attention(100 * query, 100 * key, value, 3),
        brute_force.attention(
            *(t.double().numpy() for t in (100 * query, 100 * key, value)),
            (3, 3), (1, 1), (1, 1), (False, False), "mask", None,
        )[0],
        torch.float16,  # float32 scores in the tens of thousands leave about as many digits
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_as_exact_as_plain_pytorch(dtype, variant):
    tensors = random_problem((16, 33), heads=2, channels=32, batch=1, dtype=dtype)
    results = {}
    for name, function, cast in (
        ("exact", localattn.reference.local_attention, torch.float64),
        ("plain", localattn.reference.local_attention, dtype),
        ("fused", localattn.local_attention, dtype),
    ):
        inputs = [t.to(cast).requires_grad_() for t in tensors]
        output = function(*inputs, 7)
        results[name] = (output, *torch.autograd.grad(output, inputs, tensors[0].to(cast)))
    for exact, plain, fused in zip(*results.values()):
        error_of_plain, error = ((result.double() - exact).abs().max() for result in (plain, fused))
        assert error <= 4 * error_of_plain + torch.finfo(dtype).eps * exact.abs().max()


def test_memory_order_of_results():
    query, key, value = random_problem()
    assert localattn.local_attention(query, key, value, 3).is_contiguous()
    inputs = [laid_out(t, "channels_first").requires_grad_() for t in (query, key, value[..., :5])]
    output = localattn.local_attention(*inputs, 3)
    assert output.permute(0, 3, 4, 1, 2).is_contiguous()
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert gradient.permute(0, 3, 4, 1, 2).is_contiguous()


def test_inputs_are_not_changed(variant):
    tensors = random_problem()
    copies = [t.clone() for t in tensors]
    inputs = [t.requires_grad_() for t in tensors]
    localattn.local_attention(*inputs, 3).sum().backward()
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies))


def test_ints_and_tuples_mean_the_same():
    query, key, value = random_problem()
    per_axis = {"stride": (2, 2), "dilation": (1, 1), "is_causal": (True, True)}
    expected = localattn.local_attention(query, key, value, (3, 3), **per_axis)
    assert torch.equal(localattn.local_attention(query, key, value, 3, stride=2, is_causal=True), expected)
    assert torch.equal(localattn.local_attention(query, key, value, [3, 3], stride=[2, 2], is_causal=[1, 1]), expected)


def test_scale_zero_means_zero():
    query, key, value = random_problem(dtype=torch.float64)
    expected = localattn.local_attention(torch.zeros_like(query), key, value, 3)
    torch.testing.assert_close(localattn.local_attention(query, key, value, 3, scale=0.0), expected)


def test_whole_map_equals_scaled_dot_product_attention(variant):
    query, key, value = random_problem((4, 5), dtype=torch.float64)
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).unflatten(1, (4, 5))
    torch.testing.assert_close(localattn.local_attention(query, key, value, (7, 9)), expected)
    torch.testing.assert_close(localattn.local_attention(query, key, value, (4, 5), border="shift"), expected)


def test_variant_that_is_chosen(monkeypatch):
    monkeypatch.delenv("LOCALATTN_CPU_ISA", raising=False)
    query, key, value = random_problem()
    variants = [v for v in localattn._library.variants() if v.device == "cpu"]
    names = [v.name for v in variants if v.unavailable is None]
    name, report = localattn.attention_variant(query, key, value, 3)
    assert name in names
    assert len(report.splitlines()) == names.index(name) + (len(variants) - len(names))
    with forced("reference"):
        assert localattn.attention_variant(query, key, value, 3, backward=True) == ("reference", "")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_does_not_change_a_bit(dtype, variant):
    inputs = [t.requires_grad_() for t in random_problem((13, 21), heads=3, channels=16, dtype=dtype)]
    bias = torch.randn(3, 25).to(dtype).requires_grad_()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            output, lse = localattn.local_attention(*inputs, 5, bias=bias, return_lse=True)
            gradients = torch.autograd.grad((output.sum(), lse.sum()), (*inputs, bias))
            results.append((output, lse, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, tensor in zip(results[0], other):
            assert torch.equal(first, tensor)


def test_concurrent_calls():
    problems = [random_problem(seed=seed) for seed in range(8)]
    expected = [localattn.local_attention(*p, 5) for p in problems]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda p: localattn.local_attention(*p, 5), problems * 4))
    assert all(torch.equal(got, expected[i % 8]) for i, got in enumerate(results))


class _Attended(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return localattn.local_attention(*random_problem(seed=index), 5)


def test_in_forked_workers():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        expected = [_Attended()[i] for i in range(4)]  # the parent's threads run before the fork
        loader = DataLoader(_Attended(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        assert all(torch.equal(got, e) for got, e in zip(loader, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    query, key, value = random_problem()
    bias, mask = torch.randn(2, 9), torch.rand(key.shape[:3]) < 0.8
    query.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        got, lse = localattn.local_attention(query, key.bfloat16(), value, 3, bias=bias, key_mask=mask, return_lse=True)
        doubles = localattn.local_attention(*(t.double() for t in (query, key, value)), 3)
    assert got.dtype == dtype
    assert lse.dtype == torch.float32
    assert doubles.dtype == torch.float64
    cast = [t.to(dtype) for t in (query, key.bfloat16(), value, bias)]
    expected = localattn.local_attention(*cast[:3], 3, bias=cast[3], key_mask=mask)
    assert torch.equal(got, expected)
    got.sum().backward()
    assert query.grad.dtype == torch.float32
