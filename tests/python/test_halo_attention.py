"""nn.HaloAttn: against an unfolded form, in parts against the composition of operators, under transforms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from localattn import nn
from localattn.nn import _halo_function


def close(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def unfolded_halo(module: nn.HaloAttn, x: torch.Tensor) -> torch.Tensor:
    """Halo attention block by block, from its definition. Blocks at the right and bottom may be cut off."""
    heads, dk, dv, block, halo, win = (
        module.num_heads, module.dim_head_qk, module.dim_head_v, module.block_size, module.halo_size, module.window,
    )  # fmt: skip
    batch, _, height, width = x.shape
    step = module.q.stride[0]
    query = module.q(x).unflatten(1, (heads, dk))
    kv = module.kv(x).unflatten(1, (heads, dk + dv))
    kv = F.pad(kv, (halo, win, halo, win))
    on_map = F.pad(torch.ones(height, width, dtype=torch.bool), (halo, win, halo, win))
    output = x.new_zeros(batch, heads, dv, *query.shape[-2:])
    entry = torch.arange(win)
    for y in range(query.shape[-2]):
        for x_ in range(query.shape[-1]):
            by, bx = y * step // block * block, x_ * step // block * block
            i, j = y % (block // step), x_ % (block // step)
            window = kv[..., by : by + win, bx : bx + win]
            there = on_map[by : by + win, bx : bx + win]
            q = query[..., y, x_]
            rows = q @ module.pos_embed.height_rel[entry - i + win - 1].T
            columns = q @ module.pos_embed.width_rel[entry - j + win - 1].T
            position = rows[..., :, None] + columns[..., None, :]
            scores = torch.einsum("bhd,bhduv->bhuv", q, window[:, :, :dk]) * module.scale
            scores = scores + position * (module.scale if module.scale_pos_embed else 1)
            if module.border == "mask":
                scores = scores.masked_fill(~there, -math.inf)
            weights = scores.flatten(2).softmax(-1)
            output[..., y, x_] = torch.einsum("bhe,bhde->bhd", weights, window[:, :, dk:].flatten(3))
    return output.flatten(1, 2)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"block_size": 4, "halo_size": 1}, (8, 12)),
        ({"block_size": 4, "halo_size": 2, "border": "mask", "qkv_bias": True}, (8, 8)),
        ({"block_size": 4, "halo_size": 0, "stride": 2, "scale_pos_embed": True}, (8, 4)),
        ({"block_size": 3, "halo_size": 2, "dim_head": 3}, (6, 9)),
        ({"block_size": 4, "halo_size": 3, "auto_pad": True}, (7, 9)),
        ({"block_size": 4, "halo_size": 3, "auto_pad": True, "stride": 2}, (7, 10)),
        ({"block_size": 8, "halo_size": 1, "auto_pad": True, "border": "mask"}, (3, 5)),
        ({"block_size": 1, "halo_size": 1}, (3, 4)),
    ],
    ids=str,
)
def test_halo_attention(options, size):
    torch.manual_seed(0)
    module = nn.HaloAttn(8, num_heads=2, **options).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    close(module(x), unfolded_halo(module, x))


@pytest.mark.parametrize(("block", "avg_down", "size"), [(3, False, (6, 9)), (4, True, (8, 4)), (5, True, (7, 9))])
def test_halo_attention_pools(block, avg_down, size):
    torch.manual_seed(0)
    options = {"num_heads": 2, "block_size": block, "auto_pad": any(s % block for s in size)}
    module = nn.HaloAttn(8, stride=2, avg_down=avg_down, **options).double()
    full = nn.HaloAttn(8, **options).double()
    full.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    expected = F.avg_pool2d(full(x), 2, ceil_mode=options["auto_pad"])
    close(module(x), expected)
    if options["auto_pad"]:
        assert module(x).shape[2:] == tuple(-(-s // 2) for s in size)


@pytest.mark.parametrize("part", [1, 3000, 10**9], ids=["one_head", "some_images", "all"])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"block_size": 4, "halo_size": 1}, (8, 12)),
        ({"block_size": 4, "halo_size": 2, "qkv_bias": True, "scale_pos_embed": True, "border": "mask"}, (8, 4)),
        ({"block_size": 4, "halo_size": 1, "stride": 2, "qkv_bias": True}, (8, 8)),
        ({"block_size": 4, "halo_size": 3, "auto_pad": True, "dim_head": 5}, (7, 9)),
        ({"block_size": 8, "halo_size": 3, "num_heads": 1}, (32, 40)),  # its products are cut too
    ],
    ids=str,
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_halo_attention_in_parts(options, size, part, channels_last, monkeypatch):
    """The function that takes some heads and images at a time, against the composition of operators."""
    monkeypatch.setattr(_halo_function, "PART_BYTES", part)
    torch.manual_seed(0)
    module = nn.HaloAttn(**{"dim": 12, "dim_out": 8, "num_heads": 4, **options}).double()
    x = torch.randn(3, 12, *size, dtype=torch.float64, requires_grad=True)
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    output = module(x)
    assert "HaloAttention" in type(output.grad_fn).__name__ + type(output.grad_fn.next_functions[0][0]).__name__
    inputs, grad_output = (x, *module.parameters()), torch.randn(output.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(output, inputs, grad_output, retain_graph=True)
    for again, gradient in zip(torch.autograd.grad(output, inputs, grad_output), gradients):
        assert torch.equal(again, gradient)
    some = (inputs[1], inputs[-1])  # what needs no gradient gets none
    for parameter in module.parameters():
        parameter.requires_grad_(any(parameter is tensor for tensor in some))
    for alone, gradient in zip(
        torch.autograd.grad(module(x.detach()), some, grad_output), (gradients[1], gradients[-1])
    ):
        close(alone, gradient)
    module.requires_grad_()
    monkeypatch.setattr(_halo_function.HaloAttention, "takes", lambda tensors: False)
    expected = module(x)
    assert "HaloAttention" not in type(expected.grad_fn).__name__
    close(output, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, inputs, grad_output)):
        close(gradient, other)


@pytest.mark.parametrize("stride", [1, 2])
def test_halo_attention_under_transforms(stride):
    torch.manual_seed(0)
    options = {"num_heads": 2, "block_size": 2, "halo_size": 1, "qkv_bias": True, "stride": stride}
    module = nn.HaloAttn(2, 4, qk_ratio=0.5, **options).double()
    names, parameters = zip(*module.named_parameters())

    def attend(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), x)

    x = torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(attend, (x, *parameters), fast_mode=True)
    assert gradgradcheck(attend, (x, *parameters), fast_mode=True)
    output = module(x)
    grad_outputs = torch.randn(3, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, x, grad_outputs, is_grads_batched=True, retain_graph=True)[0]
    for gradient, grad_output in zip(together, grad_outputs):
        close(gradient, torch.autograd.grad(output, x, grad_output, retain_graph=True)[0])
    functional = torch.func.grad(lambda x: attend(x, *parameters).sin().sum())(x.detach())
    close(functional, torch.autograd.grad(output.sin().sum(), x)[0])
    _, tangent = torch.func.jvp(lambda x: attend(x, *parameters), (x.detach(),), (torch.ones_like(x),))
    assert tangent.isfinite().all()
    assert tangent.abs().max() > 0


def test_halo_attention_parameters():
    module = nn.HaloAttn(32, 48, num_heads=4, block_size=4, halo_size=2, qk_ratio=0.5, qkv_bias=True)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    assert shapes == {
        "q.weight": (24, 32, 1, 1),
        "q.bias": (24,),
        "kv.weight": (24 + 48, 32, 1, 1),
        "kv.bias": (72,),
        "pos_embed.height_rel": (15, 6),
        "pos_embed.width_rel": (15, 6),
    }
    assert nn.HaloAttn(256, num_heads=8).state_dict().keys() == shapes.keys() - {"q.bias", "kv.bias"}


@pytest.mark.parametrize(
    ("channels", "rounded"), [(1, 8), (12, 16), (11, 16), (16, 16), (17, 16), (18, 24), (20, 24), (100, 104)]
)
def test_query_width_is_a_multiple_of_eight(channels, rounded):
    assert nn.HaloAttn(channels, num_heads=1).dim_head_qk == rounded
