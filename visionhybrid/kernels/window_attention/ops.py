"""Window attention as a PyTorch operator: registration that backends share."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import widened


def define(backend: str, attention: Callable[..., Any], attention_backward: Callable[..., Any]) -> Any:
    """Registers the two functions of a backend; their signatures are those of `eager.py`.

    `attention` returns the map and log2 of each softmax's normaliser, (B, rows, columns, heads, N).
    """
    op = register(f"window_attention_{backend}", attention)
    backward_op = register(f"window_attention_{backend}_backward", attention_backward)

    @op.register_fake
    def _(q, k, v, bias, window, reach, shift, scale):
        B, H, W, heads, _ = q.shape
        normaliser = (B, H // window[0], W // window[1], heads, window[0] * window[1])
        return v.new_empty(v.shape), q.new_empty(normaliser, dtype=widened(q))

    @backward_op.register_fake
    def _(grad, q, k, v, bias, out, lse, bias_learns, window, reach, shift, scale):
        dbias = bias.new_empty(bias.shape) if bias_learns else q.new_empty(0)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias

    def save(ctx, inputs, output):
        q, k, v, bias, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, bias, *output)
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx, grad, _):
        q, k, v, bias, out, lse = ctx.saved_tensors
        learns = bias is not None and ctx.needs_input_grad[3]
        *grads, dbias = backward_op(grad, q, k, v, bias, out, lse, learns, *ctx.options)
        return *grads, dbias if learns else None, None, None, None, None

    op.register_autograd(gradient, setup_context=save)
    end_of_derivatives(backward_op, "window_attention")

    @count_operations(f"window_attention_{backend}")
    def _(q, k, v, bias, window, reach, *args, **kwargs):
        return 2 * prod(q[:4]) * prod(reach) * (q[4] + v[4])

    @count_operations(f"window_attention_{backend}_backward")
    def _(grad, q, k, v, bias, out, lse, bias_learns, window, reach, *args, **kwargs):
        return 2 * prod(q[:4]) * prod(reach) * (3 * q[4] + 2 * v[4])

    return op
