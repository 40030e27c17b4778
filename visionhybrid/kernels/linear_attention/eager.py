"""Linear attention in plain PyTorch: the CPU path.

Tokens pass in chunks that stay in the cache, so nothing as long as the sequence is written but the results. The four
functions are the bodies of the operators in `ops.py`; a chunk is computed in float32 (float64 for float64) whatever the
inputs' type.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from visionhybrid.kernels.linear_attention import ops
from visionhybrid.kernels.linear_attention.ops import like, like_or_empty
from visionhybrid.kernels.precision import widened

# Elements of one chunk of (B, heads, tokens, D): 2 MB in float32, which with its features and products fits the L2 of two
# cores. (1, 8, 65536, 40) on an EPYC 9005: 58, 54, 60, 79 ms for 2^18 to 2^21.
CHUNK = 2**19
# Chunks shorter than this spend their time in the calls themselves.
SHORTEST = 128
# A GPU has no such cache and every launch costs microseconds.
CHUNK_GPU = 2**25


def features(x: Tensor, feature_map: str) -> Tensor:
    """A new tensor, or `x` itself for "identity"."""
    if feature_map == "elu":
        # exp(x) below zero, not elu(x) + 1: that cancels.
        return x.clamp(max=0).exp_().add_(x.clamp(min=0))
    if feature_map == "relu":
        return x.relu()
    if feature_map == "softmax":
        return x.softmax(-1)
    return x


def features_backward(grad: Tensor, phi: Tensor, feature_map: str) -> Tensor:
    """The gradient before the feature map from the one after it; the features say all that is needed."""
    if feature_map == "elu":
        return grad * phi.clamp(max=1)
    if feature_map == "relu":
        return grad * (phi > 0)
    if feature_map == "softmax":
        return phi * (grad - (grad * phi).sum(-1, keepdim=True))
    return grad


def _chunks(x: Tensor) -> Iterator[slice]:
    B, heads, N, D = x.shape
    size = max(SHORTEST, (CHUNK if x.device.type == "cpu" else CHUNK_GPU) // max(1, B * heads * D))
    return (slice(start, start + size) for start in range(0, N, size))


def _keys(k: Tensor, v: Tensor, k_rotated: Tensor | None, keep: Tensor | None, feature_map: str, rows: slice):
    """One chunk of keys: what to drop, the features, the numerator's keys, the values."""
    kind = widened(k)
    phi = features(k[:, :, rows].to(kind), feature_map)
    v = v[:, :, rows].to(kind)
    k_rotated = phi if k_rotated is None else k_rotated[:, :, rows].to(kind)
    if keep is None:
        return None, phi, k_rotated, v
    # Filled, not multiplied by zero: padding may hold NaN.
    drop = ~keep[:, None, rows, None]
    return drop, *(x.masked_fill(drop, 0) for x in (phi, k_rotated, v))


def state(k: Tensor, v: Tensor, k_rotated: Tensor | None, keep: Tensor | None, feature_map: str) -> Tensor:
    B, heads, _, D = k.shape
    total = k.new_zeros(B, heads, D, v.shape[-1] + 1, dtype=widened(k))
    for rows in _chunks(k):
        _, phi, numerator, values = _keys(k, v, k_rotated, keep, feature_map, rows)
        total[..., :-1] += numerator.mT @ values
        total[..., -1] += phi.sum(2)
    return total


def state_backward(
    grad: Tensor, k: Tensor, v: Tensor, k_rotated: Tensor | None, keep: Tensor | None, feature_map: str
) -> tuple[Tensor, Tensor, Tensor]:
    dk, dv = like(k, k.shape[-1]), like(v, v.shape[-1])
    dk_rotated = like_or_empty(k_rotated, k)
    dS, dz = grad[..., :-1].contiguous(), grad[..., None, :, -1]
    for rows in _chunks(k):
        drop, phi, numerator, values = _keys(k, v, k_rotated, keep, feature_map, rows)
        dnumerator = values @ dS.mT
        dphi = dnumerator.add_(dz) if k_rotated is None else dz.expand_as(phi)
        grads = [(dk, features_backward(dphi, phi, feature_map)), (dv, numerator @ dS)]
        if k_rotated is not None:
            grads.append((dk_rotated, dnumerator))
        for out, chunk in grads:
            out[:, :, rows] = chunk if drop is None else chunk.masked_fill(drop, 0)
    return dk, dv, dk_rotated


def apply(
    q: Tensor, state: Tensor, q_rotated: Tensor | None, feature_map: str, normalise: bool, eps: float
) -> Tensor:
    out = like(q, state.shape[-1] - 1)
    S, z = state[..., :-1].contiguous(), state[..., None, :, -1]
    for rows in _chunks(q):
        phi = features(q[:, :, rows].to(state.dtype), feature_map)
        if not normalise:
            out[:, :, rows] = phi @ S
        elif q_rotated is None:
            # The normaliser is one more column of the product.
            both = phi @ state
            torch.div(both[..., :-1], both[..., -1:].add_(eps), out=out[:, :, rows])
        else:
            product = q_rotated[:, :, rows].to(state.dtype) @ S
            torch.div(product, (phi * z).sum(-1, keepdim=True).add_(eps), out=out[:, :, rows])
    return out


def apply_backward(
    grad: Tensor,
    q: Tensor,
    state: Tensor,
    q_rotated: Tensor | None,
    feature_map: str,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dstate = like(q, q.shape[-1]), torch.zeros_like(state)
    dq_rotated = like_or_empty(q_rotated, q)
    S, z = state[..., :-1].contiguous(), state[..., None, :, -1]
    for rows in _chunks(q):
        phi = features(q[:, :, rows].to(state.dtype), feature_map)
        numerator = phi if q_rotated is None else q_rotated[:, :, rows].to(state.dtype)
        g = grad[:, :, rows].to(state.dtype)
        dphi = dnumerator = g @ S.mT
        if normalise:
            inverse = (phi * z).sum(-1, keepdim=True).add_(eps).reciprocal_()
            dnumerator.mul_(inverse)
            # out . g = numerator . (g S^T) / normaliser, so the output need not be kept.
            dnormaliser = (numerator * dnumerator).sum(-1, keepdim=True).mul_(inverse).neg_()
            dphi = torch.addcmul(dnumerator, dnormaliser, z) if q_rotated is None else dnormaliser * z
            dstate[..., -1:] += phi.mT @ dnormaliser
            numerator = numerator * inverse
        dstate[..., :-1] += numerator.mT @ g
        dq[:, :, rows] = features_backward(dphi, phi, feature_map)
        if q_rotated is not None:
            dq_rotated[:, :, rows] = dnumerator
    return dq, dstate, dq_rotated


OPERATORS = ops.define("eager", state, state_backward, apply, apply_backward)


def unsupported(*args) -> str | None:
    return None


def forward(*args) -> Tensor:
    return ops.compose(OPERATORS, *args)
