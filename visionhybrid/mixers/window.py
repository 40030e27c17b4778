"""Softmax attention inside windows of a grid: shifted (Swin) or with overlapping key windows (HAT), images and videos.

Papers: Liu et al., arXiv:2103.14030 (Swin), arXiv:2106.13230 (video); Chen et al., arXiv:2309.05239 (HAT's OCAB: windows of keys
`1 + overlap` times as wide, same centres). Here they are mixers for models trained with full attention, so windows that reach
over a border lose what lies outside instead of attending to zeros, and there is no position table; for the weights of Swin and HAT,
with their conventions, see `visionhybrid.kernels.window_attention`.
Text: every window sees all of it, text queries see everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.mixers.base import Cost, Halo, local_cost, per_axis
from visionhybrid.mixers.local import Local
from visionhybrid.mixers.registry import register

# Elements of gathered keys alive at a time where no gradient keeps them: 4 MB in float32. Shifted windows of 8 with 512 text
# tokens at 64x64, 4 heads of 64: 88, 108, 144, 145 ms for 2^18, 2^20, 2^22, 2^24.
BUDGET = 2**20
# A GPU has no such cache and every launch costs microseconds.
BUDGET_GPU = 2**27


@register(
    "window",
    purpose="attention inside windows, shifted or with overlapping keys",
    paper="arXiv:2103.14030, arXiv:2309.05239",
    source="",
    license="",
    grids=(1, 2, 3),
    text=True,
    masks=False,
    parameters=False,
    training_free=True,
)
class Window(Local):
    """Softmax over the keys of each query's window (and the text).

    Args (each one value, or one for each axis of the grid):
        window_size: tokens.
        shift: the cuts between windows are moved by this many tokens towards the origin's far side, as by rolling the map up and
            left; no shift on an axis that one window covers. Hosts shift every other layer.
        overlap: key windows are `int(overlap * window_size)` tokens wider (HAT: 0.5).
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        scale: float | None = None,
        window_size: int | Sequence[int] = 8,
        shift: int | Sequence[int] = 0,
        overlap: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__(dim=dim, heads=heads, head_dim=head_dim, scale=scale)
        self.window_size, self.shift, self.overlap = window_size, shift, overlap

    def axes(self, grid: Sequence[int]) -> list[Axis]:
        names = ("window_size", "shift", "overlap")
        given = zip(
            *(per_axis("window", name, getattr(self, name), len(grid)) for name in names), strict=True
        )
        axes = []
        for side, (window, shift, overlap) in zip(grid, given, strict=True):
            if window < 1 or not 0 <= shift < window or overlap < 0:
                raise ValueError(
                    f"window: need window_size >= 1, 0 <= shift < window_size, overlap >= 0, "
                    f"got {window}, {shift}, {overlap}"
                )
            before = (window - shift) % window if window < side else 0
            axes.append(Axis(side, window, before, int(overlap * window)))
        return axes

    def image(
        self, q: Tensor, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor], *, scale: float | None
    ) -> Tensor:
        axes, text_tokens = self.axes(q.shape[2:-1]), text[0].shape[2]
        keys = text_tokens + prod([axis.keys for axis in axes])
        row = keys * prod(q.shape[:2]) * q.shape[-1] * prod([axis.count for axis in axes[1:]])
        rows = max(1, (BUDGET if q.device.type == "cpu" else BUDGET_GPU) // row)
        parts = []
        for start in range(0, axes[0].count, rows):
            chunk = slice(start, start + rows)
            out = F.scaled_dot_product_attention(
                _cut(q, axes, "queries", chunk),
                _beside(text[0], _cut(k, axes, "seen", chunk)),
                _beside(text[1], _cut(v, axes, "seen", chunk)),
                attn_mask=_mask(axes, chunk, text_tokens, q.device),
                scale=scale,
            )
            parts.append(_join(out.unflatten(0, q.shape[:2]), axes))
        image = torch.cat(parts, 2)
        for i, axis in enumerate(axes):
            image = image.narrow(2 + i, axis.before, axis.side)
        return image.flatten(2, -2)

    def halo(self, grid: Sequence[int]) -> Halo:
        first = self.axes(grid)[0]
        return Halo(rows=first.keys, multiple=first.window)

    def cost(self, *, grid: Sequence[int], text_tokens: int = 0, bytes_per: int = 2) -> Cost:
        return local_cost(prod(grid), text_tokens, prod(a.keys for a in self.axes(grid)), self, bytes_per)


@dataclass(frozen=True)
class Axis:
    """Windows along one axis. The first begins `before` tokens outside the map, the last may end outside."""

    side: int
    window: int
    before: int
    wider: int

    @property
    def count(self) -> int:
        return -(-(self.side + self.before) // self.window)

    @property
    def keys(self) -> int:
        return self.window + self.wider

    def positions(self, what: str, device: torch.device) -> Tensor:
        """(windows, tokens) places on the axis of "queries" or of the keys "seen", outside ones included."""
        first = torch.arange(self.count, device=device)[:, None] * self.window - self.before
        if what == "queries":
            return first + torch.arange(self.window, device=device)
        return first - self.wider // 2 + torch.arange(self.keys, device=device)


def _cut(x: Tensor, axes: Sequence[Axis], what: str, chunk: slice) -> Tensor:
    """(B, heads, *grid, D) -> (B * heads, windows, tokens, D) of the windows whose first index lies in `chunk`.

    Places outside repeat the border; masks hide them as keys and `narrow` drops them as queries.
    """
    for i, axis in enumerate(axes):
        places = axis.positions(what, x.device)[chunk if i == 0 else slice(None)]
        places = places.clamp(0, axis.side - 1)
        x = x.index_select(2 + 2 * i, places.flatten()).unflatten(2 + 2 * i, places.shape)
    n = len(axes)
    order = [2 + 2 * i for i in range(n)] + [3 + 2 * i for i in range(n)]
    return x.permute(0, 1, *order, -1).flatten(2 + n, 1 + 2 * n).flatten(2, 1 + n).flatten(0, 1)


def _join(x: Tensor, axes: Sequence[Axis]) -> Tensor:
    """(B, heads, windows, tokens, D) -> (B, heads, *padded grid, D)."""
    n = len(axes)
    x = x.unflatten(2, (-1, *(axis.count for axis in axes[1:])))
    x = x.unflatten(2 + n, [axis.window for axis in axes])
    x = x.permute(0, 1, *[d for i in range(n) for d in (2 + i, 2 + n + i)], -1)
    for i in range(n):
        x = x.flatten(2 + i, 3 + i)
    return x


def _beside(text: Tensor, keys: Tensor) -> Tensor:
    """(B, heads, X, D) in front of each window's keys (B * heads, windows, tokens, D)."""
    if not text.shape[2]:
        return keys
    return torch.cat([text.flatten(0, 1)[:, None].expand(-1, keys.shape[1], -1, -1), keys], 2)


def _mask(axes: Sequence[Axis], chunk: slice, text_tokens: int, device: torch.device) -> Tensor | None:
    """(windows, 1, keys) bool, False for places outside the map; None where there are none."""
    total = None
    for i, axis in enumerate(axes):
        places = axis.positions("seen", device)[chunk if i == 0 else slice(None)]
        inside = (places >= 0) & (places < axis.side)
        if total is None:
            total = inside
            continue
        total = (total[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
    ragged = any(a.before or a.wider or a.side % a.window for a in axes)
    return F.pad(total[:, None], (text_tokens, 0), value=True) if ragged and total is not None else None
