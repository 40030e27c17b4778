"""Neighbourhood attention and its halves as PyTorch operators: registration that the backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import widened


class Operators(NamedTuple):
    attention: Any
    scores: Any
    aggregate: Any


def packed(x: Tensor) -> Tensor:
    """Empty, of `x`'s shape and type, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def define(
    suffix: str,
    attention: Callable[..., Any],
    attention_backward: Callable[..., Any],
    scores: Callable[..., Any],
    scores_backward: Callable[..., Any],
    aggregate: Callable[..., Any],
    aggregate_backward: Callable[..., Any],
) -> Operators:
    """Registers the six functions of a backend; their signatures are those of `eager.py`."""
    operators = Operators(
        _attention(f"neighborhood_attention{suffix}", attention, attention_backward),
        _scores(f"neighborhood_scores{suffix}", scores, scores_backward),
        _aggregate(f"neighborhood_aggregate{suffix}", aggregate, aggregate_backward),
    )
    _count(suffix)
    return operators


def _attention(name: str, body: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    op = register(name, body, "neighborhood_attention")
    backward_op = register(f"{name}_backward", backward, "neighborhood_attention_backward")

    @op.register_fake
    def _(q, k, v, rpb, k_extra, v_extra, kernel_size, dilation, stride, causal, scale):
        return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=widened(q))

    @backward_op.register_fake
    def _(
        grad, q, k, v, rpb, k_extra, v_extra, out, lse, rpb_learns, kernel_size, dilation, stride, causal, scale
    ):  # fmt: skip
        learns = (q, k, v, rpb if rpb_learns else None, k_extra, v_extra)
        return tuple(q.new_empty(0) if x is None else packed(x) for x in learns)

    def save(ctx, inputs, output):
        *tensors, ctx.kernel_size, ctx.dilation, ctx.stride, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx, grad, _):
        *tensors, out, lse = ctx.saved_tensors
        rpb_learns = tensors[3] is not None and ctx.needs_input_grad[3]
        options = (ctx.kernel_size, ctx.dilation, ctx.stride, ctx.causal, ctx.scale)
        grads = backward_op(grad.contiguous(), *tensors, out, lse, rpb_learns, *options)
        learns = [x is not None for x in tensors]
        learns[3] = rpb_learns
        return *(x if ok else None for x, ok in zip(grads, learns, strict=True)), *[None] * 5

    op.register_autograd(gradient, setup_context=save)
    end_of_derivatives(backward_op, "neighborhood_attention")
    return op


def _scores(name: str, body: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    op = register(name, body, "neighborhood_scores")
    backward_op = register(f"{name}_backward", backward, "neighborhood_scores_backward")

    @op.register_fake
    def _(q, k, rpb, kernel_size, dilation, scale):
        return q.new_empty(*q.shape[:-1], prod(kernel_size))

    @backward_op.register_fake
    def _(grad, q, k, rpb, kernel_size, dilation, scale):
        return packed(q), packed(k), q.new_empty(0) if rpb is None else packed(rpb)

    def save(ctx, inputs, output):
        q, k, rpb, *ctx.options = inputs
        ctx.save_for_backward(q, k, rpb)

    def gradient(ctx, grad):
        q, k, rpb = ctx.saved_tensors
        dq, dk, drpb = backward_op(grad.contiguous(), q, k, rpb, *ctx.options)
        return dq, dk, None if rpb is None else drpb, None, None, None

    op.register_autograd(gradient, setup_context=save)
    end_of_derivatives(backward_op, "neighborhood_scores")
    return op


def _aggregate(name: str, body: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    op = register(name, body, "neighborhood_aggregate")
    backward_op = register(f"{name}_backward", backward, "neighborhood_aggregate_backward")

    @op.register_fake
    def _(weights, v, kernel_size, dilation):
        return packed(v)

    @backward_op.register_fake
    def _(grad, weights, v, kernel_size, dilation):
        return packed(weights), packed(v)

    def save(ctx, inputs, output):
        weights, v, *ctx.options = inputs
        ctx.save_for_backward(weights, v)

    def gradient(ctx, grad):
        return *backward_op(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None

    op.register_autograd(gradient, setup_context=save)
    end_of_derivatives(backward_op, "neighborhood_aggregate")
    return op


def _count(suffix: str) -> None:
    """Tells torch's FlopCounterMode what the six operators of a backend do: products of matrices, twice for gradients."""

    @count_operations(f"neighborhood_attention{suffix}")
    def _(q, k, v, rpb, k_extra, v_extra, kernel_size, dilation, *args, **kwargs):
        return 2 * pairs(q, kernel_size, dilation, k_extra) * (q[-1] + v[-1])

    @count_operations(f"neighborhood_attention{suffix}_backward")
    def _(grad, q, k, v, rpb, k_extra, v_extra, out, lse, rpb_learns, kernel_size, dilation, *args, **kwargs):
        return 2 * pairs(q, kernel_size, dilation, k_extra) * (3 * q[-1] + 2 * v[-1])

    @count_operations(f"neighborhood_scores{suffix}")
    def _(q, k, rpb, kernel_size, dilation, *args, **kwargs):
        return 2 * pairs(q, kernel_size, dilation) * q[-1]

    @count_operations(f"neighborhood_scores{suffix}_backward")
    def _(grad, q, k, rpb, kernel_size, dilation, *args, **kwargs):
        return 4 * pairs(q, kernel_size, dilation) * q[-1]

    @count_operations(f"neighborhood_aggregate{suffix}")
    def _(weights, v, kernel_size, dilation, *args, **kwargs):
        return 2 * pairs(v, kernel_size, dilation) * v[-1]

    @count_operations(f"neighborhood_aggregate{suffix}_backward")
    def _(grad, weights, v, kernel_size, dilation, *args, **kwargs):
        return 4 * pairs(v, kernel_size, dilation) * v[-1]


def pairs(
    q: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int], extra: Sequence[int] | None = None
) -> int:
    """Pairs of a query and a key of q (B, heads, *sides, D): a window holds as many keys as the map has for it."""
    sides = q[2 : 2 + len(kernel_size)]
    window = prod(min(k, -(-side // d)) for k, side, d in zip(kernel_size, sides, dilation, strict=True))
    return prod(q[:-1]) * (window + (extra[2] if extra else 0))
