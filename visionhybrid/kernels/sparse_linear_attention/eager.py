"""The CPU path: the sparse branch as PyTorch operators with their gradient, the linear branch as plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from visionhybrid.kernels.sparse_linear_attention import gathered, linear
from visionhybrid.kernels.sparse_linear_attention.blocks import lookup


def unsupported(*args: object) -> str | None:
    return None


def forward(
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
) -> tuple[Tensor, Tensor | None]:
    out, _ = sparse_op(q, k, v, lookup_op(block_map, width), mask, block_q, block_k, scale)
    if variant == "sparse":
        return out, None
    return out, linear.forward(q, k, v, block_map, key_mask, block_q, block_k, feature_map, variant)


@torch.library.custom_op("visionhybrid::block_sparse_attention", mutates_args=())
def sparse_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lut: Tensor,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return gathered.forward(q, k, v, lut, mask, block_q, block_k, scale)


@sparse_op.register_fake
def _(q, k, v, lut, mask, block_q, block_k, scale):
    lse = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=lse)


@torch.library.custom_op("visionhybrid::block_sparse_attention_backward", mutates_args=())
def sparse_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lut: Tensor,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return gathered.backward(grad, q, k, v, out, lse, lut, mask, block_q, block_k, scale)


@sparse_backward_op.register_fake
def _(grad, q, k, v, out, lse, lut, mask, block_q, block_k, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, lut, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, lut, mask)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad, _):
    return (
        *sparse_backward_op(grad.contiguous(), *ctx.saved_tensors, *ctx.options),
        None,
        None,
        None,
        None,
        None,
    )


sparse_op.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("visionhybrid::block_lookup", mutates_args=())
def lookup_op(block_map: Tensor, width: int) -> Tensor:
    """`blocks.lookup` as one operator; `width` columns are known beforehand, or 0 to take the longest row."""
    return lookup(block_map)


@lookup_op.register_fake
def _(block_map, width):
    columns = width or torch.library.get_ctx().new_dynamic_size()
    return block_map.new_empty(*block_map.shape[:3], columns, dtype=torch.long)
