"""torch.autocast, which knows no meta tensors, on whichever device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def switched_off(device: torch.device) -> AbstractContextManager:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As autocast has operands of one operation; the first tensor says on which device."""
    device = tensors[0].device
    if not is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
