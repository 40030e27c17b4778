"""The main jobs in minutes on two cores: train, measure, show. `visionhybrid demo` calls `run`.

    report = visionhybrid.demo.run(Path("demo"))  # demo/report.html, demo/report.json, and the run directories

Everything is trained and measured in that call, on images that come with scikit-learn and scikit-image. A target that the
run does not reach is said in the report and raised as `TargetMissedError`, so that the command fails.
"""

from __future__ import annotations

import difflib
import json
import shlex
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from visionhybrid.bench import machine
from visionhybrid.demo import page
from visionhybrid.demo.generation import Generation, learn_generation
from visionhybrid.demo.measure import Digits, Photographs, learn_digits, learn_photographs
from visionhybrid.train.state import write_text

ACCURACY, GAIN = 97.0, 0.5  # percent of held-out digits; dB on Y over bicubic on held-out photographs
RECOGNISED, KEPT = 90.0, 95.0  # percent of the generator's digits; of its score, by a copy with another mixer
PARTS = {
    "digits": "Next-ViT learns handwritten digits (about half a minute on two quiet cores)",
    "photographs": "HAT learns to double photographs (about three minutes)",
    "generation": "HybridDiT learns to write digits, then to do so without softmax (about two minutes)",
}
# Seconds on two quiet cores: of the first two parts, and of all.
LEARNED, ALL = 360.0, 600.0
PACKAGES = (
    "visionhybrid",
    "torch",
    "timm",
    "diffusers",
    "accelerate",
    "scikit-learn",
    "scikit-image",
    "numpy",
    "pillow",
)


class TargetMissedError(ValueError):
    """The demo ran to its end and fell short; the message says of what, and where the report is."""


def run(
    out: str | Path,
    *,
    parts: Sequence[str] = (),
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
) -> Path:
    """Train the recipes of the demo, measure them on held-out images, write the report.

    Args:
        out: folder for report.html, report.json and the run directories (digits, photographs, generator, linfusion, sla). An
            earlier demo there is replaced; anything else is not touched.
        parts: some of "digits", "photographs", "generation"; empty: all. Generation is judged by the classifier of the
            digits, which is then trained as well.
        seed: of all trainings: initial weights, order and augmentation of the images, noise; and of the digits drawn.
        quick: a few steps and small pictures, seconds in all: shows that everything runs. Nothing is judged.
        progress: print what is happening, with the time left, and the results.
    Returns: the path of report.html.
    Raises:
        TargetMissedError: a target was not reached. The report is written first.
        ValueError: an unknown part; `out` holds something that is not an earlier demo.
        ImportError: scikit-learn or scikit-image is missing.
    """
    out, chosen = Path(out), _chosen(parts)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=not progress)
    facts = machine.facts(torch.device("cpu"))
    learn = {"digits": learn_digits, "photographs": learn_photographs, "generation": learn_generation}
    found, seconds = {}, {}
    for number, part in enumerate(chosen, 1):
        console.rule(f"[bold]{number} of {len(chosen)}[/]  {PARTS[part]}", align="left")
        start = time.perf_counter()
        found[part] = learn[part](out, seed=seed, quick=quick, progress=progress)
        seconds[part] = time.perf_counter() - start
    report = page.Report(
        digits=found.get("digits"),
        photographs=found.get("photographs"),
        generation=found.get("generation"),
        targets=targets(**found, quick=quick),
        durations=durations(seconds, quick=quick),
        quick=quick,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        command=_command(out, parts, seed, quick),
        machine=facts,
        versions=machine.versions(PACKAGES),
    )
    path = out / "report.html"
    write_text(out / "report.json", json.dumps(page.numbers(report), indent=1) + "\n")
    write_text(path, page.html(report))
    console.print(_table(report))
    if report.missed:
        raise TargetMissedError(
            "demo: "
            + "; ".join(
                f"{t.name} {t.value:.2f} {t.unit}, target {t.limit:g} {t.unit}" for t in report.missed
            )
            + f"; see {path}"
        )
    return path


def targets(
    digits: Digits | None = None,
    photographs: Photographs | None = None,
    generation: Generation | None = None,
    *,
    quick: bool,
) -> list[page.Target]:
    """What the demo promises of the parts that were run, beside what was measured."""

    def target(name: str, value: float, limit: float, unit: str) -> page.Target:
        # `>=` is false for a nan: a diverged run misses.
        return page.Target(
            name=name, value=value, limit=limit, unit=unit, met=None if quick else value >= limit
        )

    found = []
    if digits is not None:
        found.append(target("Digits read correctly", digits.accuracy, ACCURACY, "%"))
    if photographs is not None:
        found.append(target("HAT over bicubic", photographs.gain, GAIN, "dB"))
    if generation is not None:
        score = generation.teacher.sheet.scores.recognised
        found.append(target("Drawn digits recognised", score, RECOGNISED, "%"))
        found += [target(f"Kept with {page.NAMES[s.mixer]}", s.kept, KEPT, "%") for s in generation.students]
    return found


def durations(seconds: dict[str, float], *, quick: bool) -> list[page.Duration]:
    """What the parts took, beside what they should take; the last is the sum.

    A demo that takes longer does not fail: how long it takes is also a matter of what else the machine does.
    """

    def duration(name: str, parts: Sequence[str], limit: float) -> page.Duration:
        taken = sum(seconds[part] for part in parts if part in seconds)
        whole = all(part in seconds for part in parts)
        within = taken < limit if whole and not quick else None
        return page.Duration(name=name, seconds=taken, limit=limit, within=within)

    first = [duration("Reading and doubling", ("digits", "photographs"), LEARNED)]
    both = {"digits", "photographs"} <= seconds.keys()
    return [*(first if both else ()), duration("Time in all", tuple(PARTS), ALL)]


def _chosen(parts: Sequence[str]) -> list[str]:
    """In the order of `PARTS`, with what they need."""
    for part in parts:
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, 1, 0.0)[0]
            raise ValueError(f"demo: no part {part!r}; have {', '.join(PARTS)}; the nearest is {near!r}")
    wanted = set(parts or PARTS)
    if "generation" in wanted:
        wanted.add("digits")
    return [part for part in PARTS if part in wanted]


def _command(out: Path, parts: Sequence[str], seed: int, quick: bool) -> str:
    if quick:
        chosen = f"parts={list(parts)!r}, " if parts else ""
        call = f"from visionhybrid.demo import run; run({str(out)!r}, {chosen}seed={seed}, quick=True)"
        return shlex.join(["python", "-c", call])
    chosen = [word for part in parts for word in ("--part", part)]
    return shlex.join(["visionhybrid", "demo", "--out", str(out), *chosen, "--seed", str(seed)])


def _table(report: page.Report) -> Table:
    table = Table(title="visionhybrid demo", title_justify="left")
    table.add_column("measured on images kept out of training, and on images drawn")
    for name in ("value", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for target in report.targets:
        mark = {True: "[green]met", False: "[bold red]missed", None: "[dim]quick run"}[target.met]
        table.add_row(
            target.name, f"{target.value:.2f} {target.unit}", f">= {target.limit:g} {target.unit}", mark
        )
    for photo in report.photographs.photos if report.photographs else ():
        pair = f"{photo.bicubic_psnr:.2f} -> {photo.psnr:.2f} dB"
        table.add_row(f"  {photo.name}, PSNR on Y, bicubic -> HAT", pair, "", "")
    for duration in report.durations:
        mark = {True: "[green]within", False: "[yellow]over; for two quiet cores", None: ""}[duration.within]
        table.add_row(duration.name, page.clock(duration.seconds), f"< {page.clock(duration.limit)}", mark)
    return table
