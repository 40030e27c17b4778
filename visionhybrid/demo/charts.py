"""Line charts as inline SVG: axes with units, ticks at round numbers, a legend; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Small enough that 12-pixel text stays legible when a phone scales the picture to its width.
WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named series. `style` is a class of the page's style sheet: one, two, three, or faint."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "one"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A named horizontal line, such as a target."""

    name: str
    y: float


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    marks: Sequence[Mark] = (),
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """An SVG element. `x` and `y` are the axes' names with their units; on a logarithmic axis every value must be above 0, and
    along a logarithmic `x` the values themselves are marked.

    Raises: ValueError: no finite point at all, or a value that a logarithmic axis cannot show.
    """
    points = [(px, py) for line in lines for px, py in line.points if math.isfinite(px) and math.isfinite(py)]
    if not points:
        raise ValueError(f"line_chart: {title!r} has no finite point")
    places = [px for px, _ in points]
    heights = [py for _, py in points] + [mark.y for mark in marks]
    for log, values in ((log_x, places), (log_y, heights)):
        if log and min(values) <= 0:
            raise ValueError(f"line_chart: {title!r} has {min(values)}, which a logarithmic axis cannot show")
    across = _Axis(min(places) if log_x else 0.0, max(places), LEFT, WIDTH - RIGHT, log=log_x)
    if log_x:
        across.marked = sorted(set(places))
    up = _Axis(min(heights), max(heights), HEIGHT - BOTTOM, TOP, log=log_y, pad=0.06)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_grid(across, up),
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>',
        f'<text class="axis" transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y)}</text>',
    ]
    for mark in marks:
        parts.append(f'<path class="mark" d="M{LEFT} {up(mark.y):.1f}H{WIDTH - RIGHT}"/>')
    for line in lines:
        parts.append(f'<path class="line {line.style}" d="{_path(line, across, up)}"/>')
        if len(line.points) <= 30:
            parts.extend(
                f'<circle class="dot {line.style}" cx="{across(px):.1f}" cy="{up(py):.1f}" r="2.6"/>'
                for px, py in line.points
                if math.isfinite(py)
            )
    parts.append("</svg>")
    names = [(line.name, f"line {line.style}") for line in lines] + [(mark.name, "mark") for mark in marks]
    return f'<figure class="plot"><figcaption>{escape(title)}</figcaption>{"".join(parts)}{_legend(names)}</figure>'


def _legend(names: Sequence[tuple[str, str]]) -> str:
    keys = "".join(
        f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><path class="{style}" d="M1 4H21"/></svg>{escape(name)}</li>'
        for name, style in names
    )
    return f'<ul class="legend">{keys}</ul>'


class _Axis:
    """Value -> pixel, and the values to mark."""

    def __init__(
        self, low: float, high: float, start: float, stop: float, *, log: bool, pad: float = 0.0
    ) -> None:
        self.log, self.start, self.stop = log, start, stop
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        if log:
            low, high = math.log10(low), math.log10(high)
        margin = pad * (high - low)
        self.low, self.high = low - margin, high + margin
        self.marked: list[float] = []  # values to mark instead of round ones

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.marked:
            return self.marked
        if not self.log:
            return _round_numbers(self.low, self.high)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [
                f * 10.0**d
                for d in decades
                for f in factors
                if self.low <= math.log10(f * 10.0**d) <= self.high
            ]
            if len(found) >= 3:
                return found
        return found if len(found) > 1 else _round_numbers(10**self.low, 10**self.high)


def _round_numbers(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(across: _Axis, up: _Axis) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = []
    for value in up.ticks():
        at = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in across.ticks():
        at = across(value)
        parts.append(f'<path class="tick" d="M{at:.1f} {floor}v4"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 17}" text-anchor="middle">{_number(value)}</text>')
    parts.append(f'<path class="base" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    return parts


def _path(line: Line, across: _Axis, up: _Axis) -> str:
    """Segments between finite points; a value that is not finite leaves a gap."""
    commands, pen = [], "M"
    for px, py in line.points:
        if not math.isfinite(py):
            pen = "M"
            continue
        commands.append(f"{pen}{across(px):.1f} {up(py):.1f}")
        pen = "L"
    return "".join(commands)


def _number(value: float) -> str:
    """Short: 1200 -> 1200, 0.05 -> 0.05, no trailing zeros."""
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
