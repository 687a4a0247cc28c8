"""What is measured: shapes, and the work that a shape is."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Self-attention of a square image: one batch item, windows of kernel x kernel, border "mask"."""

    heads: int
    channels: int
    side: int
    kernel: int

    def __str__(self) -> str:
        return f"{self.heads} x {self.channels}, {self.side}², k={self.kernel}"

    @property
    def pairs(self) -> int:
        """Query-key pairs inside the map."""
        reach = self.kernel // 2
        per_axis = sum(min(i + reach, self.side - 1) - max(i - reach, 0) + 1 for i in range(self.side))
        return self.heads * per_axis**2

    def flop(self, backward: bool) -> int:
        """Useful operations of the forward pass, or of forward and backward: two and five products of pairs."""
        return self.pairs * self.channels * (14 if backward else 4)

    @property
    def elements(self) -> int:
        """Of query, of key, of value and of output."""
        return self.side**2 * self.heads * self.channels


# The published comparison of image local attention: H = W = 128, 64 channels.
SEEDS = [Shape(1, 64, 128, kernel) for kernel in (5, 11, 21)]

SHAPES = [
    Shape(1, 64, 128, 5),
    Shape(1, 64, 128, 7),
    Shape(1, 64, 128, 11),
    Shape(1, 64, 128, 21),
    Shape(4, 32, 64, 7),
    Shape(4, 32, 64, 13),
    Shape(8, 32, 128, 7),
    Shape(4, 32, 512, 7),
    Shape(1, 64, 512, 21),
]
KERNEL_SWEEP = [Shape(1, 64, 128, kernel) for kernel in (3, 5, 7, 9, 11, 13, 17, 21)]
SIDE_SWEEP = [Shape(4, 32, side, 7) for side in (32, 64, 128, 256, 512)]

QUICK_SHAPES = [Shape(1, 64, 128, 5), Shape(4, 32, 64, 7)]
QUICK_SWEEP = [Shape(1, 64, 128, 11), Shape(4, 32, 32, 7), Shape(4, 32, 128, 7)]
