"""What the loop asks of a task, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from torch import Tensor, nn

from visionhybrid.train.config import Config
from visionhybrid.train.sampler import Sample, TrainSet

Update = Callable[[float], object]  # is told which part of the work is done, from 0 to 1


def untold(done: float) -> None:
    """The `Update` of work that nobody watches."""


class Task(Protocol):
    """One way to train. Constructed as `Task(config)`, which finds the data or raises a one-line ValueError.

    A task with several networks (generator and discriminator) returns several parts; the loop gives each an optimiser and
    updates them in order, every step, with `loss(part, ...)`. The first part is the one that is averaged, validated and released.
    """

    train_set: TrainSet
    repeat: int  # passes over train_set that make one epoch
    metric: str  # the entry of validate() that says which checkpoint is best
    higher_is_better: bool
    notes: list[str]  # what a person should know; the loop logs and removes them
    released: str  # file or folder of the run directory that the weights are released as

    def parts(self) -> dict[str, nn.Module]: ...

    def collate(self, samples: list[Sample], seed: int) -> Sample:
        """Samples -> a batch; runs in a loading process, random decisions come from `seed`."""
        ...

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar, the mean over the batch, and further scalars to log."""
        ...

    def validate(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        limit: int | None = None,
        update: Update = untold,
    ) -> dict[str, float]:
        """Metrics over the held-out data, the same on every process; `limit`: so many batches or pictures only."""
        ...

    def samples(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write pictures for a person to look at. Called on one process; with sharded weights not at all."""
        ...

    def metadata(self) -> dict[str, Any]:
        """JSON-able facts that travel with the released weights (class names, ...)."""
        ...

    def release(self, model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
        """Write the first part, with its final weights, as users load it."""
        ...

    def open(self, path: str | Path) -> nn.Module:
        """A released first part, or whatever else a user may have for it, in eval mode."""
        ...


@runtime_checkable
class Consulting(Protocol):
    """A task whose loss also depends on what the averaged weights say. Only asked in runs that average."""

    def consult(
        self, averaged: Callable[[], AbstractContextManager[nn.Module]], batch: Sample, epoch: float
    ) -> Sample:
        """`batch` with what the loss needs of them; `with averaged() as model` is the first part with them, in eval mode."""
        ...


def build(config: Config) -> Task:
    """The task that `config` is for."""
    module, _, name = config.entry.partition(":")
    return getattr(importlib.import_module(module), name)(config)


def share(count: int, accelerator: Accelerator) -> list[tuple[int, float]]:
    """This process's part of `range(count)` as (index, weight); every process gets equally many, the surplus at weight 0.

    Equal counts matter: with sharded weights each forward pass is a joint operation.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    each = -(-count // world)
    return [(i, 1.0) if i < count else (0, 0.0) for i in range(rank * each, (rank + 1) * each)]


def left_out(unreadable: int, of: int) -> str:
    """What a person is told of held-out images that cannot be read."""
    return f"held-out images left out, as they cannot be read: {unreadable} of {of}"
