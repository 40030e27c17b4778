"""The demo's report: one HTML file that needs nothing but itself, and report.json with every number in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from html import escape
from typing import Any

from torch import Tensor

from visionhybrid.demo.generation import Generation
from visionhybrid.demo.measure import Digits, Photo, Photographs
from visionhybrid.demo.page import digits, generation, photographs
from visionhybrid.demo.page.parts import CC_BY, NAMES, clock
from visionhybrid.demo.style import CSS
from visionhybrid.demo.training import Training

__all__ = ["CC_BY", "NAMES", "Duration", "Report", "Target", "clock", "html", "numbers"]

_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise beside its measurement. `met` is None for a quick run, which promises nothing."""

    name: str
    value: float
    limit: float
    unit: str
    met: bool | None


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds that something took, beside what it should take on two cores that do nothing else."""

    name: str
    seconds: float
    limit: float
    within: bool | None  # None for a quick run, and where only a part of it was run


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run of the demo found; a part that was not run is None."""

    digits: Digits | None
    photographs: Photographs | None
    generation: Generation | None
    targets: list[Target]
    durations: list[Duration]
    quick: bool
    date: str
    command: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def missed(self) -> list[Target]:
        return [target for target in self.targets if target.met is False]

    @property
    def seconds(self) -> float:
        """Of everything: the last duration is the sum."""
        return self.durations[-1].seconds

    @property
    def trainings(self) -> list[Training]:
        """Every network's, in the order of the page."""
        found = [part.training for part in (self.digits, self.photographs) if part is not None]
        if self.generation is not None:
            found += [drawn.training for drawn in (self.generation.teacher, *self.generation.students)]
        return found


def numbers(value: Any) -> Any:
    """`value` as JSON-able data: pictures left out, what is not finite as null."""
    if isinstance(value, Tensor):
        return None
    if is_dataclass(value):
        found = {f.name: numbers(getattr(value, f.name)) for f in fields(value) if f.repr}
        if isinstance(value, Photo | Photographs):
            found["gain"] = value.gain
        return found
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON knows no nan
    return value


def html(report: Report) -> str:
    """The whole page."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>visionhybrid demo: {_verdict(report)[0]}</title>",
            f"<style>{CSS}</style>\n</head>\n<body>",
            *_head(report),
            "<main>",
            *(digits.section(report.digits) if report.digits else ()),
            *(photographs.section(report.photographs) if report.photographs else ()),
            *(generation.section(report.generation) if report.generation else ()),
            *_again(report),
            *_credits(report),
            "</main>",
            f"<footer>Written by <code>{escape(report.command)}</code> on {escape(report.date)}. Every number on this page was "
            "measured in that run; <code>report.json</code> beside it holds all of them.</footer>",
            "</body>\n</html>\n",
        ]
    )


def _verdict(report: Report) -> tuple[str, str]:
    if report.quick:
        return "quick run, nothing judged", "unjudged"
    if report.missed:
        return f"missed: {', '.join(target.name for target in report.missed)}", "missed"
    return "all targets met", "met"


def _head(report: Report) -> Iterator[str]:
    text, style = _verdict(report)
    yield "<header>"
    yield f'<span class="badge {style}">{escape(text[0].upper() + text[1:])}</span>'
    yield f"<h1>{_title(len(report.trainings))}, trained just now</h1>"
    yield f'<p class="lead">{" ".join(_told(report))}</p>'
    yield '<div class="tiles">'
    for target in report.targets:
        value = f"{target.value:+.2f}" if target.unit == "dB" else f"{target.value:.1f}"
        goal = f"target \N{GREATER-THAN OR EQUAL TO} {target.limit:g} {target.unit}"
        yield _tile(target.name, value, target.unit, goal, target.met)
    for duration in report.durations:
        yield _tile(
            duration.name,
            clock(duration.seconds),
            "",
            f"goal < {clock(duration.limit)} on 2 quiet cores",
            duration.within,
            ("within", "over"),
        )
    yield "</div></header>"


def _title(count: int) -> str:
    return f"{_NUMBERS[count] if count < len(_NUMBERS) else count} hybrid network{'s' if count > 1 else ''}"


def _told(report: Report) -> Iterator[str]:
    if report.digits:
        yield "A small Next-ViT learned to read handwritten digits."
    if report.photographs:
        yield "A small HAT learned to double the size of photographs."
    if report.generation:
        yield (
            "A small diffusion transformer learned to write digits that the first one reads, and two copies of it learned to do "
            "so with linear and with sparse attention."
        )
    yield (
        f"Everything began from random weights on this machine and took {clock(report.seconds)} in all, with images that come with "
        "Python packages."
    )


def _tile(
    name: str,
    value: str,
    unit: str,
    note: str,
    met: bool | None,
    words: tuple[str, str] = ("met", "missed"),
) -> str:
    style = {True: "met", False: "missed", None: "unjudged"}[met]
    word = {True: f" &middot; {words[0]}", False: f" &middot; {words[1]}", None: ""}[met]
    small = f"<small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}{small}</b>'
        f'<span class="badge {style}">{escape(note)}{word}</span></div>'
    )


def _again(report: Report) -> Iterator[str]:
    facts = report.machine
    yield "<h2>Do it again</h2>"
    commands = [report.command, *(f"{t.command} --out runs/{t.recipe}" for t in report.trainings)]
    if report.photographs:
        commands.append(
            "visionhybrid restore photo.jpg large.png --model runs/hat_samples_x2/model.safetensors"
        )
    if report.generation:
        commands.append("visionhybrid generate runs/hybrid_dit_digits digits/ --each 20 --guidance 1.5")
    yield f"<pre><code>{escape(chr(10).join(commands))}</code></pre>"
    rows = {
        "Processor": f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads used",
        "Memory": f"{facts['memory_gib']} GiB",
        "System": f"{facts['system']}, Python {facts['python']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "Time": f"{clock(report.seconds)} in all; training "
        + ", ".join(f"{t.recipe} {clock(t.seconds)}" for t in report.trainings),
    }
    if "load_1min" in facts:
        rows["Load"] = f"{facts['load_1min']} other processes on average in the minute before the demo"
    yield "<div class='card scroll'><table><tbody>"
    for name, text in rows.items():
        yield f"<tr><th scope='row'>{name}</th><td>{escape(str(text))}</td></tr>"
    yield "</tbody></table></div>"
    for training in report.trainings:
        yield f"<details><summary>Recipe <code>{escape(training.recipe)}</code>, every setting</summary><pre><code>"
        yield escape("\n".join(f"{key} = {value}" for key, value in _flat(training.config)))
        yield "</code></pre></details>"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _credits(report: Report) -> Iterator[str]:
    yield "<h2>Credits</h2>"
    papers = []
    if report.digits:
        papers.append("Next-ViT: arXiv:2207.05501.")
    if report.photographs:
        yield photographs.credits(report.photographs)
        papers.append("HAT: arXiv:2309.05239.")
    if report.generation:
        papers.append(
            "DiT: arXiv:2212.09748. Flow matching: arXiv:2210.02747. Grafting: arXiv:2506.05340. LinFusion: arXiv:2409.02097. "
            "SLA: arXiv:2509.24006."
        )
    if report.digits:
        papers.insert(
            0,
            "Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository "
            "(CC BY 4.0), as packed in scikit-learn.",
        )
    yield f"<p class='soft'>{escape(' '.join(papers))}</p>"
