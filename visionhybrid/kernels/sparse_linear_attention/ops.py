"""The sparse branch as a PyTorch operator of each backend, with its gradient; and the choice of blocks as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from visionhybrid.kernels.linear_attention import linear_attention
from visionhybrid.kernels.operators import count_operations, end_of_derivatives, register
from visionhybrid.kernels.precision import widened
from visionhybrid.kernels.sparse_linear_attention import linear
from visionhybrid.kernels.sparse_linear_attention.blocks import lookup


def define(backend: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Registers the sparse branch of a backend; the signatures are those of `gathered.py`."""
    op = register(f"block_sparse_attention_{backend}", forward, "block_sparse_attention")
    backward_op = register(
        f"block_sparse_attention_{backend}_backward", backward, "block_sparse_attention_backward"
    )

    @op.register_fake
    def _(q, k, v, lut, mask, block_q, block_k, scale):
        return v.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=widened(q))

    @backward_op.register_fake
    def _(grad, q, k, v, out, lse, lut, mask, block_q, block_k, scale):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

    def save(ctx, inputs, output):
        q, k, v, lut, mask, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output, lut, mask)
        ctx.mark_non_differentiable(output[1])

    def gradient(ctx, grad, _):
        return *backward_op(grad.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None, None

    op.register_autograd(gradient, setup_context=save)
    end_of_derivatives(backward_op, "sparse_linear_attention")

    @count_operations(f"block_sparse_attention_{backend}")
    def _(q, k, v, lut, mask, block_q, block_k, *args, **kwargs):
        # As if every row had as many blocks as the longest.
        return 2 * prod(lut) * block_q * block_k * (q[3] + v[3])

    @count_operations(f"block_sparse_attention_{backend}_backward")
    def _(grad, q, k, v, out, lse, lut, mask, block_q, block_k, *args, **kwargs):
        return 2 * prod(lut) * block_q * block_k * (3 * q[3] + 2 * v[3])

    return op


@partial(register, "block_lookup")
def lookup_op(block_map: Tensor, width: int) -> Tensor:
    """`blocks.lookup`; its `width` columns are known beforehand, or 0 where the longest row decides."""
    return lookup(block_map)


@lookup_op.register_fake
def _(block_map, width):
    columns = width or torch.library.get_ctx().new_dynamic_size()
    return block_map.new_empty(*block_map.shape[:3], columns, dtype=torch.long)


def run(
    sparse: Any,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    width: int,
    key_mask: Tensor | None,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: str,
    variant: str,
    scale: float,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | None]:
    """Both branches: `sparse` is what `define` gave. The linear branch of "main" is linear attention over all keys."""
    out, _ = sparse(q, k, v, lookup_op(block_map, width), mask, block_q, block_k, scale)
    if variant == "sparse":
        return out, None
    if variant == "main":
        options = dict(feature_map=feature_map, norm="sana", eps=linear.EPS_MAIN, key_mask=key_mask)
        return out, linear_attention(q, k, v, **options, group=group, backend=backend)
    return out, linear.forward(q, k, v, block_map, key_mask, block_q, block_k, feature_map, group)
