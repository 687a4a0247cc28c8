"""Layers that map each pixel by one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with a kernel of one pixel, computed by :func:`pointwise`."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__(in_channels, out_channels, 1, stride=stride, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias, self.stride[0])


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """``F.conv2d`` of ``x (B, C, H, W)`` with ``weight (out, C, 1, 1)`` as a matrix product of weight and map: on a CPU
    up to three times as fast, as nothing is brought into another layout."""
    if x.device.type != "cpu" or x.dim() != 4 or x.shape[1] != weight.shape[1]:  # what does not fit, it refuses
        return F.conv2d(x, weight, bias, stride)
    if stride != 1:
        x = x[:, :, ::stride, ::stride]
    matrix, pixels = weight.flatten(1).expand(x.shape[0], -1, -1), x.flatten(2)
    product = torch.bmm(matrix, pixels) if bias is None else torch.baddbmm(bias[:, None], matrix, pixels)
    return product.unflatten(2, x.shape[2:])


def only_multiplies(layer: nn.Module) -> bool:
    """Whether all that ``layer`` does is to multiply by its weight and add its bias, so that both may be used in its
    place."""
    return is_unchanged(layer, nn.Linear, PointwiseConv2d)


def is_unchanged(layer: nn.Module, *types: type[nn.Module]) -> bool:
    """Whether ``layer`` is of exactly one of these types that this package makes, not wrapped, and without hooks."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) in types and not any(hooks)


def project_in_parts(
    layer: nn.Module, x: Tensor, cut: Callable[[Tensor, int], Sequence[Tensor]], dim: int
) -> Sequence[Tensor]:
    """``cut(layer(x), dim)``, by one product for each part, so that the gradients of the parts need not be joined."""
    if not only_multiplies(layer):
        return cut(layer(x), dim)
    product = F.linear if isinstance(layer, nn.Linear) else pointwise
    weights = cut(layer.weight, 0)
    biases = [None] * len(weights) if layer.bias is None else cut(layer.bias, 0)
    return [product(x, weight, bias) for weight, bias in zip(weights, biases)]
