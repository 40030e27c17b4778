"""Neighbourhood attention on a GPU: the whole operator (`fused.py`) and its two halves (`halves.py`), with their gradients.

No program adds into what another writes; the backward of the whole operator recomputes the weights, so that nothing of the
size of the windows lies in memory. Sums are kept in float32. The six operators are annotated in `eager.py`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention import ops
from visionhybrid.kernels.neighborhood_attention.ops import packed
from visionhybrid.kernels.neighborhood_attention.triton import fused, halves
from visionhybrid.kernels.neighborhood_attention.triton.launch import Call

INTERPRETED = triton.knobs.runtime.interpret
WIDEST = 128


def _number(k_extra: Tensor | None) -> int:
    return 0 if k_extra is None else k_extra.shape[2]


def attention(q, k, v, rpb, k_extra, v_extra, kernel_size, dilation, stride, causal, scale):
    """Output and natural log-sum-exp of the scores (B, heads, *axes) in float32."""
    call = Call(q, rpb, kernel_size, dilation, stride, causal)
    out, lse = packed(v), q.new_empty(q.shape[:-1], dtype=torch.float32)
    widths, number = (q.shape[-1], v.shape[-1]), _number(k_extra)
    constants = call.constants(fused._fwd, *widths, q) | dict(BIAS=rpb is not None, EXTRA=number > 0)
    maps = (q, k, v, out, lse[..., None], k_extra, v_extra)
    tensors = (q, k, v, call.rpb, k_extra, v_extra, out, lse, scale)
    call.run(fused._fwd, tensors, (*widths, number), maps, "QUERIES", constants)
    return out, lse


def attention_backward(
    grad, q, k, v, rpb, k_extra, v_extra, out, lse, rpb_learns, kernel_size, dilation, stride, causal, scale
):  # fmt: skip
    call = Call(q, rpb, kernel_size, dilation, stride, causal)
    dq, dk, dv, delta = packed(q), packed(k), packed(v), torch.empty_like(lse)
    widths = (q.shape[-1], v.shape[-1])

    def constants(kernel: Any) -> dict[str, Any]:
        return call.constants(kernel, *widths, q)

    bias = dict(BIAS=rpb is not None)
    number = _number(k_extra)
    maps = (grad, q, k, v, out, lse[..., None], dq, k_extra, v_extra)
    tensors = (grad, q, k, v, call.rpb, k_extra, v_extra, out, lse, delta, dq, scale)
    flags = bias | dict(EXTRA=number > 0)
    call.run(fused._bwd_q, tensors, (*widths, number), maps, "QUERIES", constants(fused._bwd_q) | flags)
    maps = (grad, q, k, v, lse[..., None], dk, dv)
    tensors = (grad, q, k, v, call.rpb, lse, delta, dk, dv, scale)
    call.run(fused._bwd_kv, tensors, widths, maps, "KEYS", constants(fused._bwd_kv) | bias)
    drpb = q.new_empty(0)
    if rpb_learns:
        drpb = call.table((grad, q, k, v, lse, delta, None), scale, constants(halves._table))
    if k_extra is None:
        return dq, dk, dv, drpb, q.new_empty(0), q.new_empty(0)
    extras = (packed(k_extra), packed(v_extra))
    if number:
        extras = call.extra((grad, q, k_extra, v_extra, lse, delta), scale, constants(fused._bwd_extra))
    return dq, dk, dv, drpb, *extras


def _run_scores(call: Call, a: Tensor, b: Tensor, out: Tensor, scale: float) -> None:
    constants = call.constants(halves._scores, a.shape[-1], a.shape[-1], a, b)
    constants |= dict(BIAS=call.rpb is not None)
    call.run(halves._scores, (a, b, call.rpb, out, scale), (a.shape[-1],), (a, b, out), "QUERIES", constants)


def _run_sum(kernel: Any, call: Call, weights: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """`_gather` or `_scatter`."""
    out, width = packed(x), x.shape[-1]
    constants = call.constants(kernel, width, width, weights, x)
    own = "QUERIES" if kernel is halves._gather else "KEYS"
    call.run(kernel, (weights, x, out, scale), (width,), (weights, x, out), own, constants)
    return out


def _slots(like: Tensor, dtype: torch.dtype, call: Call, empty: float) -> Tensor:
    """(B, heads, *axes, slots) to be written where there are keys; `empty` where there may be none."""
    shape = (*like.shape[:-1], prod(call.kernel))
    if call.whole:
        return like.new_empty(shape, dtype=dtype)
    return like.new_full(shape, empty, dtype=dtype)


def scores(q, k, rpb, kernel_size, dilation, scale):
    call = Call(q, rpb, kernel_size, dilation)
    out = _slots(q, q.dtype, call, float("-inf"))
    _run_scores(call, q, k, out, scale)
    return out


def scores_backward(grad, q, k, rpb, kernel_size, dilation, scale):
    call = Call(q, rpb, kernel_size, dilation)
    dq = _run_sum(halves._gather, call, grad, k, scale)
    dk = _run_sum(halves._scatter, call, grad, q, scale)
    if rpb is None:
        return dq, dk, q.new_empty(0)
    constants = call.constants(halves._table, 1, 1, grad)
    return dq, dk, call.table((None, None, None, None, None, None, grad), 1.0, constants)


def aggregate(weights, v, kernel_size, dilation):
    return _run_sum(halves._gather, Call(v, None, kernel_size, dilation), weights, v)


def aggregate_backward(grad, weights, v, kernel_size, dilation):
    call = Call(v, None, kernel_size, dilation)
    dweights = _slots(v, weights.dtype, call, 0.0)
    _run_scores(call, grad, v, dweights, 1.0)
    return dweights, _run_sum(halves._scatter, call, weights, grad)


OPERATORS = ops.define(
    "_triton", attention, attention_backward, scores, scores_backward, aggregate, aggregate_backward
)
forward, scores, aggregate = OPERATORS


def unsupported(*args: Any) -> str | None:
    """For the arguments of the whole operator or of either half, which begin with q, k (, v) or weights, v."""
    first, *rest = args
    maps = [x for x in rest[:2] if isinstance(x, Tensor) and x.ndim == first.ndim]
    if not (first.is_cuda or INTERPRETED):
        return "needs a GPU, or TRITON_INTERPRET=1"
    if torch.float64 in (first.dtype, maps[0].dtype):
        return "computes in float32"
    if INTERPRETED and torch.bfloat16 in (first.dtype, maps[0].dtype):
        return "Triton's interpreter computes bfloat16 wrongly"
    if (widest := max(x.shape[-1] for x in maps)) > WIDEST:
        return f"head dims end at {WIDEST}, got {widest}"
    return None
