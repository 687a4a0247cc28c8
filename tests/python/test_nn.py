"""The modules: options beyond the recorded cases against independent formulations, layouts, dtypes, compilation,
parameter names and refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from localattn import nn, reference
from localattn.compat import image_local_attention, image_local_attention_fork, natten017

# One of every module, with the shape it takes.
EVERY_MODULE = {
    "LocalAttention": (lambda: nn.LocalAttention(3, 8, 5, 3, heads=2), (2, 3, 9, 8)),
    "LocalAttention.raster": (lambda: nn.LocalAttention(3, 4, 3, 5, border="mask", is_causal="raster"), (2, 3, 6, 7)),
    "NeighborhoodAttention1D": (lambda: nn.NeighborhoodAttention1D(8, 2, 5, stride=2, dilation=2), (2, 13, 8)),
    "NeighborhoodAttention2D": (lambda: nn.NeighborhoodAttention2D(8, 2, (3, 4), rel_pos_bias=True), (2, 7, 6, 8)),
    "NeighborhoodAttention3D": (lambda: nn.NeighborhoodAttention3D(8, 2, 3, is_causal=True), (2, 3, 4, 5, 8)),
    "NeighborhoodAttention2D.dropout": (
        lambda: nn.NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3, rel_pos_bias=True, attn_drop=0.5),
        (2, 7, 6, 8),
    ),
    "HaloAttn": (lambda: nn.HaloAttn(8, num_heads=2, block_size=4, halo_size=1, stride=2), (2, 8, 8, 12)),
    "HaloAttn.auto_pad": (lambda: nn.HaloAttn(8, num_heads=2, block_size=4, halo_size=1, auto_pad=True), (2, 8, 7, 9)),
    "BiLevelRoutingAttention": (
        lambda: nn.BiLevelRoutingAttention(8, 2, n_win=2, topk=2, soft_routing=True, diff_routing=True),
        (2, 6, 8, 8),
    ),
    "nchwBRA": (lambda: nn.nchwBRA(8, 2, n_win=3, topk=2), (2, 8, 7, 8)),
    "Block": (lambda: nn.Block(8, num_heads=2, n_win=2, topk=3, kv_per_win=2), (2, 8, 8, 6)),
    "Block.full": (lambda: nn.Block(8, topk=-2), (2, 8, 5, 6)),
    "EfficientAttention": (lambda: nn.EfficientAttention(8, 4, 2, 6), (2, 8, 5, 6)),
}
every_module = pytest.mark.parametrize("name", EVERY_MODULE)


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    build, shape = EVERY_MODULE[name]
    return build().to(dtype).eval(), torch.randn(shape, dtype=dtype)


def close(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


# ---- what holds for every module -------------------------------------------------------------------------------------


@every_module
def test_torch_compile_and_export(name):
    module, x = make(name)
    expected = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    close(compiled(x), expected, 1e-6)
    gradients = [torch.autograd.grad(f(x).square().sum(), module.parameters()) for f in (module, compiled)]
    for got, wanted in zip(*gradients):
        close(got, wanted, 1e-5)
    exported = torch.export.export(module, (x,))
    close(exported.module()(x), expected, 1e-6)


@every_module
def test_non_contiguous_input_and_expanded_gradient(name):
    module, x = make(name, torch.float64)
    plain = x.clone().requires_grad_()
    output = module(plain)
    output.backward(torch.ones_like(output))

    strided = x.new_zeros(*x.shape, 2)
    strided[..., 1] = x
    for view in (strided[..., 1], x.transpose(1, -1).contiguous().transpose(1, -1)):
        assert view.stride() != x.stride()
        view = view.detach().requires_grad_()
        output = module(view)
        output.sum().backward()
        close(view.grad, plain.grad)

    row = x[:1].expand_as(x)
    close(module(row), module(row.clone()))


@every_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(name, dtype):
    module, x = make(name, torch.float64)
    expected = module(x)
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 6e-2, torch.float32: 1e-5}[dtype]
    if "Routing" in name or "BRA" in name or "Block" in name:
        # Which regions are chosen may turn on a rounding, so the values are only comparable if all are chosen.
        module, x = all_regions(name)
        expected = module(x)
    x = x.to(dtype).requires_grad_()
    output = module.to(dtype)(x)
    assert output.dtype == dtype
    close(output.double(), expected, tolerance)
    output.sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


def all_regions(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    module, x = make(name, torch.float64)
    for part in module.modules():
        if isinstance(part, nn.BiLevelRoutingAttention):
            part.router.topk = part.n_win**2
        if isinstance(part, nn.nchwBRA):
            part.topk = math.prod(-(-size // (size // part.n_win)) for size in x.shape[2:])
    return module, x


@every_module
def test_autocast(name):
    module, x = make(name)
    if "Routing" in name or "BRA" in name or "Block" in name:
        module, x = (value.float() for value in all_regions(name))
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x.requires_grad_())
    residual = ("Block", "Block.full", "EfficientAttention")  # the sum with a float32 input is float32
    assert output.dtype == (torch.float32 if name in residual else torch.bfloat16)
    close(output.float(), expected, 6e-2)
    output.float().sum().backward()
    assert x.grad.isfinite().all()


class Doubled(torch.nn.Module):
    """A layer wrapped as adapters wrap it: what it holds under the layer's names is not what it computes."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return 2 * self.layer(x)


PROJECTIONS = {
    "HaloAttn": ("q", "kv"),
    "BiLevelRoutingAttention": ("qkv.qkv", "wo"),
    "nchwBRA": ("qkv_linear", "output_linear"),
    "EfficientAttention": ("queries", "keys", "values", "reprojection"),
}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in PROJECTIONS.items() for path in paths])
def test_wrapped_and_hooked_projections_count(name, path):
    module, x = all_regions(name)  # so that routing changes no choice
    parent, _, child = path.rpartition(".")
    layer = module.get_submodule(path)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 2
        expected = module(x)
        for parameter in layer.parameters():
            parameter /= 2
    handle = layer.register_forward_hook(lambda layer, inputs, output: 2 * output)
    close(module(x), expected)
    handle.remove()
    setattr(module.get_submodule(parent), child, Doubled(layer))
    close(module(x), expected)


@every_module
def test_empty_batch(name):
    module, x = make(name)
    expected = module(x).shape
    assert module(x[:0]).shape == (0, *expected[1:])


@every_module
def test_training_reaches_every_parameter(name):
    module, x = make(name)
    module.train()(x).square().sum().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0 or parameter_name.endswith("keys.bias"), parameter_name


@every_module
def test_derivatives(name):
    """Of first and second order by input and parameters, and in forward mode."""
    module, x = make(name, torch.float64)
    names, parameters = zip(*module.named_parameters())

    def call(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x,))

    inputs = (x.requires_grad_(), *(p.detach().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.BiFormer((1, 1, 1, 1), (8, 8, 8, 8), head_dim=8, n_win=2, topks=(1, 0, -1, -2)), (2, 3, 64, 64)),
        (
            lambda: nn.BiLevelRoutingAttention(8, 2, n_win=2, kv_downsample_mode="ada_maxpool", auto_pad=True),
            (2, 5, 9, 8),
        ),
        (lambda: nn.HaloAttn(8, num_heads=2, block_size=3, halo_size=1, stride=2), (2, 8, 6, 9)),
        (lambda: nn.EfficientAttention(8, 4, 1, 6), (2, 8, 5, 6)),
        (lambda: image_local_attention.TorchLocalAttention(3, 8, 3, 5), (2, 3, 6, 7)),
        (lambda: image_local_attention_fork.LocalAttention(3, 8, 3, 5), (2, 3, 6, 7)),
        (lambda: natten017.NeighborhoodAttention2D(8, 2, 3, 2, rel_pos_bias=True), (2, 7, 6, 8)),
    ],
    ids=["BiFormer", "auto_pad", "pooled", "one_head", "plain", "fork", "natten017"],
)
def test_torch_compile_and_export_of_more(build, shape):
    torch.manual_seed(0)
    module, x = build().eval(), torch.randn(shape)
    expected = module(x)
    torch._dynamo.reset()
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected, 1e-5)
    close(torch.export.export(module, (x,)).module()(x), expected, 1e-5)


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: nn.LocalAttention(3, 8, 5, 7), {f"conv{i}.weight": (8, 3, 1, 1) for i in (1, 2, 3)}),
        (
            lambda: nn.nchwBRA(8, 2, side_dwconv=5),
            {
                "lepe.weight": (8, 1, 5, 5),
                "lepe.bias": (8,),
                "qkv_linear.weight": (24, 8, 1, 1),
                "qkv_linear.bias": (24,),
                "output_linear.weight": (8, 8, 1, 1),
                "output_linear.bias": (8,),
            },
        ),
        (
            lambda: nn.Block(8, topk=0, mlp_ratio=3, mlp_dwconv=True, layer_scale_init_value=0.1),
            {
                "gamma1": (8,),
                "gamma2": (8,),
                "pos_embed.weight": (8, 1, 3, 3),
                "pos_embed.bias": (8,),
                "norm1.weight": (8,),
                "norm1.bias": (8,),
                "attn.1.weight": (8, 8, 1, 1),
                "attn.1.bias": (8,),
                "attn.2.weight": (8, 1, 5, 5),
                "attn.2.bias": (8,),
                "attn.3.weight": (8, 8, 1, 1),
                "attn.3.bias": (8,),
                "norm2.weight": (8,),
                "norm2.bias": (8,),
                "mlp.0.weight": (24, 8),
                "mlp.0.bias": (24,),
                "mlp.1.dwconv.weight": (24, 1, 3, 3),
                "mlp.1.dwconv.bias": (24,),
                "mlp.3.weight": (8, 24),
                "mlp.3.bias": (8,),
            },
        ),
    ],
    ids=["LocalAttention", "nchwBRA", "Block"],
)
def test_parameter_names_and_shapes(build, names):
    assert {name: tuple(p.shape) for name, p in build().state_dict().items()} == names


# ---- LocalAttention --------------------------------------------------------------------------------------------------


def test_local_attention_published_example():
    x = torch.randn(32, 3, 64, 64)
    module = nn.LocalAttention(inp_channels=3, out_channels=16, kH=7, kW=7)
    output = module(x)
    assert output.shape == (32, 16, 64, 64)
    assert output.is_contiguous()
    sample = module.double()(x[5:6].double())
    query, key, value = (conv(x[5:6].double()) for conv in (module.conv1, module.conv2, module.conv3))
    windows = [F.unfold(m, 7, padding=3).view(1, 16, 49, 64, 64) for m in (key, value)]
    weights = torch.einsum("nchw,ncphw->nphw", query, windows[0]).softmax(1)
    close(sample, torch.einsum("nphw,ncphw->nchw", weights, windows[1]))
    close(output[5:6].double(), sample, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 2},
        {"heads": 4, "scale": None},
        {"border": "mask", "dilation": (2, 1)},
        {"border": "shift", "stride": (2, 3), "scale": 0.5},
        {"border": "shift", "is_causal": (True, False)},
        {"is_causal": "raster"},
        {"scale": 0.0},
    ],
    ids=str,
)
def test_local_attention_options(options):
    torch.manual_seed(0)
    module = nn.LocalAttention(3, 8, 5, 3, **options).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    options = {"border": "zero", "scale": 1.0, **options}
    heads = options.pop("heads", 1)
    maps = (
        conv(x).view(2, heads, 8 // heads, 9, 8).permute(0, 3, 4, 1, 2)
        for conv in (module.conv1, module.conv2, module.conv3)
    )
    expected = reference.local_attention(*maps, (5, 3), **options)
    close(module(x), expected.permute(0, 3, 4, 1, 2).reshape(2, 8, 9, 8))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_local_attention_copies_no_layout(memory_format, monkeypatch):
    import localattn.nn.local_attention as module_file

    seen = {}

    def recording(query, key, value, *args, **options):
        seen["inputs"] = (query, key, value)
        seen["output"] = real(query, key, value, *args, **options)
        return seen["output"]

    real = module_file.local_attention
    monkeypatch.setattr(module_file, "local_attention", recording)
    module = nn.LocalAttention(3, 8, 3, 3, heads=2).to(memory_format=memory_format)
    maps = []
    for conv in (module.conv1, module.conv2, module.conv3):
        conv.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    with torch.no_grad():
        output = module(torch.randn(2, 3, 6, 7).to(memory_format=memory_format))
    for given, projected in zip(seen["inputs"], maps):
        assert given.data_ptr() == projected.data_ptr()
    assert output.data_ptr() == seen["output"].data_ptr()
    assert output.is_contiguous(memory_format=memory_format)


def test_local_attention_second_derivative():
    torch.manual_seed(0)
    module = nn.LocalAttention(2, 2, 3, 3).double()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, (x,), fast_mode=True)


# ---- NeighborhoodAttention -------------------------------------------------------------------------------------------


def test_neighborhood_attention_takes_the_names_of_both_generations():
    torch.manual_seed(0)
    newer = nn.NeighborhoodAttention2D(12, 3, 3, 1, 2, False, False, 0.3, 0.0)
    older = nn.NeighborhoodAttention2D(dim=12, num_heads=3, kernel_size=3, dilation=2, qkv_bias=False, qk_scale=0.3)
    older.load_state_dict(newer.state_dict(), strict=True)
    x = torch.randn(1, 9, 8, 12)
    assert torch.equal(newer(x), older(x))
    assert newer.rpb is None
    assert nn.NeighborhoodAttention1D(8, 2, 3, qk_scale=0.0).scale == 0


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ({}, {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}),
        ({"qkv_bias": False, "rel_pos_bias": True}, {"rpb", "qkv.weight", "proj.weight", "proj.bias"}),
    ],
)
def test_neighborhood_attention_parameters(kind, names):
    for rank, module in (
        (1, nn.NeighborhoodAttention1D),
        (2, nn.NeighborhoodAttention2D),
        (3, nn.NeighborhoodAttention3D),
    ):
        state = module(8, 2, 5, **kind).state_dict()
        assert state.keys() == names
        assert state["qkv.weight"].shape == (24, 8)
        if "rpb" in names:
            assert state["rpb"].shape == (2, *(9,) * rank)
            assert 0 < state["rpb"].std() < 0.05


@pytest.mark.parametrize("options", [{}, {"is_causal": (True, False)}, {"stride": (2, 1), "dilation": (1, 2)}], ids=str)
def test_attention_dropout_takes_the_same_path_but_for_the_dropout(options):
    torch.manual_seed(0)
    module = nn.NeighborhoodAttention2D(8, 2, (4, 3), rel_pos_bias=True, attn_drop=0.4, **options).double()
    query, key, value = torch.randn(3, 2, 9, 8, 2, 4, dtype=torch.float64)
    fused = module._attend(query, key, value)
    module.attn_drop.eval()
    close(module._attend_with_dropout(query, key, value), fused)
    module.attn_drop.train()
    ones = torch.ones_like(value)
    dropped = module._attend_with_dropout(query, key, ones)
    assert dropped.std() > 0.1  # the weights no longer sum to one
    x = torch.randn(2, 9, 8, 8, dtype=torch.float64)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_maps_smaller_than_the_window():
    module = nn.NeighborhoodAttention2D(8, 2, 7, dilation=2)
    full = nn.NeighborhoodAttention2D(8, 2, 3)
    full.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 3, 8)
    assert module(x).shape == x.shape
    module.dilation = (1, 1)
    close(module(x), full(x), 1e-6)


# ---- BiLevelRoutingAttention, nchwBRA, Block -------------------------------------------------------------------------


def attention_to_all(module: nn.BiLevelRoutingAttention, x: torch.Tensor, pool) -> torch.Tensor:
    query, key, value = module.qkv(x)

    def tokens(y):
        return y.flatten(1, 2).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    attended = F.scaled_dot_product_attention(tokens(query), tokens(pool(key)), tokens(pool(value)), scale=module.scale)
    attended = attended.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])
    if module.lepe is not None:
        attended = attended + module.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return module.wo(attended)


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({}, lambda x: x),
        ({"qk_dim": 4, "qk_scale": 0.7, "side_dwconv": 0}, lambda x: x),
        ({"kv_downsample_mode": "avgpool", "kv_downsample_ratio": 2}, lambda x: F.avg_pool2d(x, 2)),
        ({"kv_downsample_mode": "maxpool", "kv_downsample_ratio": 3}, lambda x: F.max_pool2d(x, 3)),
        ({"kv_downsample_mode": "ada_avgpool", "kv_per_win": 2}, lambda x: F.avg_pool2d(x, 3)),
        ({"kv_downsample_mode": "ada_maxpool", "kv_per_win": 1}, lambda x: F.max_pool2d(x, 6)),
    ],
    ids=["identity", "qk_dim", "avgpool", "maxpool", "ada_avgpool", "ada_maxpool"],
)
def test_routing_to_every_region_is_full_attention(options, pool):
    torch.manual_seed(0)
    module = nn.BiLevelRoutingAttention(8, 2, n_win=2, topk=4, **options).double()
    x = torch.randn(2, 12, 12, 8, dtype=torch.float64)
    expected = attention_to_all(module, x, lambda y: pool(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    close(module(x), expected)


def test_attention_matrix_gives_the_output():
    torch.manual_seed(0)
    module = nn.BiLevelRoutingAttention(8, 2, n_win=2, topk=3, soft_routing=True, side_dwconv=0).double()
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    output, weight, index, attention = module(x, ret_attn_mask=True)
    assert attention.shape == (2 * 4, 2, 6, 3 * 6)
    value = module.qkv(x)[2].reshape(2, 2, 2, 2, 3, 2, 4).transpose(2, 3).reshape(2, 4, 6, 2, 4)
    routed = torch.stack([value[b, index[b]] * weight[b][..., None, None, None] for b in range(2)]).flatten(2, 3)
    attended = torch.einsum("brhpt,brthd->brphd", attention.unflatten(0, (2, 4)), routed)
    attended = attended.reshape(2, 2, 2, 2, 3, 8).transpose(2, 3).reshape(2, 4, 6, 8)
    close(output, module.wo(attended))


def test_both_forms_of_bilevel_routing_agree():
    torch.manual_seed(0)
    last, first = nn.BiLevelRoutingAttention(8, 2, n_win=2, topk=2).double(), nn.nchwBRA(8, 2, n_win=2, topk=2).double()
    state = last.state_dict()
    first.load_state_dict(
        {
            "lepe.weight": state["lepe.weight"],
            "lepe.bias": state["lepe.bias"],
            "qkv_linear.weight": state["qkv.qkv.weight"][..., None, None],
            "qkv_linear.bias": state["qkv.qkv.bias"],
            "output_linear.weight": state["wo.weight"][..., None, None],
            "output_linear.bias": state["wo.bias"],
        }
    )
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    close(first(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), last(x))


def test_bilevel_routing_parameters():
    every = nn.BiLevelRoutingAttention(
        16, 2, n_win=2, qk_dim=8, soft_routing=True, diff_routing=True, param_routing=True
    ).state_dict()
    assert {name: tuple(p.shape) for name, p in every.items()} == {
        "lepe.weight": (16, 1, 3, 3),
        "lepe.bias": (16,),
        "router.emb.weight": (8, 8),
        "router.emb.bias": (8,),
        "qkv.qkv.weight": (32, 16),
        "qkv.qkv.bias": (32,),
        "wo.weight": (16, 16),
        "wo.bias": (16,),
    }
    least = nn.BiLevelRoutingAttention(16, 2, n_win=2, param_attention="qkv", side_dwconv=0).state_dict()
    assert least.keys() == {"qkv.qkv.weight", "qkv.qkv.bias"}


def test_block_drops_branches_only_in_training():
    torch.manual_seed(0)
    block = nn.Block(8, drop_path=0.5, topk=0).double()
    x = torch.randn(64, 8, 2, 2, dtype=torch.float64)
    entry = (x + block.pos_embed(x)).detach()
    changed = (block(x) - entry).abs().amax((1, 2, 3)) > 0
    assert 0.5 < changed.double().mean() < 0.95  # three in four keep one of the two branches
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize(
    ("make_model", "millions", "stage_three"),
    [(nn.biformer_tiny, 13.1, 8), (nn.biformer_small, 25.5, 18), (nn.biformer_base, 56.8, 18)],
)
def test_released_biformer_layouts(make_model, millions, stage_three):
    with torch.device("meta"):
        model = make_model()
    state = model.state_dict()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    width = model.head.in_features
    shapes = {
        "downsample_layers.0.0.weight": (width // 16, 3, 3, 3),
        "downsample_layers.0.1.running_mean": (width // 16,),
        "downsample_layers.0.3.weight": (width // 8, width // 16, 3, 3),
        "downsample_layers.0.4.weight": (width // 8,),
        "downsample_layers.3.0.weight": (width, width // 2, 3, 3),
        "downsample_layers.3.1.num_batches_tracked": (),
        "stages.0.0.pos_embed.weight": (width // 8, 1, 3, 3),
        "stages.0.0.attn.qkv.qkv.weight": (3 * width // 8, width // 8),
        f"stages.2.{stage_three - 1}.attn.lepe.weight": (width // 2, 1, 5, 5),
        f"stages.2.{stage_three - 1}.mlp.3.weight": (width // 2, 3 * width // 2),
        "stages.3.0.attn.qkv.weight": (3 * width, width),
        "stages.3.0.attn.proj.bias": (width,),
        "stages.3.0.attn.lepe.bias": (width,),
        "norm.running_var": (width,),
        "head.weight": (1000, width),
    }
    for name, shape in shapes.items():
        assert tuple(state[name].shape) == shape, name
    assert f"stages.2.{stage_three}.norm1.weight" not in state
    assert "stages.3.0.attn.qkv.bias" not in state


@pytest.mark.parametrize("make_model", [nn.biformer_tiny, nn.biformer_small, nn.biformer_base])
def test_released_biformer_is_exported(make_model):
    with torch.device("meta"):
        model = make_model().eval()
    exported = torch.export.export(model, (torch.empty(2, 3, 224, 224, device="meta"),))
    assert exported.graph_signature.user_outputs
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    assert output.args[0][0].meta["val"].shape == (2, 1000)
    called = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.localattn.routed_attention.default) == sum(len(stage) for stage in model.stages)


def test_released_biformer_is_compiled():
    torch.manual_seed(0)
    model, x = nn.biformer_tiny().eval(), torch.randn(1, 3, 224, 224)
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), 1e-4)


def test_biformer_runs():
    torch.manual_seed(0)
    layout = {"topks": (1, 2, 4, -2), "n_win": 2, "head_dim": 8}
    model = nn.BiFormer((1, 1, 1, 1), (16, 16, 32, 32), num_classes=5, drop_path_rate=0.1, **layout)
    x = torch.randn(2, 3, 64, 64)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    output = model(x)
    assert output.shape == (2, 5)
    close(output[1:], model(x[1:]), 1e-5)
    assert model.forward_features(x).shape == (2, 32, 2, 2)


# ---- EfficientAttention ----------------------------------------------------------------------------------------------


def test_efficient_attention_defaults_in_circulation():
    module = nn.EfficientAttention(64)
    shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    assert shapes == {
        "keys.weight": (2, 64, 1, 1),
        "keys.bias": (2,),
        "queries.weight": (2, 64, 1, 1),
        "queries.bias": (2,),
        "values.weight": (2, 64, 1, 1),
        "values.bias": (2,),
        "reprojection.weight": (64, 2, 1, 1),
        "reprojection.bias": (64,),
    }
    x = torch.randn(1, 64, 8, 8)
    assert module(x).shape == x.shape


def test_efficient_attention_maps_give_the_output():
    torch.manual_seed(0)
    module = nn.EfficientAttention(8, 6, 2, 4, context_channels=5).double()
    x, context = torch.randn(2, 8, 4, 3, dtype=torch.float64), torch.randn(2, 5, 6, 7, dtype=torch.float64)
    mask = torch.rand(2, 6, 7) < 0.6
    output, queries, keys = module(x, context, key_mask=mask, return_maps=True)
    assert queries.shape == (2, 2, 3, 4, 3)
    assert keys.shape == (2, 2, 3, 6, 7)
    assert not keys[~mask[:, None, None].expand_as(keys)].any()
    close(keys.flatten(3).sum(-1), torch.ones(2, 2, 3, dtype=torch.float64))
    value = module.values(context).unflatten(1, (2, 2))
    attended = torch.einsum("bhcyx,bhcuv,bhduv->bhdyx", queries, keys, value).flatten(1, 2)
    close(output, module.reprojection(attended) + x)


def test_efficient_attention_leaves_masked_positions_out():
    torch.manual_seed(0)
    module = nn.EfficientAttention(8, 4, 2, 4).double()
    x, context = torch.randn(2, 8, 4, 3, dtype=torch.float64), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    mask = torch.zeros(2, 6, 5, dtype=torch.bool)
    mask[:, :4, :3] = True
    close(module(x, context, key_mask=mask), module(x, context[:, :, :4, :3]))
    nothing = module(x, context, key_mask=torch.zeros_like(mask))
    close(nothing, x + module.reprojection.bias[:, None, None])
    _, _, maps = module(x, context, key_mask=torch.zeros_like(mask), return_maps=True)
    assert not maps.any()


# ---- refusals --------------------------------------------------------------------------------------------------------


REFUSED_AT_CONSTRUCTION = [
    (lambda: nn.LocalAttention(3, 16, 7, 7, heads=3), ValueError, "heads must divide out_channels=16"),
    (lambda: nn.LocalAttention(3, 16, 0, 7), ValueError, "kernel_size must be at least 1"),
    (lambda: nn.LocalAttention(3, 16, 7, 7, border="reflect"), ValueError, "border must be one of .*'reflect'"),
    (lambda: nn.LocalAttention(3, 16, 3, 3, stride=4), ValueError, "stride must be between 1 and kernel_size"),
    (lambda: nn.LocalAttention(3, 16, 4, 3, is_causal="raster"), ValueError, "needs an odd kernel_size"),
    (lambda: nn.NeighborhoodAttention2D(10, 3, 3), ValueError, "num_heads must divide embed_dim=10"),
    (lambda: nn.NeighborhoodAttention2D(num_heads=3, kernel_size=3), TypeError, "embed_dim or dim"),
    (lambda: nn.NeighborhoodAttention2D(12, 3, 3, dim=12), TypeError, "embed_dim or dim"),
    (lambda: nn.NeighborhoodAttention2D(12), TypeError, "num_heads and kernel_size"),
    (lambda: nn.NeighborhoodAttention2D(12, 3, (3, 3, 3)), ValueError, "kernel_size must be an int or one int"),
    (lambda: nn.NeighborhoodAttention1D(12, 3, 3, dilation=0), ValueError, "dilation must be at least 1"),
    (lambda: nn.HaloAttn(16, stride=3), ValueError, "stride must be 1 or 2, got 3"),
    (lambda: nn.HaloAttn(16, 20, num_heads=8), ValueError, "num_heads must divide dim_out=20"),
    (lambda: nn.HaloAttn(64, num_heads=64, qk_ratio=0.25), ValueError, "qk_ratio=0.25 leaves no channel"),
    (lambda: nn.HaloAttn(16, block_size=0), ValueError, "block_size must be at least 1"),
    (lambda: nn.HaloAttn(16, halo_size=-1), ValueError, "halo_size must be at least 0"),
    (lambda: nn.HaloAttn(16, border="shift"), ValueError, "border must be 'zero' or 'mask'"),
    (lambda: nn.BiLevelRoutingAttention(20), ValueError, "num_heads must divide dim=20"),
    (lambda: nn.BiLevelRoutingAttention(16, 4, qk_dim=6), ValueError, "qk_dim=6"),
    (
        lambda: nn.BiLevelRoutingAttention(16, n_win=2, topk=5),
        ValueError,
        "between 1 and the 4 regions of n_win=2, got 5",
    ),
    (lambda: nn.BiLevelRoutingAttention(16, topk=0), ValueError, "topk must be between 1"),
    (lambda: nn.BiLevelRoutingAttention(16, n_win=0), ValueError, "n_win must be at least 1"),
    (
        lambda: nn.BiLevelRoutingAttention(16, param_routing=True, soft_routing=True),
        ValueError,
        "param_routing=True needs diff_routing=True",
    ),
    (
        lambda: nn.BiLevelRoutingAttention(16, diff_routing=True),
        ValueError,
        "diff_routing=True needs soft_routing=True",
    ),
    (
        lambda: nn.BiLevelRoutingAttention(16, kv_downsample_mode="fracpool"),
        ValueError,
        "kv_downsample_mode must be one",
    ),
    (lambda: nn.BiLevelRoutingAttention(16, param_attention="qkvo2"), ValueError, "param_attention must be"),
    (lambda: nn.BiLevelRoutingAttention(16, side_dwconv=4), ValueError, "side_dwconv must be odd"),
    (lambda: nn.BiLevelRoutingAttention(16, kv_downsample_mode="ada_avgpool", kv_per_win=-1), ValueError, "kv_per_win"),
    (
        lambda: nn.BiLevelRoutingAttention(16, kv_downsample_mode="maxpool", kv_downsample_ratio=0),
        ValueError,
        "kv_downsample_ratio",
    ),
    (lambda: nn.nchwBRA(20), ValueError, "num_heads must divide dim=20"),
    (lambda: nn.nchwBRA(16, n_win=1, topk=2), ValueError, "between 1 and the 1 regions"),
    (lambda: nn.nchwBRA(16, n_win=2, topk=10), ValueError, "between 1 and the 9 regions of n_win=2, got 10"),
    (lambda: nn.nchwBRA(16, attn_backend="cuda"), ValueError, "attn_backend must be 'torch'"),
    (lambda: nn.Block(12, topk=-1), ValueError, "full attention has 8 heads.*dim=12"),
    (lambda: nn.Block(16, topk=-3), ValueError, "topk must be above 0 .* got -3"),
    (lambda: nn.Block(16, before_attn_dwconv=2), ValueError, "before_attn_dwconv must be odd"),
    (lambda: nn.Block(16, n_win=1), ValueError, "between 1 and the 1 regions"),
    (lambda: nn.biformer_tiny(head_dim=48), ValueError, "head_dim must divide"),
    (lambda: nn.biformer_tiny(topks=(1, 4)), ValueError, "4 stages"),
    (lambda: nn.EfficientAttention(64, 3, 2, 2), ValueError, "key_channels must be a multiple of head_count=2, got 3"),
    (
        lambda: nn.EfficientAttention(64, 4, 4, 6),
        ValueError,
        "value_channels must be a multiple of head_count=4, got 6",
    ),
    (lambda: nn.EfficientAttention(64, 4, 0, 4), ValueError, "head_count must be at least 1"),
]


@pytest.mark.parametrize(("build", "error", "sentence"), REFUSED_AT_CONSTRUCTION)
def test_refused_at_construction(build, error, sentence):
    with pytest.raises(error, match=sentence):
        build()


@pytest.mark.parametrize(
    ("module", "shape", "sentence"),
    [
        (lambda: nn.LocalAttention(3, 8, 3, 3), (3, 8, 8), r"\(batch, channels, height, width\)"),
        (lambda: nn.NeighborhoodAttention2D(8, 2, 3), (2, 8, 8), r"\(batch, height, width, 8\)"),
        (lambda: nn.NeighborhoodAttention1D(8, 2, 3), (2, 5, 9), r"\(batch, length, 8\)"),
        (lambda: nn.HaloAttn(8), (1, 8, 12, 16), "height 12 must be a multiple of block_size=8: pad the map to 16"),
        (lambda: nn.HaloAttn(8), (1, 8, 16, 17), "width 17 must be a multiple of block_size=8: pad the map to 24"),
        (lambda: nn.BiLevelRoutingAttention(8), (1, 14, 20, 8), "multiples of n_win=7, got 14 x 20"),
        (lambda: nn.BiLevelRoutingAttention(8), (1, 8, 14, 14), r"\(batch, height, width, 8\)"),
        (
            lambda: nn.BiLevelRoutingAttention(8, n_win=2, topk=1, kv_downsample_mode="avgpool"),
            (1, 6, 8, 8),
            "kv_downsample_ratio=4 is larger than a region of 3 x 4",
        ),
        (lambda: nn.nchwBRA(8), (1, 8, 5, 20), "at least n_win=7, got 5 x 20"),
        (lambda: nn.nchwBRA(8, n_win=2, topk=5), (1, 8, 4, 6), "topk=5 is more than the 2 x 2 regions of 2 x 3 pixels"),
    ],
)
def test_input_refused(module, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        module()(torch.zeros(shape))
