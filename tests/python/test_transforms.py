"""torch.func's transforms and forward mode, each alone and inside each other, against derivatives in reverse mode."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import localattn
from localattn import nn


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


REGIONS = torch.tensor([[[0, 1], [3, 0], [2, 1], [0, 0]]] * 2)
IMAGE = random(2, 4, 4, 2, 3)
OPERATORS = {
    "local_attention": (
        lambda q, k, v, b: localattn.local_attention(q, k, v, 3, axis_bias=[b, None], return_lse=True),
        (IMAGE, IMAGE.flip(1), IMAGE.flip(2), random(2, 4, 4, 2, 3).sin()),
    ),
    "routed_attention": (
        lambda q, k, v, w: localattn.routed_attention(
            q, k, v, REGIONS[: len(q)].to(q.device), 2, region_weight=w, return_lse=True
        ),
        (IMAGE, IMAGE.flip(1), IMAGE.flip(2), random(2, 4, 2).sigmoid()),
    ),
    "linear_attention": (localattn.linear_attention, (IMAGE, IMAGE.flip(1), IMAGE.flip(2))),
    "similarity": (lambda q, k: localattn.similarity(q, k, 3, fill=0.5), (IMAGE, IMAGE.flip(1))),
    "weighting": (lambda w, v: localattn.weighting(w, v, 3, border="shift"), (random(2, 4, 4, 2, 9), IMAGE)),
}


def scalar(name):
    """The operator's results as one number whose second derivative does not vanish, its inputs and a direction."""
    operator, inputs = OPERATORS[name]

    def function(*inputs):
        results = operator(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        return sum(x.pow(3).sum() for x in results)

    return function, inputs, tuple(x.cos() for x in inputs)


def reverse_mode(function, inputs, direction):
    """Gradients, and the product of the Hessian with the direction."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    gradients = torch.autograd.grad(function(*inputs), inputs, create_graph=True)
    change = along(gradients, direction)
    return tuple(g.detach() for g in gradients), torch.autograd.grad(change, inputs)


def along(gradients, direction):
    return sum((g * d).sum() for g, d in zip(gradients, direction))


@pytest.mark.parametrize("name", OPERATORS)
def test_meta_tensors(name):
    """Shapes alone, by which large models are counted and planned."""
    function, inputs, direction = scalar(name)
    for gradients in reverse_mode(function, *([x.to("meta") for x in tensors] for tensors in (inputs, direction))):
        assert [(g.shape, g.device.type) for g in gradients] == [(x.shape, "meta") for x in inputs]


@pytest.mark.parametrize("name", OPERATORS)
def test_first_derivatives(name):
    function, inputs, direction = scalar(name)
    every = tuple(range(len(inputs)))
    gradients, _ = reverse_mode(function, inputs, direction)
    change = along(gradients, direction)
    torch.testing.assert_close(grad(function, every)(*inputs), gradients)
    torch.testing.assert_close(jacrev(function, every)(*inputs), gradients)
    torch.testing.assert_close(jacfwd(function, every)(*inputs), gradients)
    torch.testing.assert_close(jvp(function, inputs, direction)[1], change)
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, inputs, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, change)


@pytest.mark.parametrize("name", OPERATORS)
def test_second_derivatives(name):
    function, inputs, direction = scalar(name)
    every = tuple(range(len(inputs)))
    _, products = reverse_mode(function, inputs, direction)

    def change(*inputs):
        return jvp(function, inputs, direction)[1]

    torch.testing.assert_close(jvp(grad(function, every), inputs, direction)[1], products)
    torch.testing.assert_close(grad(change, every)(*inputs), products)
    torch.testing.assert_close(vjp(grad(function, every), *inputs)[1](direction), products)
    torch.testing.assert_close(jvp(change, inputs, direction)[1], along(products, direction))


@pytest.mark.parametrize("name", OPERATORS)
def test_forward_mode_of_a_pullback(name):
    """Where only the backward operator meets a tangent. It is linear, so its derivative is itself."""
    operator, inputs = OPERATORS[name]
    results, pullback = vjp(operator, *inputs)
    cotangents = tuple(map(torch.sin, results)) if isinstance(results, tuple) else results.sin()
    _, change = jvp(pullback, (cotangents,), (cotangents,))
    torch.testing.assert_close(change, pullback(cotangents))


@pytest.mark.parametrize("name", OPERATORS)
def test_mapped(name):
    function, inputs, direction = scalar(name)
    every = tuple(range(len(inputs)))
    gradients, _ = reverse_mode(function, inputs, direction)
    stacked = tuple(torch.stack([0.5 * x, x]) for x in inputs)
    of_each = vmap(grad(function, every))(*stacked)
    torch.testing.assert_close(tuple(g[1] for g in of_each), gradients)
    torch.testing.assert_close(tuple(g[0] for g in of_each), grad(function, every)(*(x[0] for x in stacked)))

    def of_mapped(*inputs):
        return vmap(function)(*(x[None] for x in inputs)).sum()

    torch.testing.assert_close(grad(of_mapped, every)(*inputs), gradients)


def test_hessian():
    def function(x):
        return localattn.local_attention(x, x, x, 3).pow(3).sum()

    x = random(1, 2, 2, 1, 2)
    torch.testing.assert_close(hessian(function)(x), torch.autograd.functional.hessian(function, x))


@pytest.mark.parametrize(
    "module",
    [
        nn.NeighborhoodAttention2D(8, 2, 3),
        nn.HaloAttn(8, num_heads=2, block_size=2, halo_size=1),
        nn.BiLevelRoutingAttention(8, num_heads=2, n_win=2, topk=2),
        nn.EfficientAttention(8, 8, 2, 8),
    ],
    ids=lambda module: type(module).__name__,
)
def test_gradients_of_each_sample(module):
    """Through the modules' parameters, as for differential privacy."""
    module = module.double().eval()
    channels_last = isinstance(module, (nn.NeighborhoodAttention2D, nn.BiLevelRoutingAttention))
    images = random(3, 4, 4, 8) if channels_last else random(3, 8, 4, 4)
    parameters = dict(module.named_parameters())

    def loss(parameters, image):
        return functional_call(module, parameters, (image[None],)).pow(2).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        wanted = torch.autograd.grad(loss(parameters, image), tuple(parameters.values()), materialize_grads=True)
        torch.testing.assert_close(tuple(per_sample[name][i] for name in parameters), wanted)


@pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch.compile of torch 2.4 refuses torch.func; seen to work from 2.7 on"
)
@pytest.mark.parametrize("name", ["local_attention", "similarity"])
def test_compiled(name):
    function, inputs, direction = scalar(name)

    def pushed(*inputs):
        return jvp(function, inputs, direction)[1]

    def mapped(*inputs):
        return vmap(grad(function))(*(x[None] for x in inputs))[0]

    for transformed in (grad(function), pushed, mapped):
        compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), transformed(*inputs))
