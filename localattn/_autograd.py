"""Derivatives of the operators. The first is a fused kernel; higher ones differentiate the readable definition, and
take its memory: in proportion to the window, for every query."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _autocast, reference
from ._arguments import window_keywords
from ._differentiable import differentiable
from ._vmap import mapped_unless_given

# Positions in the schemas.
FORWARD_DIFFERENTIABLE = (0, 1, 2, 10, 11, 12, 13, 14)  # query, key, value and the five biases
BACKWARD_DIFFERENTIABLE = (0, 1, 2, 3, 4, 14, 15, 16, 17, 18)  # grad_output, grad_lse, and the same
FORWARD_KEY_MASK, BACKWARD_KEY_MASK = 15, 19


def _save_forward(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.options = inputs[3:10]
    ctx.save_for_backward(*(inputs[i] for i in FORWARD_DIFFERENTIABLE), inputs[FORWARD_KEY_MASK], *output)


def _backward(ctx, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, *biases, key_mask, output, lse = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needs_gradient = [ctx.needs_input_grad[i] for i in FORWARD_DIFFERENTIABLE]
    gradients = attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, *ctx.options, *biases, key_mask, needs_gradient
    )
    results: list[Tensor | None] = [None] * (FORWARD_KEY_MASK + 1)
    for position, needed, gradient in zip(FORWARD_DIFFERENTIABLE, needs_gradient, gradients):
        if needed:
            results[position] = gradient
    return tuple(results)


def _save_backward(ctx, inputs, output) -> None:
    ctx.options = inputs[7:14]
    ctx.needs_gradient = inputs[20]
    ctx.save_for_backward(*(inputs[i] for i in BACKWARD_DIFFERENTIABLE), inputs[BACKWARD_KEY_MASK])


def _second_backward(ctx, *grad_gradients: Tensor) -> tuple[Tensor | None, ...]:
    """The backward of the backward. The operator's arguments output and lse are functions of the others, so what they
    contribute is in the others' gradients, and they have none of their own."""
    *saved, key_mask = ctx.saved_tensors
    present = [i for i, tensor in enumerate(saved) if tensor is not None]
    first_backward = functools.partial(_first_backward, ctx.options, key_mask, ctx.needs_gradient, present)
    with _autocast.switched_off(saved[0].device):
        gradients, pullback = torch.func.vjp(first_backward, *(saved[i] for i in present))
        wanted = [g for g, needed in zip(grad_gradients, ctx.needs_gradient) if needed]
        second = pullback(tuple(g for g, _ in zip(wanted, gradients)))
    results: list[Tensor | None] = [None] * (BACKWARD_KEY_MASK + 2)
    for i, gradient in zip(present, second):
        if ctx.needs_input_grad[BACKWARD_DIFFERENTIABLE[i]]:
            results[BACKWARD_DIFFERENTIABLE[i]] = gradient
    return tuple(results)


def _first_backward(options, key_mask, needs_gradient, present, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What the fused backward computes, as a function of the tensors that are `present`."""
    arguments: list[Tensor | None] = [None] * len(BACKWARD_DIFFERENTIABLE)
    for i, tensor in zip(present, tensors):
        arguments[i] = tensor
    grad_output, grad_lse, *inputs = arguments
    needed = [i for i, tensor in enumerate(inputs) if needs_gradient[i] and tensor is not None]

    def forward(*differentiated: Tensor) -> tuple[Tensor, Tensor]:
        all_inputs = list(inputs)
        for i, tensor in zip(needed, differentiated):
            all_inputs[i] = tensor
        return _forward(options, key_mask, *all_inputs)

    (_, lse), pullback = torch.func.vjp(forward, *(inputs[i] for i in needed))
    return pullback((grad_output, torch.zeros_like(lse) if grad_lse is None else grad_lse))


def _forward(options, key_mask, query, key, value, bias, rel_pos_bias, *axis_biases) -> tuple[Tensor, Tensor]:
    *window, scale = options
    return reference.local_attention(
        query, key, value, **window_keywords(*window), scale=scale, bias=bias, rel_pos_bias=rel_pos_bias,
        axis_bias=axis_biases[: len(window[0])], key_mask=key_mask, enable_gqa=True, return_lse=True,
    )  # fmt: skip


def _definition(query, key, value, *more) -> tuple[Tensor, Tensor]:
    *biases, key_mask = more[7:]
    return _forward(more[:7], key_mask, query, key, value, *biases)


def _backward_definition(*inputs) -> tuple[Tensor, ...]:
    tensors = [inputs[i] for i in BACKWARD_DIFFERENTIABLE]
    needs_gradient = inputs[20]
    gradients = iter(
        _first_backward(inputs[7:14], inputs[BACKWARD_KEY_MASK], needs_gradient, range(len(tensors)), *tensors)
    )
    return tuple(next(gradients) if needed else tensors[0].new_zeros(0) for needed in needs_gradient)


attention = differentiable(
    torch.ops.localattn.attention, _save_forward, _backward, _definition,
    functools.partial(mapped_unless_given, FORWARD_DIFFERENTIABLE[3:]),
)  # fmt: skip
attention_backward = differentiable(
    torch.ops.localattn.attention_backward, _save_backward, _second_backward, _backward_definition,
    functools.partial(mapped_unless_given, BACKWARD_DIFFERENTIABLE[5:]),
)  # fmt: skip
