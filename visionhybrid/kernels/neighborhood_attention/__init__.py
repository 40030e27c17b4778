"""Neighbourhood attention: every query attends to the window of keys around it, shifted at borders, never cut.

Sources: Hassani et al., arXiv:2204.07143 (the operator), 2209.15001 (dilated), 2504.16922 (strided and causal: generalised);
SHI-Labs/NATTEN v0.17.1 for edges and bias indexing, 8c8729f for strides and causal axes. `geometry.py` states the windows.
Differences: any device, any dtype (accumulation in float32), any head dim, even kernels with bias, and a map smaller than
`kernel_size * dilation` is attended whole where NATTEN raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from visionhybrid.kernels.dispatch import pick
from visionhybrid.kernels.neighborhood_attention import eager, plain, reference
from visionhybrid.kernels.precision import autocast

Ints = int | Sequence[int]
BACKENDS: dict[str, Any] = {"reference": reference, "eager": eager}
if find_spec("triton"):  # it exists for Linux only
    from visionhybrid.kernels.neighborhood_attention import triton

    BACKENDS["triton"] = triton


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Ints,
    dilation: Ints = 1,
    stride: Ints = 1,
    causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The checked, complete arguments that every backend takes."""
    op = "neighborhood_attention"
    q, k, v, *extras = autocast(q, k, v, *(extra or (None, None)))
    n = _check(op, q=q, k=k, v=v)
    _check_extra(op, q, v, *extras)
    kernel, dil = _sizes(op, "kernel_size", kernel_size, n), _sizes(op, "dilation", dilation, n)
    steps = _sizes(op, "stride", stride, n)
    flags = [int(c) for c in ([causal] * n if isinstance(causal, bool) else causal)]
    if len(flags) != n:
        raise ValueError(f"{op}: causal needs {n} values, one per axis, got {len(flags)}")
    if any(s > size for s, size in zip(steps, kernel, strict=True)):
        raise ValueError(f"{op}: stride must not exceed kernel_size {kernel}, got {steps}")
    _check_rpb(op, rpb, q, kernel)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return q, k, v, rpb, *extras, kernel, dil, steps, flags, scale


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: Ints,
    dilation: Ints = 1,
    stride: Ints = 1,
    causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    extra: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """out[x] = sum_j softmax_j(scale * q[x] . k[nb(x, j)] + rpb[r(x, j)]) v[nb(x, j)].

    Args:
        q, k: (B, heads, *spatial, D) with one, two or three spatial axes.
        v: (B, heads, *spatial, E).
        kernel_size, dilation, stride, causal: one for all axes, or one per axis. `stride` queries share the window of
            their leader (1 <= stride <= kernel_size); a causal axis sees keys up to the query only.
        rpb: (heads, 2 * kernel - 1, ...) relative position bias, row `key - query + kernel - 1` on each axis; -inf hides a
            key, which cuts windows of any shape from the rectangle.
        extra: keys (B, heads, X, D) and values (B, heads, X, E) that every query sees beside its window: text, registers.
        scale: default D ** -0.5.
        return_lse: also return the natural log-sum-exp of the scores (B, heads, *spatial); it carries no gradient.
        backend: "auto", "eager", "triton" or "reference" (float64).
    Returns: (B, heads, *spatial, E) in the dtype of v.
    Raises: ValueError naming the argument, its value and what is expected.
    """
    args = arguments(
        q,
        k,
        v,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        causal=causal,
        rpb=rpb,
        extra=extra,
        scale=scale,
    )
    out, lse = pick("neighborhood_attention", BACKENDS, backend, args).forward(*args)
    return (out, lse) if return_lse else out


def neighborhood_scores(
    q: Tensor,
    k: Tensor,
    *,
    kernel_size: Ints,
    dilation: Ints = 1,
    rpb: Tensor | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """The first half: scale * q[x] . k[nb(x, j)] + rpb[r(x, j)], before any softmax (NATTEN's `na*d_qk`).

    Returns: (B, heads, *spatial, slots) in the dtype of q, slots = product of `kernel_size` in row-major window order;
        -inf in a slot without a key, which occurs only on an axis shorter than `kernel_size * dilation`.
    """
    op = "neighborhood_scores"
    q, k = autocast(q, k)
    n = _check(op, q=q, k=k)
    kernel, dil = _sizes(op, "kernel_size", kernel_size, n), _sizes(op, "dilation", dilation, n)
    _check_rpb(op, rpb, q, kernel)
    args = (q, k, rpb, kernel, dil, float(scale))
    if backend == "auto" and torch.onnx.is_in_onnx_export():
        return plain.scores(*args)
    return pick(op, BACKENDS, backend, args).scores(*args)


def neighborhood_aggregate(
    weights: Tensor, v: Tensor, *, kernel_size: Ints, dilation: Ints = 1, backend: str = "auto"
) -> Tensor:
    """The second half: out[x] = sum_j weights[x, j] v[nb(x, j)] (NATTEN's `na*d_av`).

    Args:
        weights: (B, heads, *spatial, slots), as `neighborhood_scores` lays them out; slots without a key are ignored.
        v: (B, heads, *spatial, E).
    Returns: (B, heads, *spatial, E) in the dtype of v.
    """
    op = "neighborhood_aggregate"
    n = _check(op, v=v)
    kernel, dil = _sizes(op, "kernel_size", kernel_size, n), _sizes(op, "dilation", dilation, n)
    wanted = (*v.shape[:-1], prod(kernel))
    if tuple(weights.shape) != wanted:
        raise ValueError(f"{op}: weights must be {wanted}, got {tuple(weights.shape)}")
    args = (weights, v, kernel, dil)
    if backend == "auto" and torch.onnx.is_in_onnx_export():
        return plain.aggregate(*args)
    return pick(op, BACKENDS, backend, args).aggregate(*args)


def _check(op: str, **maps: Tensor) -> int:
    """Common checks of q, k, v; the number of spatial axes."""
    (first, q), *rest = maps.items()
    n = q.ndim - 3
    if n not in (1, 2, 3):
        raise ValueError(
            f"{op}: {first} must be (B, heads, *spatial, D) with 1 to 3 spatial axes, got {tuple(q.shape)}"
        )
    if 0 in q.shape[1:]:
        raise ValueError(f"{op}: {first} has an empty axis, got {tuple(q.shape)}")
    for name, x in rest:
        same = x.shape == q.shape if name == "k" else x.shape[:-1] == q.shape[:-1]
        if not same:
            raise ValueError(f"{op}: {name} must match {first} {tuple(q.shape)}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{op}: {first} and {name} need one dtype, got {q.dtype} and {x.dtype}")
    return n


def _check_extra(op: str, q: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
    if keys is None or values is None:
        return
    wanted = [(*q.shape[:2], keys.shape[2], x.shape[-1]) for x in (q, v)]
    if [tuple(keys.shape), tuple(values.shape)] != wanted or keys.dtype != q.dtype or values.dtype != q.dtype:
        raise ValueError(
            f"{op}: extra must be keys {wanted[0]} and values {wanted[1]} of {q.dtype}, "
            f"got {tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}"
        )


def _sizes(op: str, name: str, value: Ints, n: int) -> list[int]:
    # An exported map's sides, and a dilation that follows them, are symbols: `int` would fix them.
    sizes = (
        [value] * n
        if isinstance(value, int)
        else [v if isinstance(v, torch.SymInt) else int(v) for v in value]
    )
    if len(sizes) != n or min(sizes) < 1:
        raise ValueError(f"{op}: {name} needs {n} positive integers, got {value}")
    return sizes


def _check_rpb(op: str, rpb: Tensor | None, q: Tensor, kernel: Sequence[int]) -> None:
    wanted = (q.shape[1], *[2 * k - 1 for k in kernel])
    if rpb is not None and tuple(rpb.shape) != wanted:
        raise ValueError(
            f"{op}: rpb must be {wanted} for kernel_size {tuple(kernel)}, got {tuple(rpb.shape)}"
        )
