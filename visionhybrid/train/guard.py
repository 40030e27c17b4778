"""When a loss may be used, and when the run has gone astray."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from visionhybrid.train.config import Guard


class DivergedError(RuntimeError):
    """Training went astray more often than the guard allows; the message is one line."""


@dataclass
class Watch:
    """Running mean of the loss and counts of what was left out; saved with every checkpoint."""

    mean: float = 0.0
    seen: int = 0
    bad: int = 0  # skipped updates in a row, now
    skipped: int = 0  # skipped updates in all
    nonfinite: int = 0  # of these, because of NaN or infinity
    overflow: int = 0  # fp16 steps that the loss scaler left out; these are normal
    corrupt: int = 0  # unreadable samples
    rollbacks: int = 0

    def verdict(self, guard: Guard, loss: float, norm: float) -> str | None:
        """Why this loss and gradient norm must not be used, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        if guard.spike and self.seen >= guard.warm and loss > guard.spike * abs(self.mean):
            return f"loss {loss:.4g} is above {guard.spike:g} times its mean {self.mean:.4g}"
        return None

    def good(self, loss: float) -> None:
        self.seen += 1
        # a plain mean at first, then one over the last hundred or so
        self.mean += (loss - self.mean) / min(self.seen, 100)
        self.bad = 0

    def skip(self, loss: float, norm: float) -> None:
        self.bad += 1
        self.skipped += 1
        self.nonfinite += not (math.isfinite(loss) and math.isfinite(norm))

    def state(self) -> dict[str, float | int]:
        return dataclasses.asdict(self)
