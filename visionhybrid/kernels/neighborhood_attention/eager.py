"""The CPU path as PyTorch operators: one node for compile and export, with hand-written gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention import tiled
from visionhybrid.kernels.neighborhood_attention.geometry import axes_of
from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import widened


def unsupported(*args: object) -> str | None:
    return None


@partial(register, "neighborhood_attention")
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    k_extra: Tensor | None,
    v_extra: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    axes = axes_of(q.shape[2:-1], kernel_size, dilation, stride, causal)
    return tiled.forward(q, k, v, rpb, k_extra, v_extra, axes, scale)


@attention_op.register_fake
def _(q, k, v, rpb, k_extra, v_extra, kernel_size, dilation, stride, causal, scale):
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=widened(q))


@partial(register, "neighborhood_attention_backward")
def attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    k_extra: Tensor | None,
    v_extra: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rpb_learns: bool,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    causal: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    axes = axes_of(q.shape[2:-1], kernel_size, dilation, stride, causal)
    grads = tiled.backward(grad, q, k, v, rpb, k_extra, v_extra, out, lse, rpb_learns, axes, scale)
    return tuple(q.new_empty(0) if x is None else x for x in grads)


@attention_backward_op.register_fake
def _(
    grad, q, k, v, rpb, k_extra, v_extra, out, lse, rpb_learns, kernel_size, dilation, stride, causal, scale
):
    learns = (q, k, v, rpb if rpb_learns else None, k_extra, v_extra)
    return tuple(
        q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in learns
    )


def _save_attention(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.stride, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradient(ctx, grad, _):
    *tensors, out, lse = ctx.saved_tensors
    rpb_learns = tensors[3] is not None and ctx.needs_input_grad[3]
    options = (ctx.kernel_size, ctx.dilation, ctx.stride, ctx.causal, ctx.scale)
    grads = attention_backward_op(grad.contiguous(), *tensors, out, lse, rpb_learns, *options)
    learns = [x is not None for x in tensors]
    learns[3] = rpb_learns
    return *(x if ok else None for x, ok in zip(grads, learns, strict=True)), *[None] * 5


attention_op.register_autograd(_attention_gradient, setup_context=_save_attention)


@partial(register, "neighborhood_scores")
def scores_op(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    return tiled.scores(q, k, rpb, axes_of(q.shape[2:-1], kernel_size, dilation), scale)


@scores_op.register_fake
def _(q, k, rpb, kernel_size, dilation, scale):
    return q.new_empty(*q.shape[:-1], prod(kernel_size))


@partial(register, "neighborhood_scores_backward")
def scores_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, drpb = tiled.scores_backward(
        grad, q, k, rpb, axes_of(q.shape[2:-1], kernel_size, dilation), scale
    )
    return dq, dk, q.new_empty(0) if drpb is None else drpb


@scores_backward_op.register_fake
def _(grad, q, k, rpb, kernel_size, dilation, scale):
    drpb = q.new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)), drpb


def _save_scores(ctx, inputs, output):
    q, k, rpb, *ctx.options = inputs
    ctx.save_for_backward(q, k, rpb)


def _scores_gradient(ctx, grad):
    q, k, rpb = ctx.saved_tensors
    dq, dk, drpb = scores_backward_op(grad.contiguous(), q, k, rpb, *ctx.options)
    return dq, dk, None if rpb is None else drpb, None, None, None


scores_op.register_autograd(_scores_gradient, setup_context=_save_scores)


@partial(register, "neighborhood_aggregate")
def aggregate_op(weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    return tiled.aggregate(weights, v, axes_of(v.shape[2:-1], kernel_size, dilation))


@aggregate_op.register_fake
def _(weights, v, kernel_size, dilation):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@partial(register, "neighborhood_aggregate_backward")
def aggregate_backward_op(
    grad: Tensor, weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return tiled.aggregate_backward(grad, weights, v, axes_of(v.shape[2:-1], kernel_size, dilation))


@aggregate_backward_op.register_fake
def _(grad, weights, v, kernel_size, dilation):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (weights, v))


def _save_aggregate(ctx, inputs, output):
    weights, v, *ctx.options = inputs
    ctx.save_for_backward(weights, v)


def _aggregate_gradient(ctx, grad):
    return *aggregate_backward_op(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None


aggregate_op.register_autograd(_aggregate_gradient, setup_context=_save_aggregate)

for backward_op, name in (
    (attention_backward_op, "neighborhood_attention"),
    (scores_backward_op, "neighborhood_scores"),
    (aggregate_backward_op, "neighborhood_aggregate"),
):
    end_of_derivatives(backward_op, name)


def _pairs(q: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int], extra: int = 0) -> int:
    """Pairs of a query and a key: a window holds as many keys as the map has for it."""
    sides = q[2 : 2 + len(kernel_size)]
    window = prod(min(k, -(-side // d)) for k, side, d in zip(kernel_size, sides, dilation, strict=True))
    return prod(q[: 2 + len(kernel_size)]) * (window + extra)


@count_operations("neighborhood_attention")
def _(q, k, v, rpb, k_extra, v_extra, kernel_size, dilation, *args, **kwargs):
    return 2 * _pairs(q, kernel_size, dilation, k_extra[2] if k_extra else 0) * (q[-1] + v[-1])


@count_operations("neighborhood_attention_backward")
def _(grad, q, k, v, rpb, k_extra, v_extra, out, lse, rpb_learns, kernel_size, dilation, *args, **kwargs):
    return 2 * _pairs(q, kernel_size, dilation, k_extra[2] if k_extra else 0) * (3 * q[-1] + 2 * v[-1])


@count_operations("neighborhood_scores")
def _(q, k, rpb, kernel_size, dilation, *args, **kwargs):
    return 2 * _pairs(q, kernel_size, dilation) * q[-1]


@count_operations("neighborhood_scores_backward")
def _(grad, q, k, rpb, kernel_size, dilation, *args, **kwargs):
    return 4 * _pairs(q, kernel_size, dilation) * q[-1]


@count_operations("neighborhood_aggregate")
def _(weights, v, kernel_size, dilation, *args, **kwargs):
    return 2 * _pairs(v, kernel_size, dilation) * v[-1]


@count_operations("neighborhood_aggregate_backward")
def _(grad, weights, v, kernel_size, dilation, *args, **kwargs):
    return 4 * _pairs(v, kernel_size, dilation) * v[-1]


forward, scores, aggregate = attention_op, scores_op, aggregate_op
