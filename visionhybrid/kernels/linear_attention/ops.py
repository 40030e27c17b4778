"""Linear attention as two PyTorch operators, and what joins them.

`state` sums keys and values into (B, heads, D, E + 1): S = sum_j phi(k_j)^T v_j and, as the last column,
z = sum_j phi(k_j). `apply` reads the state with the queries. All that must cross ranks or be averaged lies between the
two and is as small as a head, so averaging and the all-reduce are ordinary PyTorch and differentiate themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import widened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Operators(NamedTuple):
    """The operators of one backend, and their gradients, which are operators too.

    state(k, v, k_rotated | None, keep | None, feature_map) -> float32 (B, heads, D, E + 1)
    apply(q, state, q_rotated | None, feature_map, normalise, eps) -> (B, heads, N, E) in the dtype of q
    """

    state: Any
    apply: Any
    state_backward: Any
    apply_backward: Any


def like(x: Tensor, dim: int) -> Tensor:
    """Empty (B, heads, N, dim) of `x`'s type; tokens outside heads in memory if that is how `x` lies."""
    B, heads, N, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, N, heads, dim).transpose(1, 2)
    return x.new_empty(B, heads, N, dim)


def like_or_empty(x: Tensor | None, beside: Tensor) -> Tensor:
    """`like(x)`; without `x` a tensor of no elements, for an operator cannot return None."""
    return beside.new_empty(0) if x is None else like(x, x.shape[-1])


def define(
    backend: str, state: Callable, state_backward: Callable, apply: Callable, apply_backward: Callable
) -> Operators:
    """Registers the four functions of a backend; their signatures are those of `eager.py`."""
    prefix = f"linear_attention_{backend}"
    state_op = register(f"{prefix}_state", state)
    state_backward_op = register(f"{prefix}_state_backward", state_backward)
    apply_op = register(f"{prefix}_apply", apply)
    apply_backward_op = register(f"{prefix}_apply_backward", apply_backward)

    @state_op.register_fake
    def _(k, v, k_rotated, keep, feature_map):
        return k.new_empty(*k.shape[:2], k.shape[3], v.shape[3] + 1, dtype=widened(k))

    @state_backward_op.register_fake
    def _(grad, k, v, k_rotated, keep, feature_map):
        return like(k, k.shape[3]), like(v, v.shape[3]), like_or_empty(k_rotated, k)

    @apply_op.register_fake
    def _(q, state, q_rotated, feature_map, normalise, eps):
        return like(q, state.shape[3] - 1)

    @apply_backward_op.register_fake
    def _(grad, q, state, q_rotated, feature_map, normalise, eps):
        return like(q, q.shape[3]), torch.empty_like(state), like_or_empty(q_rotated, q)

    def save_state(ctx, inputs, output):
        *tensors, ctx.feature_map = inputs
        ctx.save_for_backward(*tensors)

    def state_gradient(ctx, grad):
        k, v, k_rotated, keep = ctx.saved_tensors
        dk, dv, dk_rotated = state_backward_op(grad, k, v, k_rotated, keep, ctx.feature_map)
        return dk, dv, None if k_rotated is None else dk_rotated, None, None

    def save_apply(ctx, inputs, output):
        q, state, q_rotated, *ctx.options = inputs
        ctx.save_for_backward(q, state, q_rotated)

    def apply_gradient(ctx, grad):
        q, state, q_rotated = ctx.saved_tensors
        dq, dstate, dq_rotated = apply_backward_op(grad, q, state, q_rotated, *ctx.options)
        return dq, dstate, None if q_rotated is None else dq_rotated, None, None, None

    state_op.register_autograd(state_gradient, setup_context=save_state)
    apply_op.register_autograd(apply_gradient, setup_context=save_apply)
    for op in (state_backward_op, apply_backward_op):
        end_of_derivatives(op, "linear_attention")
    _count(prefix)
    return Operators(state_op, apply_op, state_backward_op, apply_backward_op)


def _count(prefix: str) -> None:
    """Tells torch's FlopCounterMode what the four operators of a backend do: their matrix products."""

    @count_operations(f"{prefix}_state")
    def _(k, v, *args, **kwargs):
        return 2 * prod(k) * v[3]

    @count_operations(f"{prefix}_state_backward")
    def _(grad, k, v, *args, **kwargs):
        return 4 * prod(k) * v[3]

    @count_operations(f"{prefix}_apply")
    def _(q, state, q_rotated, feature_map, normalise, *args, **kwargs):
        return 2 * prod(q) * (state[3] if normalise else state[3] - 1)

    @count_operations(f"{prefix}_apply_backward")
    def _(grad, q, state, *args, **kwargs):
        return 4 * prod(q) * state[3]


def compose(
    operators: Operators,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rotated: Tensor | None,
    k_rotated: Tensor | None,
    key_mask: Tensor | None,
    feature_map: str,
    norm: str,
    eps: float,
    scale: float,
    group: ProcessGroup | None,
) -> Tensor:
    """The whole of linear attention; `norm` is "mean", "sum" or "none"."""
    state = operators.state(k, v, k_rotated, key_mask, feature_map)
    count = state.new_full((len(k),), k.shape[2]) if key_mask is None else key_mask.sum(1).to(state.dtype)
    if group is not None:
        total = AllReduce.apply(torch.cat([state.flatten(), count]), group)
        state, count = total[: state.numel()].view_as(state), total[state.numel() :]
    if norm == "mean":
        # Divided after the sums: 1 / M times a value underflows in half precision. A row without keys: 0, not 0 / 0.
        state = state / count.clamp(min=1).view(-1, 1, 1, 1)
    if scale != 1:
        # S only: the normaliser stays.
        state = torch.cat([state[..., :-1] * scale, state[..., -1:]], -1)
    return operators.apply(q, state, q_rotated, feature_map, norm != "none", eps)


class AllReduce(torch.autograd.Function):
    """The sum over ranks; so is its gradient, since every rank's result depends on every rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return AllReduce.total(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AllReduce.total(grad, ctx.group), None

    @staticmethod
    def total(x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x
