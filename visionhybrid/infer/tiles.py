"""A large image through a model in windows whose borders cannot be seen.

`tiled` cuts overlapping windows, runs each, and adds the results with weights that fall smoothly where windows meet.
The weights are products of one weight a row and one a column, normalised so that they sum to one at every pixel: what
the model gets right in every window comes out right, a constant or linear image to float precision. The outer quarter
of each overlap is not used at all, because there a window sees its own cut edge (padding) instead of the image.

`pasted` is the tile mode of the published HAT wrapper (hard seams), kept for comparison.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor], Tensor]


def tiled(
    fn: Run,
    x: Tensor,
    *,
    scale: int,
    tile: int,
    overlap: int,
    multiple_of: int = 1,
    progress: Callable[[float], object] | None = None,
) -> Tensor:
    """`fn(x)` computed in windows of at most `tile` x `tile` input pixels.

    Windows start at multiples of `multiple_of`, so that a model's own windows lie where they lie in the whole image, and
    are spread evenly: the overlap is at least `overlap`. When memory runs out in a window, that window and all later
    ones are cut again at half the size; the finished ones are kept. Results are collected on the device of `x`.

    Args:
        fn: (B, C, h, w) -> (B, C', h * scale, w * scale), for any h and w.
        x: (B, C, H, W).
        tile, overlap: input pixels; `tile` is rounded down and `overlap` up to `multiple_of`; overlap <= tile / 2.
        progress: called after each window with the fraction done, in (0, 1].
    Returns: (B, C', H * scale, W * scale) in the dtype that `fn` returns.
    Raises: ValueError: impossible tile or overlap. MemoryError: even the smallest window does not fit.
    """
    if tile < multiple_of:
        raise ValueError(f"tile: {tile} is less than the model's window of {multiple_of} pixels")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"overlap: between 0 and half the tile ({tile // 2}), got {overlap}")
    return _Tiler(fn, scale, tile, overlap, multiple_of, progress)(x)


class _Tiler:
    """Runs a window whole if it is small enough, else in smaller windows; `size` shrinks when memory runs out."""

    def __init__(self, fn: Run, scale: int, tile: int, overlap: int, multiple_of: int, progress):
        self.fn, self.scale, self.overlap, self.step = fn, scale, overlap, multiple_of
        self.size = tile // multiple_of * multiple_of
        self.progress, self.done = progress, 0.0

    def __call__(self, x: Tensor, share: float = 1.0) -> Tensor:
        while max(x.shape[-2:]) <= self.size:
            y = self._try(x)
            if y is not None:
                self.done += share
                if self.progress:
                    self.progress(min(self.done, 1.0))
                return y
            self._shrink(max(x.shape[-2:]))
        rows, columns = (self._axis(length) for length in x.shape[-2:])
        area = sum(b - a for a, b, _ in rows) * sum(b - a for a, b, _ in columns)
        out: Tensor | None = None
        for top, bottom, by_row in rows:
            for left, right, by_column in columns:
                part = (bottom - top) * (right - left) / area
                y = self(x[..., top:bottom, left:right], share * part).to(x.device)
                if out is None:
                    out = y.new_zeros(*y.shape[:2], x.shape[-2] * self.scale, x.shape[-1] * self.scale)
                weight, s = (by_row[:, None] * by_column).to(y), self.scale
                out[..., top * s : bottom * s, left * s : right * s].addcmul_(y, weight)
        assert out is not None
        return out

    def _axis(self, length: int) -> list[tuple[int, int, Tensor]]:
        spans = windows(length, self.size, self.overlap, self.step)
        return [(a, b, w) for (a, b), w in zip(spans, weights(spans, self.scale), strict=True)]

    def _try(self, x: Tensor) -> Tensor | None:
        """`fn(x)`, or None if memory ran out."""
        try:
            return self.fn(x)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        # Only here is the failed call's traceback, and with it all its tensors, gone.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _shrink(self, side: int) -> None:
        smallest = min(self.size, 2 * max(self.step, 8))
        size = max(min(self.size, side) // 2 // self.step * self.step, smallest)
        if size >= min(self.size, side):
            raise MemoryError(
                f"not enough memory even for a tile of {side} pixels; free some, or use another device"
            )
        self.size, self.overlap = size, min(self.overlap, size // 2)


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in text or "can't allocate memory" in text or "out of memory" in text
    )


def windows(length: int, size: int, overlap: int, step: int = 1) -> list[tuple[int, int]]:
    """Spans [start, stop) of at most `size` that cover `length`, as few and as evenly spread as the overlap allows.

    Starts are multiples of `step`; neighbours share at least `overlap`, rounded up to `step` but at most half a span.
    """
    total, span = -(-length // step), size // step
    shared = min(-(-overlap // step), span // 2)
    if total <= span:
        return [(0, length)]
    count = math.ceil((total - shared) / (span - shared))
    starts = [i * (total - span) // (count - 1) for i in range(count)]
    return [(a * step, min((a + span) * step, length)) for a in starts]


def weights(spans: list[tuple[int, int]], scale: int = 1) -> list[Tensor]:
    """One weight for each output pixel of each span, float64, summing to one over the spans that cover a pixel."""
    raw = [torch.ones((b - a) * scale, dtype=torch.float64) for a, b in spans]
    for i in range(1, len(spans)):
        shared = spans[i - 1][1] - spans[i][0]
        if shared:
            rise = _rise(shared, scale)
            raw[i][: len(rise)] *= rise
            raw[i - 1][-len(rise) :] *= rise.flip(0)
    total = torch.zeros(spans[-1][1] * scale, dtype=torch.float64)
    for (a, b), w in zip(spans, raw, strict=True):
        total[a * scale : b * scale] += w
    return [w / total[a * scale : b * scale] for (a, b), w in zip(spans, raw, strict=True)]


def _rise(shared: int, scale: int) -> Tensor:
    """sin^2 from 0 to 1 over `shared` input pixels; flat in the first and the last quarter."""
    flat = -(-shared // 4) if shared > 1 else 0
    middle = (shared - 2 * flat) * scale
    position = torch.arange(shared * scale, dtype=torch.float64) + 0.5 - flat * scale
    if middle == 0:
        return (position > 0).double()
    return (position / middle).clamp(0, 1).mul(math.pi / 2).sin().square()


def pasted(fn: Run, x: Tensor, *, scale: int, tile: int, pad: int, multiple_of: int = 1) -> Tensor:
    """The published tile mode: no blending, each pixel from the one tile whose core holds it.

    The image is padded below and right by reflection to `multiple_of`, cut into cores of `tile` x `tile`, each run with
    `pad` more pixels on every side that the padded image has, and the cores' results are put side by side.
    Source: XPixelGroup/HAT@1638a9a hat/models/hat_model.py. Args and Returns as `tiled`; `multiple_of` must divide both.
    """
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % multiple_of, 0, -height % multiple_of), "reflect")
    rows, columns = x.shape[-2:]
    lines = []
    for top in range(0, rows, tile):
        line = []
        for left in range(0, columns, tile):
            above, before = min(pad, top), min(pad, left)
            y = fn(x[..., top - above : top + tile + pad, left - before : left + tile + pad])
            core = y[..., above * scale : (above + tile) * scale, before * scale : (before + tile) * scale]
            line.append(core.to(x.device))
        lines.append(torch.cat(line, -1))
    return torch.cat(lines, -2)[..., : height * scale, : width * scale]
