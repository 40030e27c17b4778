"""Printing: tables on a terminal, plain aligned columns elsewhere, JSON on request."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import typer

from visionhybrid.cli.app import is_terminal


def as_json(value: Any) -> None:
    """`value` (dataclasses allowed) as indented JSON."""
    typer.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    return (
        dataclasses.asdict(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else str(value)
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
    """Rows under headings; columns named in `right` are aligned to the right."""
    text = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if is_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        made = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            made.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in text:
            made.add_row(*(Text(cell) for cell in row))
        Console().print(made)
        return
    widths = [max(len(line[i]) for line in [list(columns), *text]) for i in range(len(columns))]
    for line in [list(columns), *text]:
        cells = [
            c.rjust(w) if n in right else c.ljust(w) for c, w, n in zip(line, widths, columns, strict=True)
        ]
        typer.echo("  ".join(cells).rstrip())


def fields(pairs: Iterable[tuple[str, Any]]) -> None:
    """One `name  value` line for each pair whose value says something; a list makes several lines."""
    pairs = [(name, value) for name, value in pairs if value not in (None, "", (), [], {})]
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        for i, line in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            typer.secho(("" if i else name).ljust(width + 2), nl=False, bold=True)
            typer.echo(str(line))


def number(value: int) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,}"


def short(value: float) -> str:
    """Counts as papers write them: 31763368 -> "31.8M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def size(values: Sequence[int]) -> str:
    """(3, 224, 224) -> "3 x 224 x 224"."""
    return " x ".join(map(str, values))


def options(values: dict[str, Any]) -> list[str]:
    """`name = value`, one a line."""
    return [f"{name} = {json.dumps(value)}" for name, value in values.items()]
