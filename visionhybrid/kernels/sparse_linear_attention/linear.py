"""The linear branch of v1 and paper in differentiable PyTorch: one state per query block."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from visionhybrid.kernels.linear_attention.ops import AllReduce
from visionhybrid.kernels.operators import count_operations, register
from visionhybrid.kernels.precision import widened
from visionhybrid.kernels.sparse_linear_attention.blocks import MARGINAL

EPS_MAIN = 1e-5  # thu-ml/SLA main, added to the denominator; v1 has none
FEATURES = ("softmax", "elu", "relu")


def feature(x: Tensor, name: str) -> Tensor:
    """phi, over the head dimension: softmax, elu(x) + 1, or relu."""
    if name == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if name == "elu" else F.relu(x)


@partial(register, "wide_product")
def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b that autocast does not round, its gradients neither, should they be taken while autocast is on."""
    return a @ b


@product.register_fake
def _(a, b):
    return a @ b


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad):
    a, b = ctx.saved_tensors
    needed = ctx.needs_input_grad
    return product(grad, b.mT) if needed[0] else None, product(a.mT, grad) if needed[1] else None


@count_operations("wide_product")
def _(a, b, *args, **kwargs):
    return 2 * prod(a) * b[-1]


product.register_autograd(_gradient, setup_context=_save)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    key_mask: Tensor | None,
    block_q: int,
    block_k: int,
    feature_map: str,
    group: ProcessGroup | None = None,
) -> Tensor:
    """phi(q) H / (phi(q) z), H and z summed over the marginal blocks of each query block and over all keys of other ranks.

    Returns: (B, heads, Lq, E) in the dtype of v, zero where a row has no such block; states and normalisers in float32
        (float64 for float64).
    """
    wide = widened(q)
    fq, fk, values = feature(q.to(wide), feature_map), feature(k.to(wide), feature_map), v.to(wide)
    if key_mask is not None:
        fk = fk * key_mask[:, None, :, None]
    pad_k, pad_q = -k.shape[2] % block_k, -q.shape[2] % block_q
    fk = F.pad(fk, (0, 0, 0, pad_k)).unflatten(2, (-1, block_k))  # (B, heads, N, block_k, D)
    values = F.pad(values, (0, 0, 0, pad_k)).unflatten(2, (-1, block_k))
    # H_j beside z_j: (B, heads, N, D, E + 1).
    states = torch.cat([product(fk.mT, values), fk.sum(3)[..., None]], -1)
    marginal = product((block_map == MARGINAL).to(wide), states.flatten(3)).unflatten(3, states.shape[3:])
    if group is not None:
        own = states.sum(2)
        marginal = marginal + (AllReduce.apply(own, group) - own)[:, :, None]
    fq = F.pad(fq, (0, 0, 0, pad_q)).unflatten(2, (-1, block_q))
    total, norm = product(fq, marginal).flatten(2, 3)[:, :, : q.shape[2]].tensor_split([v.shape[-1]], dim=-1)
    empty = norm == 0
    return torch.where(empty, 0.0, total / torch.where(empty, 1.0, norm)).to(v.dtype)
