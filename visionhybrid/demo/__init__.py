"""The main job in minutes on two cores: train, measure, show. `visionhybrid demo` calls `run`.

    report = visionhybrid.demo.run(Path("demo"))  # demo/report.html, demo/report.json, and the two run directories

Everything is trained and measured in that call, on images that come with scikit-learn and scikit-image. A target that the
run does not reach is said in the report and raised as `TargetMissedError`, so that the command fails.
"""

from __future__ import annotations

import json
import shlex
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from visionhybrid.bench import machine
from visionhybrid.demo import page
from visionhybrid.demo.measure import Digits, Photographs, learn_digits, learn_photographs
from visionhybrid.train.state import write_text

ACCURACY, GAIN = 97.0, 0.5  # percent of held-out digits; dB on Y over bicubic on held-out photographs
PACKAGES = ("visionhybrid", "torch", "timm", "accelerate", "scikit-learn", "scikit-image", "numpy", "pillow")


class TargetMissedError(ValueError):
    """The demo ran to its end and fell short; the message says of what, and where the report is."""


def run(out: str | Path, *, seed: int = 0, quick: bool = False, progress: bool = True) -> Path:
    """Train the two recipes of the demo, measure them on held-out images, write the report.

    Args:
        out: folder for report.html, report.json, digits/ and photographs/ (run directories). An earlier demo there is
            replaced; anything else is not touched.
        seed: of both trainings: initial weights, order and augmentation of the images.
        quick: a few steps and small pictures, seconds in all: shows that everything runs. Nothing is judged.
        progress: print what is happening, with the time left, and the results.
    Returns: the path of report.html.
    Raises:
        TargetMissedError: a target was not reached. The report is written first.
        ValueError: `out` holds something that is not an earlier demo.
        ImportError: scikit-learn or scikit-image is missing.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, quiet=not progress)
    start = time.perf_counter()
    facts = machine.facts(torch.device("cpu"))
    console.rule(
        "[bold]1 of 2[/]  Next-ViT learns handwritten digits (about half a minute on two quiet cores)",
        align="left",
    )
    digits = learn_digits(out, seed=seed, quick=quick, progress=progress)
    console.rule("[bold]2 of 2[/]  HAT learns to double photographs (about three minutes)", align="left")
    photographs = learn_photographs(out, seed=seed, quick=quick, progress=progress)
    report = page.Report(
        digits=digits,
        photographs=photographs,
        targets=targets(digits, photographs, quick=quick),
        seconds=time.perf_counter() - start,
        quick=quick,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        command=_command(out, seed, quick),
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


def targets(digits: Digits, photographs: Photographs, *, quick: bool) -> list[page.Target]:
    """What the demo promises, beside what was measured."""

    def target(name: str, value: float, limit: float, unit: str) -> page.Target:
        # `>=` is false for a nan: a diverged run misses.
        return page.Target(
            name=name, value=value, limit=limit, unit=unit, met=None if quick else value >= limit
        )

    return [
        target("Digits read correctly", digits.accuracy, ACCURACY, "%"),
        target("HAT over bicubic", photographs.gain, GAIN, "dB"),
    ]


def _command(out: Path, seed: int, quick: bool) -> str:
    if quick:
        call = f"from visionhybrid.demo import run; run({str(out)!r}, seed={seed}, quick=True)"
        return shlex.join(["python", "-c", call])
    return shlex.join(["visionhybrid", "demo", "--out", str(out), "--seed", str(seed)])


def _table(report: page.Report) -> Table:
    table = Table(title="visionhybrid demo", title_justify="left")
    table.add_column("measured on images kept out of training")
    for name in ("value", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for target in report.targets:
        mark = {True: "[green]met", False: "[bold red]missed", None: "[dim]quick run"}[target.met]
        table.add_row(
            target.name, f"{target.value:.2f} {target.unit}", f">= {target.limit:g} {target.unit}", mark
        )
    for photo in report.photographs.photos:
        pair = f"{photo.bicubic_psnr:.2f} -> {photo.psnr:.2f} dB"
        table.add_row(f"  {photo.name}, PSNR on Y, bicubic -> HAT", pair, "", "")
    table.add_row("Time in all", page.clock(report.seconds), "< 6:00", "")
    return table
