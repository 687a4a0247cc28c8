"""The window options as users write them (an int or a tuple, names), turned into one value per spatial axis."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

IntOrTuple = int | Sequence[int]
Causal = bool | Sequence[bool] | Literal["raster"]

BORDERS = ("mask", "zero", "shift")


class WindowOptions(NamedTuple):
    """What the window rule needs besides the two extents; the tuples hold one value per spatial axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    raster_causal: bool
    border: str


def window_options(
    rank: int, kernel_size: IntOrTuple, stride: IntOrTuple, dilation: IntOrTuple, is_causal: Causal, border: str
) -> WindowOptions:
    """The options of a map with ``rank`` spatial axes. Ranges are checked where the options are used.

    Raises:
        ValueError: a tuple does not have one entry per spatial axis, or a name is unknown.
        TypeError: an entry is not an int (a bool, for ``is_causal``).
    """
    if not isinstance(border, str) or border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(map(repr, BORDERS))}, got {border!r}")
    causal, raster = _causal_per_axis(is_causal, rank)
    return WindowOptions(
        ints_per_axis("kernel_size", kernel_size, rank),
        ints_per_axis("stride", stride, rank),
        ints_per_axis("dilation", dilation, rank),
        causal,
        raster,
        border,
    )


def ints_per_axis(name: str, value: IntOrTuple, rank: int) -> tuple[int, ...]:
    """``value`` as a tuple of ``rank`` ints."""
    if isinstance(value, (tuple, list)):
        values = tuple(value)
        if len(values) != rank:
            raise ValueError(f"{name} must be an int or one int for each of the {rank} spatial axes, got {value!r}")
    else:
        values = (value,) * rank
    try:
        return tuple(operator.index(entry) for entry in values)
    except TypeError:
        raise TypeError(f"{name} must be an int or a tuple of {rank} ints, got {value!r}") from None


def _causal_per_axis(value: Causal, rank: int) -> tuple[tuple[bool, ...], bool]:
    if isinstance(value, str):
        if value != "raster":
            raise ValueError(f"is_causal must be a bool, one bool per spatial axis or 'raster', got {value!r}")
        return (False,) * rank, True
    if isinstance(value, (tuple, list)):
        if len(value) != rank:
            raise ValueError(f"is_causal must be a bool or one bool for each of the {rank} axes, got {value!r}")
        values = tuple(value)
    else:
        values = (value,) * rank
    for entry in values:
        if entry not in (False, True):
            raise TypeError(f"is_causal must be a bool, one bool per spatial axis or 'raster', got {value!r}")
    return tuple(bool(entry) for entry in values), False


def window_keywords(kernel_size, stride, dilation, is_causal, raster_causal: bool, border: str) -> dict:
    """What the native operators take of a window, as keyword arguments of the functions that users call."""
    return {
        "kernel_size": list(kernel_size),
        "stride": list(stride),
        "dilation": list(dilation),
        "is_causal": "raster" if raster_causal else list(is_causal),
        "border": border,
    }
