"""Cases for the tests of the bench."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from visionhybrid.bench import harness

CPU = torch.device("cpu")
MIB = 2**20


def runner(name: str, fn: Callable[[], Tensor], **options: object) -> harness.Runner:
    return harness.Runner(name=name, run=fn, **options)


def case(*runners: harness.Runner, **options: object) -> harness.Case:
    def build(device: torch.device) -> Sequence[harness.Runner]:
        return runners

    return harness.Case(name="toy", title="a toy", build=build, **{"rounds": 3, **options})


def fill(mib: int) -> Callable[[], Tensor]:
    """A run that holds `2 * mib` MiB at its peak: an input and a result of the same size."""

    def run() -> Tensor:
        x = torch.ones(mib * MIB // 4)
        return (x * 2).sum()

    return run
