"""The order of the data, as a pure function of seed, epoch and cursor.

`Stream` yields the plan of one global batch after another without end; a `DataLoader` worker turns a plan into tensors. What a
batch holds depends on nothing else, so a run continues at any step with any number of workers, and the global batches stay
the same when the number of processes changes: the cursor counts global samples. accelerate never wraps this loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.seeds import mix

Sample = dict[str, Tensor]
ATTEMPTS = 10


class TrainSet(Protocol):
    """What the loop trains on: every random decision of a sample comes from `seed`. Raises `CorruptSample` for a damaged file."""

    def __len__(self) -> int: ...
    def sample(self, index: int, seed: int) -> Sample: ...


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data."""

    epoch: int = 0
    cursor: int = 0  # global samples of this epoch already used
    order: int = 0  # changes the permutation after a rollback


@dataclass(frozen=True)
class Plan:
    """One process's share of a global batch."""

    indices: tuple[int, ...]
    seeds: tuple[int, ...]
    seed: int  # of what is drawn once per batch
    after: Position


@dataclass
class Batch:
    """What one process gets for one step."""

    tensors: Sample
    after: Position  # where the run continues once this batch is used
    corrupt: tuple[str, ...] = ()
    failure: str = ""  # why there are no tensors

    def checked(self) -> Batch:
        """Itself. Raises: ValueError: `failure`."""
        if self.failure:
            raise ValueError(self.failure)
        return self

    def pin_memory(self) -> Batch:
        self.tensors = {name: value.pin_memory() for name, value in self.tensors.items()}
        return self


class Stream:
    """Plans from `start` on, without end. An epoch's incomplete last batch is dropped."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        start: Position,
        repeat: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"loop.batch_size: {batch_size} cannot be shared equally by {world} processes")
        if batch_size > length * repeat:
            raise ValueError(
                f"loop.batch_size: {batch_size} is larger than the data set, "
                f"{length} samples x repeat {repeat}; lower it or raise data.repeat"
            )
        self.length, self.repeat, self.batch_size, self.seed = length, repeat, batch_size, seed
        self.start, self.rank, self.world = start, rank, world

    @property
    def batches_per_epoch(self) -> int:
        return self.length * self.repeat // self.batch_size

    def permutation(self, position: Position) -> Tensor:
        generator = torch.Generator().manual_seed(mix(self.seed, "order", position.order, position.epoch))
        return torch.randperm(self.length * self.repeat, generator=generator)

    def __iter__(self) -> Iterator[Plan]:
        position, share = self.start, self.batch_size // self.world
        while True:
            permutation = self.permutation(position)
            while position.cursor + self.batch_size <= len(permutation):
                first = position.cursor + self.rank * share
                places = permutation[first : first + share].tolist()
                key = (self.seed, position.order, position.epoch)
                after = replace(position, cursor=position.cursor + self.batch_size)
                yield Plan(
                    indices=tuple(place % self.length for place in places),
                    seeds=tuple(mix(*key, "sample", place) for place in places),
                    seed=mix(*key, "batch", first),
                    after=after,
                )
                position = after
            position = Position(epoch=position.epoch + 1, order=position.order)


class _Fetch:
    """What a worker runs: a plan in, a batch out. Its errors are told in the batch: torch makes a page of them."""

    def __init__(self, data: TrainSet, collate: Callable[[list[Sample], int], Sample]) -> None:
        self.data, self.collate = data, collate

    def __getitems__(self, plan: Plan) -> Batch:
        corrupt: list[str] = []
        try:
            samples = [self.read(i, s, corrupt) for i, s in zip(plan.indices, plan.seeds, strict=True)]
            return Batch(tensors=self.collate(samples, plan.seed), after=plan.after, corrupt=tuple(corrupt))
        except ValueError as error:
            return Batch(tensors={}, after=plan.after, failure=str(error))

    def read(self, index: int, seed: int, corrupt: list[str]) -> Sample:
        """Sample `index`; while it cannot be read, another one that depends on `seed` only."""
        for attempt in range(ATTEMPTS):
            try:
                return self.data.sample(index, seed)
            except CorruptSample as error:
                corrupt.append(f"sample {index}: {error}")
                index = mix(seed, "instead", attempt) % len(self.data)
        raise ValueError(f"{ATTEMPTS} samples in a row could not be read; the last: {corrupt[-1]}")


def stack(samples: Sequence[Sample], seed: int = 0) -> Sample:
    """The plain collate: each tensor stacked along a new first axis."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _as_is(batch: Any) -> Any:
    return batch


def loader(
    data: TrainSet, stream: Stream, collate: Callable[[list[Sample], int], Sample], *, workers: int, pin: bool
) -> DataLoader[Batch]:
    """Batches of `stream`, prepared by `workers` processes (0: in this one). Leaves the global generators alone."""
    return DataLoader(
        _Fetch(data, collate),  # type: ignore[arg-type]
        batch_sampler=stream,  # type: ignore[arg-type]
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(stream.seed),
    )
