"""merge_attentions: attention over parts of the keys, put together."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import localattn


def parts(number=3, dtype=torch.float64, shape=(2, 5, 3), channels=4):
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(*shape, channels, generator=generator, dtype=dtype) for _ in range(number)]
    lses = [3 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(number)]
    return [o.requires_grad_() for o in outputs], [s.requires_grad_() for s in lses]


def test_equals_one_attention_over_all_keys():
    """The windows of the two key maps together, by concatenating scores and values."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    query, keys, values = numbers(1, 6, 6, 2, 4), [], []
    outputs, lses, scores, gathered = [], [], [], []
    for extent, kernel in (((6, 6), (3, 5)), ((2, 2), (3, 3))):
        key, value = numbers(1, *extent, 2, 4), numbers(1, *extent, 2, 3)
        keys.append(key)
        values.append(value)
        output, lse = localattn.local_attention(query, key, value, kernel, return_lse=True)
        outputs.append(output)
        lses.append(lse)
        scores.append(localattn.reference.similarity(query, key, kernel) * 0.5)
        windows = localattn.reference.windows(
            (6, 6), extent, localattn.ops.window_options(2, kernel, 1, 1, False, "mask"), query.device
        )
        gathered.append(localattn.reference._gather(value, windows.position).unflatten(1, (6, 6)).transpose(3, 4))
    expected_lse = torch.cat(scores, -1).logsumexp(-1)
    weights = (torch.cat(scores, -1) - expected_lse.unsqueeze(-1)).exp()
    expected = torch.einsum("byxhe,byxhec->byxhc", weights, torch.cat(gathered, 4))
    output, lse = localattn.merge_attentions(outputs, lses)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    inputs = (query, *keys, *values)
    got = torch.autograd.grad(output.sin().sum() + lse.cos().sum(), inputs)
    for g, e in zip(got, torch.autograd.grad(expected.sin().sum() + expected_lse.cos().sum(), inputs)):
        torch.testing.assert_close(g, e)


def test_derivatives():
    outputs, lses = parts()

    def merge(*tensors):
        return localattn.merge_attentions(tensors[:3], tensors[3:])

    assert gradcheck(merge, (*outputs, *lses))
    assert gradgradcheck(merge, (*outputs, *lses), fast_mode=True)


def test_parts_without_keys():
    outputs, lses = parts()
    with torch.no_grad():
        lses[0][:, :2] = -math.inf
        lses[1][:, 0] = -math.inf
        lses[2][:, 0] = -math.inf
    output, lse = localattn.merge_attentions(outputs, lses)
    assert torch.equal(output[:, 0], torch.zeros_like(output[:, 0]))
    assert (lse[:, 0] == -math.inf).all()
    without_first = localattn.merge_attentions(outputs[1:], lses[1:])
    torch.testing.assert_close(output[:, 1], without_first[0][:, 1])
    torch.testing.assert_close(lse[:, 1], without_first[1][:, 1])
    gradients = torch.autograd.grad(output.sum() + lse[:, 1:].sum(), (*outputs, *lses))
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert torch.equal(gradient[:, 0], torch.zeros_like(gradient[:, 0]))


def test_one_part_and_large_scores():
    outputs, lses = parts(1)
    output, lse = localattn.merge_attentions(outputs, lses)
    torch.testing.assert_close((output, lse), (outputs[0], lses[0]))
    output, lse = localattn.merge_attentions([outputs[0]] * 2, [lses[0] + 5000] * 2)
    torch.testing.assert_close((output, lse), (outputs[0], lses[0] + 5000 + math.log(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_merged_in_float32(dtype):
    outputs, lses = parts()
    low, single = [o.to(dtype) for o in outputs], [s.float() for s in lses]
    output, lse = localattn.merge_attentions(low, single)
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    expected, expected_lse = localattn.merge_attentions([o.float() for o in low], single)
    assert torch.equal(output, expected.to(dtype))
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda o, s: ([], []), "outputs"),
        (lambda o, s: (o, s[:2]), "lses"),
        (lambda o, s: ([o[0], o[1][:1], o[2]], s), "outputs"),
        (lambda o, s: ([o[0].float(), *o[1:]], s), "outputs"),
        (lambda o, s: (o, [s[0].unsqueeze(-1), *s[1:]]), "lses"),
    ],
)
def test_bad_input(change, name):
    with pytest.raises(ValueError, match=name):
        localattn.merge_attentions(*change(*parts()))
