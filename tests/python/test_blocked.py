"""Windows that blocks of queries share (stride above 1), which have a kernel of their own: on every variant against the
readable definition, forward and backward."""

import random

import pytest
import torch
from configurations import LAYOUTS, SEED, Configuration, available_variants, forced, run, tensors_of
from test_random import check

import localattn


def configuration(i: int) -> Configuration:
    rng = random.Random(1000 * SEED + i)
    rank = 2 if rng.random() < 0.85 else 1
    stride = tuple(rng.choice([4, 5, 8] if rank == 2 else [16, 70, 130]) for _ in range(rank))
    keys = tuple(rng.randint(1, 4) * s + rng.choice([0, 0, 1, s - 1]) for s in stride)
    # Queries of another resolution: half, twice, or no simple ratio.
    ratio = rng.choice([1, 1, 1, 2, 0.5, 1.3])
    queries = tuple(max(1, int(ratio * k)) for k in keys)
    biased = rng.random() < 0.6
    broadcast = tuple(rng.random() < 0.1 for _ in range(rank + 3))
    channels = rng.choice([1, 4, 7, 16, 20, 33])
    return Configuration(
        batch=rng.choice([1, 2]),
        query_extent=queries,
        key_extent=keys,
        heads=(heads := rng.choice([1, 2, 3])),
        kv_heads=heads,
        channels=channels,
        value_channels=rng.choice([channels, 1, 5, 24]),
        kernel_size=tuple(s + rng.choice([0, 1, s, 2 * s]) for s in stride),
        stride=stride,
        dilation=(1,) * rank,
        is_causal=(False,) * rank,
        border=rng.choice(["mask", "zero", "zero", "shift"]),
        scale=rng.choice([None, 0.0, -1.25]),
        bias=None,
        rel_pos_bias=False,
        axis_bias=tuple(broadcast if biased and rng.random() < 0.8 else None for _ in range(rank)),
        key_mask=False,
        gradient_of_lse=rng.random() < 0.5,
        layout=rng.choice(LAYOUTS),
        seed=i,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", range(4))
def test_every_variant(dtype, part):
    for i in range(part, 32, 4):
        problem = configuration(i)
        tensors = tensors_of(problem, dtype)
        wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in tensors.items()}
        output, lse, gradients = run(localattn.reference.local_attention, problem, wide)
        expected = output.numpy(), lse.numpy(), {name: g.numpy() for name, g in gradients.items()}
        for variant in available_variants():
            if variant != "reference":
                with forced(variant):
                    check(localattn.local_attention, problem, tensors, dtype, expected)


def test_same_bits_on_any_number_of_threads():
    query, key, value = (torch.randn(1, 40, 24, 2, 8, requires_grad=True) for _ in range(3))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            output = localattn.local_attention(query, key, value, 14, stride=8, border="zero")
            results.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value))))
        finally:
            torch.set_num_threads(threads)
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_infinity_stays_in_the_windows_that_see_it():
    query, key, value = torch.randn(3, 1, 24, 24, 1, 16)
    expected = localattn.local_attention(query, key, value, 10, stride=8, border="zero")
    key[0, 0, 0], value[0, 1, 1] = float("nan"), float("inf")
    output = localattn.local_attention(query, key, value, 10, stride=8, border="zero")
    assert not output[0, :8, :8].isfinite().all()
    seen = torch.zeros(24, 24, dtype=torch.bool)
    seen[:8, :8] = True
    torch.testing.assert_close(output[0][~seen], expected[0][~seen])
