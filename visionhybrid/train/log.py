"""What a run leaves to read: log.jsonl, metrics.csv, TensorBoard, a progress line.

A run that is resumed at step n first drops the lines after n that the killed process had written, so the files read as if
nothing had happened.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from visionhybrid.train.state import naming, write_text

PLAIN_EVERY = 15.0  # seconds between lines where there is no terminal


class Log:
    """The writer of one process. Only the main one has files; only `progress` prints."""

    def __init__(self, out: Path, *, main: bool, progress: bool, tensorboard: bool) -> None:
        self.path, self.csv_path = out / "log.jsonl", out / "metrics.csv"
        self.main, self.progress = main, progress and main
        self.console = Console(stderr=True)
        self.board: Any = None
        self.tensorboard = tensorboard and main
        self._bar: tuple[Progress, Any] | None = None
        self._last_line = 0.0

    def open(self, step: int) -> None:
        """Continue after `step`."""
        if not self.main:
            return
        rows = [row for row in read(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._write_csv(rows)
        if self.tensorboard and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
        elif self.tensorboard:
            self.note(step, 'no TensorBoard files: pip install "visionhybrid[train]"')

    def rewind(self, step: int) -> None:
        """Drop the numbers after `step`, which did not lead anywhere; what a person was told stays."""
        if self.main:
            rows = [row for row in read(self.path) if row["step"] <= step or row["kind"] == "note"]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
            self._write_csv(rows)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def scalars(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of `kind` "train" or "validation"."""
        if not self.main:
            return
        self._append({"kind": kind, "step": step, **values})
        if kind == "validation":
            self._write_csv(list(read(self.path)))
        if self.board is not None:
            with naming(self.path.parent / "tensorboard"):
                for name, value in values.items():
                    self.board.add_scalar(f"{kind}/{name}", value, step)
        if kind == "validation":
            self.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def note(self, step: int, text: str) -> None:
        """Something a person should know."""
        if self.main:
            self._append({"kind": "note", "step": step, "text": text})
            self.say(text)

    def say(self, text: str) -> None:
        if self.progress:
            self.console.print(text, highlight=False, markup=False)

    def _append(self, row: dict[str, Any]) -> None:
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _write_csv(self, rows: list[dict[str, Any]]) -> None:
        rows = [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == "validation"]
        fields = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.csv_path, text.getvalue())

    @contextmanager
    def bar(self, total: int, step: int) -> Iterator[None]:
        """A line with rate and remaining time while the body runs; plain lines where there is no terminal."""
        if not (self.progress and self.console.is_terminal):
            self._start, self._first, self._total = time.monotonic(), step, total
            yield
            return
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console) as progress:
            self._bar = progress, progress.add_task("train", total=total, completed=step, text="")
            yield
        self._bar = None

    def validating(self, done: float) -> None:
        """Which part of a validation, from 0 to 1, is done."""
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, text=f"validating, {done:.0%}")

    def advance(self, step: int, loss: float, rate: float) -> None:
        text = f"loss {loss:.4g}  lr {rate:.3g}"
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=step, text=text)
        elif self.progress and time.monotonic() - self._last_line > PLAIN_EVERY:
            self._last_line = time.monotonic()
            each = (self._last_line - self._start) / max(1, step - self._first)
            self.say(f"step {step}/{self._total}  {text}  {clock(each * (self._total - step))} left")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; one cut short by a kill ends it."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def clock(seconds: float) -> str:
    """12:05 or 1:02:05."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
