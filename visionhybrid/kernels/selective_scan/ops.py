"""The selective scan as a PyTorch operator: registration shared by the backends."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import widened


class Operators(NamedTuple):
    scan: Any
    scan_backward: Any


def result(u: Tensor, A: Tensor, C: Tensor | None) -> Tensor:
    """Empty: states (batch, channels, N, L) without C, y (batch, channels, L) with it."""
    if C is None:
        return u.new_empty(*u.shape[:2], A.shape[1], u.shape[2], dtype=widened(u))
    return u.new_empty(u.shape)


def define(backend: str, scan: Callable, scan_backward: Callable) -> Operators:
    """Registers the two functions of a backend; their signatures are those of `eager.py`."""
    scan_op = register(f"selective_scan_{backend}", scan, "selective_scan")
    backward_op = register(f"selective_scan_{backend}_backward", scan_backward, "selective_scan_backward")

    @scan_op.register_fake
    def _(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
        return result(u, A, C)

    @backward_op.register_fake
    def _(grad, u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
        return tuple(
            u.new_empty(0, dtype=widened(u)) if x is None else x.new_empty(x.shape)
            for x in (u, delta, A, B, C, D, delta_bias)
        )

    def save(ctx, inputs, output):
        *tensors, ctx.delta_softplus, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    def gradient(ctx, grad):
        tensors = ctx.saved_tensors
        grads = backward_op(grad, *tensors, ctx.delta_softplus, ctx.reverse)
        return *(None if x is None else g for x, g in zip(tensors, grads, strict=True)), None, None

    scan_op.register_autograd(gradient, setup_context=save)
    end_of_derivatives(backward_op, "selective_scan")

    @count_operations(f"selective_scan_{backend}")
    def operations(u, delta, A, B, C, D, *args, **kwargs):
        # Of each state the exponent, the decayed state, the input and, if it is read, the output; d u and D u once.
        each = A[1] * (3 if C is None else 4) + (1 if D is None else 2)
        return 2 * prod(u) * each

    @count_operations(f"selective_scan_{backend}_backward")
    def _(grad, *args, **kwargs):
        return 2 * operations(*args)

    return Operators(scan_op, backward_op)
