"""The definition: gather every query's keys, then ordinary attention, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from visionhybrid.kernels.neighborhood_attention.geometry import Axis, axes_of, windows


def unsupported(*args: object) -> str | None:
    return None


def _neighbours(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """(B, heads, *spatial, D) -> (B, heads, *spatial, slots, D), slots in row-major window order."""
    for i, axis in enumerate(axes):
        index = windows(axis).index.to(x.device)
        dim = 2 + 2 * i  # each axis before this one has become (position, slot)
        x = x.index_select(dim, index.flatten()).unflatten(dim, index.shape)
    n = len(axes)
    positions, slots = [2 + 2 * i for i in range(n)], [3 + 2 * i for i in range(n)]
    return x.permute(0, 1, *positions, *slots, -1).flatten(2 + n, 1 + 2 * n)


def outer(parts: Sequence[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Per-axis (N_i, K_i) tables -> one table (*spatial, slots)."""
    n = len(parts)
    total = None
    for i, part in enumerate(parts):
        shape = [1] * (2 * n)
        shape[i], shape[n + i] = part.shape
        total = part.reshape(shape) if total is None else combine(total, part.reshape(shape))
    return total.flatten(n)


def allowed(axes: Sequence[Axis], device: torch.device | str = "cpu") -> Tensor:
    """(*spatial, slots) bool: which slots hold a key."""
    return outer([windows(axis).valid.to(device) for axis in axes], torch.logical_and)


def table_index(axes: Sequence[Axis], device: torch.device | str = "cpu") -> Tensor:
    """(*spatial, slots): place of each slot in a relative position table flattened row-major."""
    rows = []
    for i, axis in enumerate(axes):
        below = 1
        for later in axes[i + 1 :]:
            below *= 2 * later.kernel - 1
        rows.append(windows(axis).row.to(device) * below)
    return outer(rows, torch.add)


def _scores(q: Tensor, k: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float) -> Tensor:
    out = torch.einsum("bh...d,bh...sd->bh...s", q.double() * scale, _neighbours(k.double(), axes))
    if rpb is not None:
        out = out + rpb.double().flatten(1)[:, table_index(axes, q.device)]
    return out.masked_fill(~allowed(axes, q.device), float("-inf"))


def _aggregate(weights: Tensor, v: Tensor, axes: Sequence[Axis]) -> Tensor:
    weights = weights.double().masked_fill(~allowed(axes, v.device), 0.0)
    return torch.einsum("bh...s,bh...sd->bh...d", weights, _neighbours(v.double(), axes))


def forward(
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
    logits = _scores(q, k, rpb, axes, scale)
    if k_extra is None or v_extra is None:
        return _aggregate(logits.softmax(-1), v, axes), logits.logsumexp(-1)
    slots = logits.shape[-1]
    logits = torch.cat(
        [logits, torch.einsum("bh...d,bhxd->bh...x", q.double() * scale, k_extra.double())], -1
    )
    weights = logits.softmax(-1)
    out = torch.einsum("bh...x,bhxe->bh...e", weights[..., slots:], v_extra.double())
    return out + _aggregate(weights[..., :slots], v, axes), logits.logsumexp(-1)


def scores(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    return _scores(q, k, rpb, axes_of(q.shape[2:-1], kernel_size, dilation), scale)


def aggregate(weights: Tensor, v: Tensor, kernel_size: Sequence[int], dilation: Sequence[int]) -> Tensor:
    return _aggregate(weights, v, axes_of(v.shape[2:-1], kernel_size, dilation))
