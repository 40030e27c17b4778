"""Errors that a loop may count and survive."""

from __future__ import annotations

from pathlib import Path


class CorruptSample(ValueError):  # noqa: N818 - the outcome of a sample, not a mistake in the program
    """One sample cannot be used: its file is unreadable, or contradicts its partner.

    Training skips and counts these; everything else is a mistake in the set-up and stops the run. Attributes: `path`,
    `reason` (one line, without the path). Survives the trip from a DataLoader worker to the main process.
    """

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)
        self.path = Path(path)
        self.reason = " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
