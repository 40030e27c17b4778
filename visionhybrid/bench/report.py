"""A run of the bench as JSON; and that JSON as a table and a plot. Everything shown is read from the record."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from visionhybrid.bench import machine
from visionhybrid.bench.floor import Peaks
from visionhybrid.bench.harness import Measured, Result, peer

PACKAGES = ("visionhybrid", "torch", "torchvision", "timm", "spandrel", "diffusers", "triton", "numpy")
Record = Mapping[str, Any]


def record(
    suite: str,
    results: Sequence[Result],
    *,
    facts: Mapping[str, Any],
    command: str,
    quick: bool,
    peaks: Peaks | None,
    not_measured: Sequence[str] = (),
    tables: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """All that was measured, raw samples included, with where (`facts`, taken before the run) and by what.

    `not_measured`: what the suite promises on another device than this. `tables`: what is no comparison with a peer, each with
    `title`, `columns` and `rows` of text.
    """
    return {
        "suite": suite,
        "quick": quick,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": dict(facts),
        "versions": machine.versions(PACKAGES),
        "peaks": None if peaks is None else asdict(peaks),
        "cases": [
            {
                "name": result.name,
                "title": result.title,
                "family": result.family,
                "length": result.length,
                "operations": result.operations,
                "runners": [_row(row, result.peer) for row in result.runners],
                "verdicts": [asdict(verdict) for verdict in result.verdicts],
            }
            for result in results
        ],
        "not_measured": list(not_measured),
        "tables": [dict(table) for table in tables],
    }


def _row(row: Measured, base: Measured) -> dict[str, Any]:
    pairs = row.ratios(base)
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else (pairs[0],) * 3
    return {
        **asdict(row),
        "time": row.time,
        "ratio": row.ratio(base),
        # Quartiles of the ratios within each round: how steady the ratio was while the machine's load changed.
        "ratio_quartiles": [low, high],
        "memory": row.memory,
        "memory_ratio": row.memory / base.memory,
    }


def tables(data: Record) -> Group:
    """The record for a terminal: one table a case."""
    note = " (quick: small sizes, nothing is judged)" if data["quick"] else ""
    head = [Text(f"visionhybrid.bench {data['suite']}{note}", style="bold")]
    if busy(data):
        head.append(Text(busy(data), style="yellow"))
    foot = [Text(f"not measured: {what}", style="dim") for what in data.get("not_measured", ())]
    plain = [_plain_table(family, *lengths(cases)) for family, cases in families(data).items()]
    plain += [_plain_table(each["title"], each["columns"], each["rows"]) for each in data.get("tables", ())]
    return Group(*head, *map(_table, data["cases"]), *plain, *foot)


def families(data: Record) -> dict[str, list[Record]]:
    """The cases that differ in length alone, by family, shortest first; families of one are left out."""
    found: dict[str, list[Record]] = {}
    for case in data["cases"]:
        if case.get("family"):  # records of before there were families have none
            found.setdefault(case["family"], []).append(case)
    return {name: sorted(cases, key=lambda c: c["length"]) for name, cases in found.items() if len(cases) > 1}


def lengths(cases: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Time and peak memory of every runner against length: headings and rows."""
    names = list(dict.fromkeys(row["name"] for case in cases for row in case["runners"]))
    rows = []
    for case in cases:
        by_name = {row["name"]: row for row in case["runners"]}
        cells = [
            f"{seconds(row['time'])}, {mebibytes(row['memory'])}" if row else ""
            for row in map(by_name.get, names)
        ]
        rows.append([f"{case['length']:,}", *cells])
    return ["length", *names], rows


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    view = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        view.add_column(column, justify="right")
    for row in rows:
        view.add_row(*row)
    return view


def busy(data: Record) -> str:
    """A warning if something else was running when the run began; with two threads each, times are then mostly chance."""
    facts = data["machine"]
    if "busy" in facts:
        used, of = facts["busy"], "busy with something else"
    else:  # older records: the load also remembers what ended a minute ago
        used, of = facts.get("load_1min", 0.0), "loaded"
    quiet = used <= 0.25 * facts["cores"]
    return (
        "" if quiet else f"The machine was not quiet: {used} of {facts['cores']} cores {of} before the run."
    )


def _table(case: Record) -> Table:
    view = Table(
        title=f"\n{case['title']}", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    view.add_column("")
    for name in ("time", "x peer", "target", "x floor", "memory", "x peer", "target"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in case["runners"]:
        view.add_row(
            row["name"],
            seconds(row["time"]),
            f"{row['ratio']:.2f}",
            mark(case, row["name"], "time"),
            f"{row['time'] / row['floor']:.1f}" if row["floor"] else "",
            mebibytes(row["memory"]),
            f"{row['memory_ratio']:.2f}",
            mark(case, row["name"], "memory"),
        )
    return view


def mark(case: Record, runner: str, what: str) -> Text:
    """The target of a runner and whether it was met; empty where there is none."""
    for verdict in case["verdicts"]:
        if (verdict["runner"], verdict["what"]) == (runner, what):
            word, style = {True: (" met", "green"), False: (" missed", "bold red"), None: ("", "dim")}[
                verdict["met"]
            ]
            return Text(f"<= {verdict['limit']:.2f}{word}", style=style)
    return Text("")


def seconds(value: float) -> str:
    """1.23 s or 45.6 ms."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def mebibytes(value: float) -> str:
    """Bytes in MiB, to the nearest."""
    return f"{value / 2**20:.0f} MiB"


def plot(data: Record, path: Path) -> Path:
    """Bars of time and memory against the peer, targets as ticks, as a picture at `path` (written aside, then renamed)."""
    cases = data["cases"]
    rows = sum(len(case["runners"]) for case in cases)
    figure = canvas(11, 1.2 + 0.42 * (rows + 1.6 * len(cases)))
    for axis, what, key, show in zip(
        figure.subplots(1, 2, sharey=True),
        ("time", "memory"),
        ("ratio", "memory_ratio"),
        (seconds, mebibytes),
        strict=True,
    ):
        ticks, labels, y = [], [], 0.0
        for case in cases:
            limits = {v["runner"]: v for v in case["verdicts"] if v["what"] == what}
            if what == "time":  # the title stands once, over the left half
                axis.text(0, y, case["title"], fontsize=9, fontweight="bold", va="center")
            for i, row in enumerate(case["runners"]):
                y += 1
                mine = row["name"].startswith("visionhybrid")
                axis.barh(y, row[key], height=0.72, color="#2f6fde" if mine else "#b8bec8")
                limit = limits.get(row["name"])
                if limit is not None:
                    axis.plot([limit["limit"]] * 2, [y - 0.45, y + 0.45], color="#d1372c", lw=2)
                axis.text(
                    row[key] + 0.015,
                    y,
                    f"{row[key]:.2f}  ({show(row[what])})",
                    va="center",
                    fontsize=8,
                    color="#333",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )
                ticks.append(y)
                labels.append(row["name"] if i else f"{row['name']} (peer)")
            y += 1.6
        axis.axvline(1, color="#555", lw=0.8, ls=":")
        axis.set_yticks(ticks, labels, fontsize=8.5)
        axis.set_xlim(0, 1.32 * max(row[key] for case in cases for row in case["runners"]))
        axis.set_xlabel(
            f"{'time' if what == 'time' else 'peak memory'} / peer's (less is better; red: target)",
            fontsize=9,
        )
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.axes[0].invert_yaxis()
    return save(figure, path)


def plot_lengths(data: Record, path: Path) -> Path | None:
    """Time and peak memory against length, a line a runner; None where no family has several lengths."""
    groups = families(data)
    if not groups:
        return None
    figure = canvas(10, 3.4 * len(groups))
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for (family, cases), pair in zip(groups.items(), axes, strict=True):
        names = lengths(cases)[0][1:]
        for axis, what, unit in zip(pair, ("time", "memory"), (1, 2**20), strict=True):
            for name in names:
                points = [
                    (case["length"], row[what] / unit)
                    for case in cases
                    for row in case["runners"]
                    if row["name"] == name
                ]
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_title(family, fontsize=9)
            axis.set_xlabel("tokens")
            axis.set_ylabel("seconds" if what == "time" else "peak MiB")
            axis.grid(alpha=0.3)
        pair[0].legend(fontsize=8)
    return save(figure, path)


def canvas(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, to be drawn into a file."""
    peer("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> Path:
    """Written aside, then renamed."""
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=130, format="png")
    os.replace(aside, path)
    return path
