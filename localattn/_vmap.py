"""torch.vmap over the operators: the mapped dimension joins the batch."""

from __future__ import annotations

import torch
from torch import Tensor


def mapped_into_batch(operator, info, in_dims, *arguments):
    """The operator on the mapped dimension joined with the batch, which every tensor among its arguments has."""

    def joined(argument, dim):  # (mapped, batch, ...) -> (mapped * batch, ...)
        if not isinstance(argument, Tensor):
            return argument
        moved = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
        return moved.flatten(0, 1)

    results = operator(*(joined(argument, dim) for argument, dim in zip(arguments, in_dims)))
    if isinstance(results, Tensor):
        return results.unflatten(0, (info.batch_size, -1)), 0
    # What is not needed of the backward's results is an empty tensor without a batch.
    split = tuple(r.unflatten(0, (info.batch_size, -1)) if r.dim() > 1 else r for r in results)
    return split, tuple(0 if r.dim() > 1 else None for r in results)


def slice_by_slice(operator, info, in_dims, *arguments):
    def slice_of(argument, dim, i):
        return argument.select(dim, i) if isinstance(argument, Tensor) and dim is not None else argument

    calls = [operator(*map(slice_of, arguments, in_dims, [i] * len(arguments))) for i in range(info.batch_size)]
    return tuple(torch.stack(results) for results in zip(*calls)), (0,) * len(calls[0])


def mapped_unless_given(positions, operator, info, in_dims, *arguments):
    """The arguments at `positions` may lack the batch dimension that would take the mapped one. Where one of them is
    given, each slice is a call of its own."""
    join = mapped_into_batch if all(arguments[i] is None for i in positions) else slice_by_slice
    return join(operator, info, in_dims, *arguments)
