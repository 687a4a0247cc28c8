"""Every published system against results recorded from its own release: forward, gradients, strict state_dict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from localattn import nn
from localattn.compat import image_local_attention, image_local_attention_fork, natten, natten017

CASES = sorted(Path(__file__).with_name("golden").glob("*.npz"))

ORIGINAL, FORK = "zzd1992/Image-Local-Attention", "Sleepychord/Image-Local-Attention"
FUNCTIONS = {
    (ORIGINAL, "f_similar"): image_local_attention.f_similar,
    (ORIGINAL, "f_weighting"): image_local_attention.f_weighting,
    (FORK, "f_similar"): image_local_attention_fork.f_similar,
    (FORK, "f_weighting"): image_local_attention_fork.f_weighting,
    ("NATTEN 0.21.7", "na1d"): natten.na1d,
    ("NATTEN 0.21.7", "na2d"): natten.na2d,
    ("NATTEN 0.21.7", "na3d"): natten.na3d,
    ("NATTEN 0.17.5", "na1d"): natten017.functional.na1d,
    ("NATTEN 0.17.5", "na2d"): natten017.functional.na2d,
    ("NATTEN 0.17.5", "na3d"): natten017.functional.na3d,
}
MODULES = {
    (ORIGINAL, "LocalAttention"): [
        nn.LocalAttention,
        image_local_attention.LocalAttention,
        image_local_attention.TorchLocalAttention,
    ],
    ("NATTEN 0.17.5", "NeighborhoodAttention1D"): [
        natten017.NeighborhoodAttention1D,
        nn.NeighborhoodAttention1D,
        natten.NeighborhoodAttention1D,
    ],
    ("NATTEN 0.17.5", "NeighborhoodAttention2D"): [
        natten017.NeighborhoodAttention2D,
        nn.NeighborhoodAttention2D,
        natten.NeighborhoodAttention2D,
    ],
    ("NATTEN 0.17.5", "NeighborhoodAttention3D"): [
        natten017.NeighborhoodAttention3D,
        nn.NeighborhoodAttention3D,
        natten.NeighborhoodAttention3D,
    ],
    (FORK, "LocalAttention"): [image_local_attention_fork.LocalAttention],
    ("timm 1.0.31", "HaloAttn"): [nn.HaloAttn],
    ("rayleizhu/BiFormer", "BiLevelRoutingAttention"): [nn.BiLevelRoutingAttention],
    ("rayleizhu/BiFormer", "nchwBRA"): [nn.nchwBRA],
    ("rayleizhu/BiFormer", "Block"): [nn.Block],
    ("cmsflash/efficient-attention", "EfficientAttention"): [nn.EfficientAttention],
}


class Case:
    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.meta = json.loads(str(arrays["meta"]))
            self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}
        self.key = (self.meta["system"], self.meta["callable"])
        self.kwargs = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.meta["kwargs"].items()
        }

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

    @property
    def output(self) -> torch.Tensor:
        return self.arrays["output.out"]

    @property
    def tolerance(self) -> float:
        return 1e-10 if self.output.dtype == torch.float64 else 1e-5


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert got.dtype == expected.dtype, name
    size = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * size, msg=lambda text: f"{name}: {text}")


def case_id(path: Path) -> str:
    return path.stem


def test_every_case_is_known():
    assert len(CASES) >= 49
    for path in CASES:
        assert (Case(path).key in FUNCTIONS) != (Case(path).key in MODULES), path.name


@pytest.mark.parametrize("path", [path for path in CASES if Case(path).key in FUNCTIONS], ids=case_id)
def test_function(path):
    case = Case(path)
    inputs = {name: tensor.requires_grad_() for name, tensor in case.group("input.").items()}
    function = FUNCTIONS[case.key]
    heads_first = case.meta.get("layout") == "B,heads,*spatial,D"
    if "x_ori" in inputs:
        second = "x_loc" if "x_loc" in inputs else "x_weight"
        output = function(inputs["x_ori"], inputs[second], *case.kwargs.values())
    elif heads_first:
        moved = (inputs[name].movedim(1, -2) for name in "qkv")
        output = function(*moved, rpb=inputs.get("rpb"), **case.kwargs).movedim(-2, 1)
    else:
        output = function(inputs["q"], inputs["k"], inputs["v"], **case.kwargs)
    assert_close("output", output, case.output, case.tolerance)
    check_gradients(case, output, inputs)


@pytest.mark.parametrize("path", [path for path in CASES if path.stem.startswith("natten.na")], ids=case_id)
def test_unfused_function(path):
    case = Case(path)
    inputs = {name: tensor.requires_grad_() for name, tensor in case.group("input.").items()}
    similarity = getattr(natten017.functional, case.key[1] + "_qk")
    weighting = getattr(natten017.functional, case.key[1] + "_av")
    window = {name: case.kwargs[name] for name in ("kernel_size", "dilation", "is_causal")}
    scores = similarity(inputs["q"] * case.kwargs["scale"], inputs["k"], rpb=inputs.get("rpb"), **window)
    output = weighting(scores.softmax(-1), inputs["v"], **window)
    assert_close("output", output, case.output, case.tolerance)
    check_gradients(case, output, inputs)


@pytest.mark.parametrize(
    ("path", "make"),
    [(path, make) for path in CASES for make in MODULES.get(Case(path).key, [])],
    ids=lambda value: value.stem if isinstance(value, Path) else f"{value.__module__}.{value.__name__}",
)
def test_module(path, make):
    case = Case(path)
    module = make(**case.kwargs).to(case.output.dtype)
    parameters = case.group("param.")
    assert {name: p.shape for name, p in module.state_dict().items()} == {n: p.shape for n, p in parameters.items()}
    module.load_state_dict(parameters, strict=True)

    x = case.arrays["input.x"].requires_grad_()
    output = module(x)
    assert_close("output", output, case.output, case.tolerance)
    check_gradients(case, output, {"x": x}, dict(module.named_parameters()))
    if "output.r_idx" in case.arrays:
        with_routing, weight, index, attention = module(x, ret_attn_mask=True)
        assert_close("output", with_routing, case.output, case.tolerance)
        assert_close("r_weight", weight, case.arrays["output.r_weight"], case.tolerance)
        assert torch.equal(index, case.arrays["output.r_idx"])
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def check_gradients(case: Case, output, inputs, parameters=None) -> None:
    if "grad_output.out" not in case.arrays:
        return
    output.backward(case.arrays["grad_output.out"])
    for prefix, tensors in (("grad_input.", inputs), ("grad_param.", parameters or {})):
        expected = case.group(prefix)
        assert expected.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert_close(f"gradient of {name}", tensor.grad, expected[name], case.tolerance)
