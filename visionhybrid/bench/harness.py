"""Cases, and how they are measured: agreement first, then time in turns, then memory.

A `Case` builds its `Runner`s in one process: the first is the peer, the base of every ratio. Before anything is timed each
runner's output is compared with the peer's, so that no ratio is ever between two different computations. Times are taken
in turns (A B C, A B C, ...), and a ratio is the median of the ratios within each turn: whatever else loads the machine for
a while meets all alike and moves few of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from visionhybrid.bench import memory
from visionhybrid.bench.floor import Peaks, name_of, operations, stopwatch

MEMORY_REPEATS = 3
# Seconds of a call beyond which its memory is taken once: long calls grow far beyond the noise of the resident set.
LONG = 0.5


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One implementation, ready to run.

    `run` is what is timed; `output` what is compared with the peer's (by default what `run` returns); `holds` the modules,
    optimisers and tensors that must be in memory before the call; `tolerance` the relative L2 error allowed against the
    peer; `dtype` of the matrix products, for the floor.
    """

    name: str
    run: Callable[[], Any]
    output: Callable[[], Tensor] | None = None
    holds: tuple[object, ...] = ()
    tolerance: float = 1e-4
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is promised: `runner` needs at most `limit` times the peer's `what` ("time" or "memory")."""

    runner: str
    what: str
    limit: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. `build(device)` returns the peer first; `judged` is false where the size is not the targets'; `apart`: to be
    measured in a process of its own. `minutes`: a call takes minutes, so every one counts: nothing is run for warmth, rounds are
    weighed while they are timed, and operations are not counted.

    Cases of one `family` differ in `length` alone: the report also shows them side by side.
    """

    name: str
    title: str
    build: Callable[[torch.device], Sequence[Runner]]
    targets: tuple[Target, ...] = ()
    rounds: int = 7
    judged: bool = True
    apart: bool = False
    minutes: bool = False
    family: str = ""
    length: int = 0


@dataclass(frozen=True, kw_only=True)
class Series:
    """Figures of our own over some range, beside no peer: a table (`title`, `columns`, `rows` of text) and a picture."""

    name: str
    table: dict[str, Any]
    draw: Callable[[Path], None]


@dataclass(kw_only=True)
class Measured:
    """One runner's figures: seconds of every round, bytes. `resident` is the judge's number where the device has one."""

    name: str
    dtype: str
    error: float
    seconds: list[float] = field(default_factory=list)
    held: int = 0
    growth: list[int] = field(default_factory=list)
    live: int = 0
    floor: float | None = None

    @property
    def time(self) -> float:
        return statistics.median(self.seconds)

    def ratios(self, base: Measured) -> list[float]:
        """Own time over that of `base`, round by round."""
        return [own / other for own, other in zip(self.seconds, base.seconds, strict=True)]

    def ratio(self, base: Measured) -> float:
        return statistics.median(self.ratios(base))

    @property
    def memory(self) -> int:
        """Bytes at the peak: what must be there before the call, and the growth during it."""
        return self.held + int(statistics.median(self.growth))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A target beside its measured value; `met` is None where the case ran at another size than the target's."""

    runner: str
    what: str
    limit: float
    value: float
    met: bool | None


@dataclass(kw_only=True)
class Result:
    """A case's figures, the peer first."""

    name: str
    title: str
    family: str
    length: int
    operations: int
    runners: list[Measured]
    verdicts: list[Verdict]

    @property
    def peer(self) -> Measured:
        return self.runners[0]


def peer(module: str, extra: str = "bench") -> ModuleType:
    """The module of a peer, imported now.

    Raises:
        ModuleNotFoundError: naming the extra that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ModuleNotFoundError(
            f"bench: {error.name} is not installed; pip install 'visionhybrid[{extra}]'", name=error.name
        ) from error


def measure(
    case: Case,
    *,
    device: torch.device,
    peaks: Peaks | None = None,
    report: Callable[[str, float], None] = lambda text, done: None,
) -> Result:
    """Build, compare, time and weigh one case.

    Args:
        report: called with what is happening and the part done, 0 to 1.
    Raises:
        ValueError: a runner's output is further from the peer's than its tolerance.
    """
    report("building", 0.0)
    runners = case.build(device)
    names = [runner.name for runner in runners]
    for target in case.targets:
        if target.runner not in names or target.what not in ("time", "memory"):
            raise ValueError(
                f"bench {case.name}: no runner or quantity for {target}; runners are {', '.join(names)}"
            )
    rows = _compare(case, runners)
    for turn in range(case.rounds):
        for runner, row in zip(runners, rows, strict=True):
            report(f"round {turn + 1} of {case.rounds}: {runner.name}", 0.1 + 0.6 * turn / case.rounds)
            _time(runner, row, device, weigh=case.minutes)
    for i, (runner, row) in enumerate(zip(runners, rows, strict=True)):
        report(f"memory: {runner.name}", 0.7 + 0.3 * i / len(runners))
        row.held = memory.held(runner.holds)
        if not case.minutes:
            _weigh(runner, row, device)
    count = 0 if case.minutes else operations(runners[0].run)
    if peaks is not None and count:
        for runner, row in zip(runners, rows, strict=True):
            row.floor = peaks.floor(count, row.held, runner.dtype)
    return Result(
        name=case.name,
        title=case.title,
        family=case.family,
        length=case.length,
        operations=count,
        runners=rows,
        verdicts=_judge(case, rows),
    )


def _compare(case: Case, runners: Sequence[Runner]) -> list[Measured]:
    """Rows with each runner's error against the peer; afterwards everything that is timed has run once."""
    rows: list[Measured] = []
    expected: Tensor | None = None
    for runner in runners:
        # Before any `run`: a training step would already have moved the weights.
        output = (runner.output or runner.run)().detach().double()
        if expected is None:
            expected = output
        if output.shape != expected.shape:
            raise ValueError(
                f"bench {case.name}: {runner.name} gives {tuple(output.shape)}, the peer {tuple(expected.shape)}"
            )
        error = float((output - expected).norm() / expected.norm())
        # `not <=` instead of `>`: a NaN must not pass.
        if not error <= runner.tolerance:
            raise ValueError(
                f"bench {case.name}: {runner.name} differs from {runners[0].name} by {error:.1e} "
                f"(relative L2), allowed {runner.tolerance:.1e}; nothing was timed"
            )
        rows.append(Measured(name=runner.name, dtype=name_of(runner.dtype), error=error))
        if runner.output is not None and not case.minutes:
            runner.run()
    return rows


def _time(runner: Runner, row: Measured, device: torch.device, *, weigh: bool) -> None:
    def run() -> None:
        row.seconds.append(stopwatch(runner.run, device))

    if weigh:
        row.growth.append(_growth(run, device))
    else:
        run()


def _weigh(runner: Runner, row: Measured, device: torch.device) -> None:
    row.live = memory.live(runner.run)
    for _ in range(1 if row.time > LONG else MEMORY_REPEATS):
        row.growth.append(_growth(runner.run, device, row.live))


def _growth(run: Callable[[], Any], device: torch.device, otherwise: int = 0) -> int:
    """Bytes at the peak of a call, by the judge of the device; `otherwise` where there is none."""
    growth = memory.device(run) if device.type == "cuda" else memory.resident(run)
    return otherwise if growth is None else growth


def _judge(case: Case, rows: Sequence[Measured]) -> list[Verdict]:
    by_name = {row.name: row for row in rows}
    verdicts = []
    for target in case.targets:
        row = by_name[target.runner]
        value = row.ratio(rows[0]) if target.what == "time" else row.memory / rows[0].memory
        verdicts.append(
            Verdict(
                runner=target.runner,
                what=target.what,
                limit=target.limit,
                value=value,
                met=value <= target.limit if case.judged else None,
            )
        )
    return verdicts
