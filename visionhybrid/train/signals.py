"""Ctrl-C and SIGTERM in the middle of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal, after a checkpoint was written."""


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted, so that the step under way can be finished and saved; a second one acts at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    former = {}

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, former[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
