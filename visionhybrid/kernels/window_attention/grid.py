"""The geometry of window attention in PyTorch operations: bands of a map, windows of a band, the constant part of the logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from visionhybrid.kernels.precision import widened

Pair = tuple[int, int]
LOG2E = math.log2(math.e)
OUTSIDE = -100.0  # logit between pieces of a shifted window, as Swin's and HAT's code has it
# Bytes of weights alive at a time: more windows to a product hide its overhead (16-bit types gain most), as long as the
# weights stay in the last-level cache.
BUDGET = 6_500_000


def masks(window: Pair, shift: Pair, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(2, 2, N, N): what to add to the logits of a window, by [in the last row?, in the last column?]."""
    rows, columns = (torch.arange(w, device=device) >= (w - s) for w, s in zip(window, shift, strict=True))
    one = torch.zeros_like(rows[:, None] | columns)
    pieces = torch.stack([one.long(), one + columns.long(), one + 2 * rows.long()[:, None]])
    pieces = torch.cat([pieces, pieces[1:2] + pieces[2:3]]).flatten(1)  # (4, N)
    mask = OUTSIDE * (pieces[:, :, None] != pieces[:, None, :]).to(dtype)
    return mask.unflatten(0, (2, 2))


class Grid:
    """What forward and backward share: the grid's bands and windows, and the constant part of the logits."""

    def __init__(
        self,
        x: Tensor,
        heads: int,
        bias: Tensor | None,
        window: Sequence[int],
        reach: Sequence[int],
        shift: Sequence[int],
        *,
        keys_first: bool | None = None,
    ) -> None:
        """`x` is any map of the grid, (B, H, W, ...), of the dtype of queries, keys and values; logits are laid out with keys or
        queries first, by default what `eager.Rows` wants.
        """
        self.window, self.reach, self.shift = tuple(window), tuple(reach), tuple(shift)
        self.pad = tuple((e - w) // 2 for e, w in zip(reach, window, strict=True))
        self.rows, self.columns = x.shape[1] // window[0], x.shape[2] // window[1]
        # bfloat16 has float32's range, so its logits are safe; float16's are not.
        self.dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        self.wide = widened(x)
        self.keys_first = x.dtype != torch.bfloat16 if keys_first is None else keys_first
        queries, keys = window[0] * window[1], reach[0] * reach[1]
        # heads, then the axes of the logits: queries and keys, or the other way round
        self.shape = (heads, keys, queries) if self.keys_first else (heads, queries, keys)
        if bias is not None:
            bias = bias.transpose(1, 2) if self.keys_first else bias
            bias = (bias.to(self.wide) * LOG2E).to(self.dtype).contiguous()
        self.constants = self._constants(bias, x.device)

    def _constants(self, base: Tensor | None, device: torch.device) -> dict[tuple[bool, bool], Tensor | None]:
        """Bias plus mask times log2(e), of `shape`, by (in the last row, in the last column). Masks are symmetric."""
        ends = [(False, False), (False, True), (True, False), (True, True)]
        if not any(self.shift):
            return dict.fromkeys(ends, base)
        edges = (masks(self.window, self.shift, device, self.wide) * LOG2E).to(self.dtype)
        inside = edges.new_zeros(()).expand(self.shape) if base is None else base
        return {end: inside + edges[int(end[0]), int(end[1])] if any(end) else inside for end in ends}

    def spans(self) -> Iterator[slice]:
        """Runs of columns to do together, within `BUDGET`."""
        heads, queries, keys = self.shape
        step = max(1, BUDGET // (heads * queries * keys * self.dtype.itemsize))
        for first in range(0, self.columns, step):
            yield slice(first, min(first + step, self.columns))

    def masked(self, weights: Tensor, row: int, span: slice) -> Tensor:
        """The part of a run's weights whose windows hold pieces from opposite borders."""
        if self.shift[0] and row == self.rows - 1:
            return weights
        first = len(weights) - self.shape[0] if self.shift[1] and span.stop == self.columns else len(weights)
        return weights[first:]

    def logits(self, out: Tensor, row: int, span: slice, q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
        """Base-2 logits of a run of windows, (columns * heads, ...), into `out`; `scale` of the product. Keys first: swap q, k."""
        down = row == self.rows - 1
        constant = self.constants[down, False]
        last = self.constants[down, True] if span.stop == self.columns else constant
        if constant is None:
            return torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=scale, out=out)
        if len(out) == self.shape[0]:
            return torch.baddbmm(last, q, k.transpose(1, 2), alpha=scale, out=out)
        windows = out.unflatten(0, (-1, self.shape[0]))
        windows[:-1].copy_(constant)
        windows[-1].copy_(last)
        return out.baddbmm_(q, k.transpose(1, 2), alpha=scale)

    def band(self, t: Tensor, row: int, size: Pair) -> Tensor:
        """The part of `t`, (H, W, heads, D), under one row of windows of `size`: rolled or padded, a view if it can be."""
        H, W = t.shape[:2]
        top = row * self.window[0] + self.shift[0]
        if size != self.window:
            ph, pw = self.pad
            first, last = max(top - ph, 0), min(top + size[0] - ph, H)
            band = t.new_zeros(size[0], W + 2 * pw, *t.shape[2:])
            band[first - top + ph : last - top + ph, pw : pw + W] = t[first:last]
            return band
        band = t[top : top + size[0]]
        if top + size[0] > H:
            band = torch.cat([band, t[: top + size[0] - H]])
        if self.shift[1]:
            band = torch.cat([band[:, self.shift[1] :], band[:, : self.shift[1]]], dim=1)
        return band

    def put(self, t: Tensor, row: int, band: Tensor, *, add: bool = False) -> None:
        """Write a band back where `band` took it from, or `add` it to what is there; bands that overlap are always added."""
        H, W = t.shape[:2]
        top = row * self.window[0] + self.shift[0]
        if band.shape[:2] != (self.window[0], W):
            ph, pw = self.pad
            first, last = max(top - ph, 0), min(top + band.shape[0] - ph, H)
            t[first:last] += band[first - top + ph : last - top + ph, pw : pw + W]
            return
        inside, cut = min(H - top, band.shape[0]), W - self.shift[1]
        for target, source in (
            (t[top : top + inside], band[:inside]),
            (t[: band.shape[0] - inside], band[inside:]),
        ):
            for to, part in (
                (target[:, self.shift[1] :], source[:, :cut]),
                (target[:, : self.shift[1]], source[:, cut:]),
            ):
                to.add_(part) if add else to.copy_(part)

    def windows(self, t: Tensor, row: int, size: Pair) -> Tensor:
        """One row of windows, (columns, height, width, heads, D)."""
        return self.band(t, row, size).unfold(1, size[1], self.window[1]).permute(1, 0, 4, 2, 3)

    def rows_of(self, windows: Tensor, factor: float = 1.0) -> Tensor:
        """(columns, height, width, heads, D) -> (columns, heads, tokens, D), `factor` times."""
        columns, height, width, heads, dim = windows.shape
        out = windows.new_empty(columns, heads, height, width, dim, dtype=self.dtype)
        out.copy_(windows.permute(0, 3, 1, 2, 4))
        return out.flatten(2, 3) if factor == 1 else out.flatten(2, 3).mul_(factor)

    def columns_of(self, windows: Tensor) -> Tensor:
        """(columns, height, width, heads, D) -> (columns, heads, D, tokens)."""
        columns, height, width, heads, dim = windows.shape
        out = windows.new_empty(columns, heads, dim, height, width, dtype=self.dtype)
        return out.copy_(windows.permute(0, 3, 4, 1, 2)).flatten(3)

    def as_band(self, tokens: Tensor) -> Tensor:
        """(columns, tokens, ...) -> band (height, columns * width, ...)."""
        return tokens.unflatten(1, self.window).transpose(0, 1).flatten(1, 2)
