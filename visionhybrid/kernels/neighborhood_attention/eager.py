"""The CPU path as PyTorch operators: one node for compile and export, with hand-written gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visionhybrid.kernels.neighborhood_attention import ops, tiled
from visionhybrid.kernels.neighborhood_attention.geometry import axes_of


def unsupported(*args: object) -> str | None:
    return None


def _attention(
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


def _attention_backward(
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
    dq, dk, dv, drpb, dk_extra, dv_extra = (q.new_empty(0) if x is None else x for x in grads)
    return dq, dk, dv, drpb, dk_extra, dv_extra


def _scores(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    return tiled.scores(q, k, rpb, axes_of(q.shape[2:-1], kernel_size, dilation), scale)


def _scores_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    axes = axes_of(q.shape[2:-1], kernel_size, dilation)
    dq, dk, drpb = tiled.scores_backward(grad, q, k, rpb, axes, scale)
    return dq, dk, q.new_empty(0) if drpb is None else drpb


def _aggregate(weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    return tiled.aggregate(weights, v, axes_of(v.shape[2:-1], kernel_size, dilation))


def _aggregate_backward(
    grad: Tensor, weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return tiled.aggregate_backward(grad, weights, v, axes_of(v.shape[2:-1], kernel_size, dilation))


OPERATORS = ops.define(
    "", _attention, _attention_backward, _scores, _scores_backward, _aggregate, _aggregate_backward
)
forward, scores, aggregate = OPERATORS
