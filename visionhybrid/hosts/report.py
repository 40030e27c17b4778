"""What `attach`, `detach` and `describe` return: a table that can be printed or read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from visionhybrid.hosts.layers import Layer
from visionhybrid.mixers import Mixer, crossover

__all__ = ["Report", "Row", "row_of"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attention module. `mixer` is None where the model's own attention works; `reason` says why no mixer can."""

    name: str
    dim: int
    heads: int
    head_dim: int
    tokens: int | None
    own: str = "softmax"  # what the model does by itself
    mixer: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0  # of the mixer
    weights: str = ""  # whose projections it uses, if not the model's own
    reason: str | None = None
    speedup: float | None = None  # multiplications of softmax attention / of the mixer, networks included
    crossover: int | None = None  # image tokens of a square from which the mixer multiplies less


def row_of(layer: Layer, mixer: Mixer | None, *, weights: str = "") -> Row:
    """The row of `layer`, which has `mixer` with the projections of `weights`, or its own attention."""
    facts: dict[str, Any] = dict(
        name=layer.name,
        dim=layer.dim,
        heads=layer.heads,
        head_dim=layer.head_dim,
        tokens=layer.tokens,
        own=layer.own,
    )
    if mixer is None:
        return Row(**facts, reason=layer.reason)
    return Row(
        **facts,
        mixer=mixer.about.name,
        options=mixer.options,
        parameters=sum(p.numel() for p in mixer.parameters()),
        weights=weights,
        speedup=layer.speedup(mixer),
        crossover=crossover(mixer) if layer.axes == 2 else None,
    )


@dataclass(frozen=True)
class Report:
    """`rows`, one for each attention module, in the model's order; `str` makes a table of those that can be replaced."""

    model: str
    rows: Sequence[Row]

    @property
    def mixed(self) -> list[Row]:
        return [row for row in self.rows if row.mixer]

    @property
    def refused(self) -> list[Row]:
        return [row for row in self.rows if row.reason]

    @property
    def slower(self) -> list[Row]:
        """Layers whose mixer does more work than softmax attention would at this size."""
        return [row for row in self.mixed if row.speedup is not None and row.speedup < 1]

    @property
    def warning(self) -> str:
        """One line about `slower`, empty if there are none."""
        if not self.slower:
            return ""
        starts = [row.crossover for row in self.slower if row.crossover]
        when = f"; they multiply less from {min(starts)} tokens on" if starts else ""
        return f"{len(self.slower)} of {len(self.mixed)} mixers do more work than softmax attention at this size{when}"

    def __str__(self) -> str:
        free = [row for row in self.rows if not row.reason]
        width = max((len(row.name) for row in free), default=0)
        lines = [f"{self.model}: {len(self.mixed)} of {len(free)} replaceable attention modules have a mixer"]
        lines += [_line(row, width) for row in free]
        lines += [f"not replaceable: {count} x {reason}" for reason, count in _tally(self.refused).items()]
        if self.slower:
            lines.append(self.warning)
        return "\n".join(lines)


def _line(row: Row, width: int) -> str:
    tokens = "" if row.tokens is None else f"{row.tokens:>7} tokens"
    gain = "" if row.speedup is None else f"{row.speedup:7.2f} x fewer products"
    options = ", ".join(f"{key}={value}" for key, value in row.options.items())
    weights = f" [{row.weights}]" if row.weights else ""
    mixer = f"{row.own} (its own)" if row.mixer is None else f"{row.mixer}({options}){weights}"
    return f"  {row.name:<{width}}  {row.dim:>5} = {row.heads} x {row.head_dim:<4}{tokens}{gain}  {mixer}".rstrip()


def _tally(rows: Sequence[Row]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.reason or ""] = counts.get(row.reason or "", 0) + 1
    return counts
