"""The command `python -m visionhybrid.bench SUITE`: measure, print, and write JSON, a plot and a page."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from visionhybrid.bench import SUITES, machine, report
from visionhybrid.bench.apart import measure_apart
from visionhybrid.bench.floor import measure_peaks
from visionhybrid.bench.harness import measure
from visionhybrid.bench.page import markdown
from visionhybrid.train.state import write_text

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="This machine's figures beside the peers': interleaved runs, medians, peak memory, distance to the floor.",
)


def run(
    suite: str,
    *,
    quick: bool = False,
    only: str | None = None,
    rounds: int | None = None,
    out: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure one suite, print its table, write `SUITE.json`, `SUITE.png` and `SUITE.md` into `out` if given.

    Returns: the record, as in the JSON file.
    Raises: ValueError: unknown suite, or outputs that disagree with the peer's.
    """
    if suite not in SUITES:
        raise ValueError(f"bench: no suite {suite!r}; have {', '.join(SUITES)}")
    torch.set_num_threads(threads or machine.cores())
    if rounds is not None and rounds < 1:
        raise ValueError(f"bench: --rounds must be at least 1, got {rounds}")
    place = torch.device(device)
    module = import_module(SUITES[suite][0])
    elsewhere = getattr(module, "cuda_cases", None)
    build = elsewhere if elsewhere and place.type == "cuda" else module.cases
    cases = build(quick=quick, only=only)
    if not cases:
        raise ValueError(f"bench {suite}: nothing of {only} is measured on {device}")
    if rounds is not None:
        cases = [replace(case, rounds=rounds) for case in cases]
    facts = machine.facts(place)
    with warnings.catch_warnings(), _bar(len(cases), progress) as say:
        # The peers' own warnings are not ours to fix.
        warnings.simplefilter("ignore")
        say("ceilings of this machine", 0)
        peaks = measure_peaks(place, seconds=0.2 if quick else 1.5)
        results = []
        for i, case in enumerate(cases):

            def tell(text: str, done: float, i: int = i, name: str = case.name) -> None:
                say(f"{name}: {text}", i + done)

            run_case = measure_apart if case.apart else measure
            results.append(run_case(case, device=place, peaks=peaks, report=tell))
        series = getattr(module, "series", None) if place.type == "cpu" else None
        say("over ranges", len(cases))
        ranges = series(quick=quick, only=only) if series else []
    words = " ".join(sys.argv[1:]) if Path(sys.argv[0]).parent.name == "bench" else suite
    data = report.record(
        suite,
        results,
        facts=facts,
        command=f"python -m visionhybrid.bench {words}",
        quick=quick,
        peaks=peaks,
        not_measured=[f"{case.title} (a CUDA device: --device cuda)" for case in elsewhere(only=only)]
        if elsewhere and build is not elsewhere
        else (),
        tables=[each.table for each in ranges],
    )
    if out is not None:
        _write(out, suite, data, ranges)
    return data


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on the error stream; gives what moves it: what is done now, and how many cases are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, description=text, completed=done)
        bar.update(task, description="done")


def _write(out: Path, suite: str, data: dict[str, Any], ranges: Sequence[Any]) -> None:
    """The record as JSON, page and plots, and a plot of each range."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{suite}.json", json.dumps(data, indent=1) + "\n")
    write_text(out / f"{suite}.md", markdown([data]))
    report.plot(data, out / f"{suite}.png")
    report.plot_lengths(data, out / f"{suite}_length.png")
    for each in ranges:
        each.draw(out / f"{suite}_{each.name}.png")


def _suite_command(suite: str, purpose: str) -> None:
    def command(
        quick: Annotated[
            bool, typer.Option(help="Small sizes, two rounds: does it run? Judges nothing.")
        ] = False,
        only: Annotated[
            str | None, typer.Option(help="One part of the suite, such as hat or nextvit.")
        ] = None,
        train: Annotated[bool, typer.Option("--train", help="The training steps; as --only train.")] = False,
        rounds: Annotated[
            int | None, typer.Option(help="Interleaved runs of each; default: per case.")
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder for the JSON, the plot and the page.")] = Path(
            "bench"
        ),
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        threads: Annotated[
            int | None, typer.Option(help="Threads of PyTorch; default: the cores it may use.")
        ] = None,
    ) -> None:
        data = run(
            suite,
            quick=quick,
            only="train" if train else only,
            rounds=rounds,
            out=out,
            device=device,
            threads=threads,
        )
        # A log file has no width of its own, and the tables need one.
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(report.tables(data))
        console.print(f"{out / suite}.json, .md, .png")

    app.command(suite, help=f"Compare {purpose}.")(command)


for _suite, (_, _purpose) in SUITES.items():
    _suite_command(_suite, _purpose)


@app.command()
def page(
    records: Annotated[list[Path], typer.Argument(help="JSON records of earlier runs.")],
    to: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/benchmarks.md"),
) -> None:
    """Render records as one Markdown page."""
    write_text(to, markdown([json.loads(path.read_text(encoding="utf-8")) for path in records]))
    Console().print(str(to))


def main() -> None:
    """Entry point: what is wrong leaves as one line."""
    try:
        app()
    except (ValueError, ModuleNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
