"""A bar on the terminal's error stream for work that takes more than a moment; silent where nobody watches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PATIENCE = 1.0  # seconds before a bar appears


@contextmanager
def bar(enabled: bool, text: str) -> Iterator[Callable[..., None]]:
    """Gives `update(fraction, text=None)`; fraction in [0, 1] of the whole. Shows elapsed and remaining time."""
    console = Console(stderr=True)
    if not (enabled and (console.is_terminal or console.is_jupyter)):
        yield lambda fraction, text=None: None
        return
    # No markup: file names may hold brackets.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
    task = progress.add_task(text, total=1.0)
    # A timer, not a check in `update`: the first tile may itself take a minute.
    timer = threading.Timer(_PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda fraction, text=None: progress.update(task, completed=fraction, description=text)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
