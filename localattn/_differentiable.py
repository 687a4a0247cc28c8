"""Operators that differentiate wherever torch differentiates. What torch.library registers takes part in reverse mode,
eager and compiled; torch.func's transforms refuse it, and forward mode passes it by without a word. There an
autograd.Function of the same formulas takes the operator's place, or the readable definition."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def differentiable(
    operator, setup_context: Callable, backward: Callable, definition: Callable, mapped: Callable
) -> Callable:
    """Registers the derivatives of a native operator and returns it as a function that has them all.

    ``setup_context(ctx, inputs, output)`` and ``backward(ctx, *grad_outputs)`` are as autograd has them.
    ``definition(*inputs)`` computes the same with torch's own operators, whose memory grows with the window.
    ``mapped(operator, info, in_dims, *inputs)`` is the operator under vmap.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return operator(*inputs)

        @staticmethod
        def vmap(info, in_dims, *inputs):
            return mapped(differentiated, info, in_dims, *inputs)

    Differentiable.setup_context = staticmethod(setup_context)
    Differentiable.backward = staticmethod(backward)

    def differentiated(*inputs):
        transforms = _active_transforms()
        # autograd.Function has forward mode too, but torch loses the tangents of its tangents.
        if _functorch.TransformType.Jvp in transforms or any_tangent(inputs):
            return definition(*inputs)
        if not transforms:
            return operator(*inputs)
        if not torch.compiler.is_compiling():
            return Differentiable.apply(*inputs)
        return (definition if _functorch.TransformType.Grad in transforms else operator)(*inputs)

    name = operator._qualified_op_name
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    if hasattr(torch.library, "register_vmap"):  # from torch 2.5 on
        torch.library.register_vmap(name, functools.partial(mapped, differentiated))
    return differentiated


def _active_transforms() -> list:
    return [transform.key() for transform in _functorch.get_interpreter_stack() or ()]


# While torch.compile traces, the transforms that are active are those of the traced code, which it can thus take for a
# constant: what torch.compiler.assume_constant_result says, which would import all of the compiler.
_active_transforms._dynamo_marked_constant = True


def any_tangent(inputs) -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs)
