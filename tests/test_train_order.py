"""Which samples a step sees: epochs, processes, seeds, unreadable samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_case import ToyData, toy

from visionhybrid.data.seeds import mix, seeded
from visionhybrid.train import run
from visionhybrid.train.config import Guard
from visionhybrid.train.guard import DivergedError
from visionhybrid.train.sampler import Position, Stream, loader, stack

# ---- data order


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 40),
    share=st.integers(1, 5),
    world=st.integers(1, 4),
    repeat=st.integers(1, 3),
    skip=st.integers(0, 25),
)
def test_stream_continues_anywhere(length, share, world, repeat, skip):
    """Each epoch takes no sample more than `repeat` times, and a stream started at any position is the tail of the whole one."""
    size = share * world
    if size > length * repeat:
        return
    whole = Stream(length, size, seed=3, start=Position(), repeat=repeat)
    plans = list(islice(whole, 30))
    first = [i for plan in plans[: whole.batches_per_epoch] for i in plan.indices]
    assert max(Counter(first).values()) <= repeat
    assert len({s for plan in plans for s in plan.seeds}) == 30 * size
    again = Stream(length, size, seed=3, start=plans[skip].after, repeat=repeat)
    assert list(islice(again, 4)) == plans[skip + 1 : skip + 5]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_same_global_batches(world):
    alone = islice(Stream(20, 6, seed=1, start=Position()), 7)
    ranks = [Stream(20, 6, seed=1, start=Position(), rank=r, world=world) for r in range(world)]
    for plan, *parts in zip(alone, *ranks, strict=False):
        assert plan.indices == tuple(i for part in parts for i in part.indices)
        assert plan.seeds == tuple(s for part in parts for s in part.seeds)
        assert {part.after for part in parts} == {plan.after}


def test_order_changes_with_seed_epoch_and_rollback():
    def order(seed=1, **at):
        return Stream(50, 5, seed=seed, start=Position()).permutation(Position(**at)).tolist()

    assert order() == order()
    assert len({tuple(o) for o in (order(), order(2), order(epoch=1), order(order=1))}) == 4
    assert sorted(order(epoch=3)) == list(range(50))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=7, length=6), "7 is larger than the data set, 6 samples x repeat 1"),
        (dict(batch_size=5, length=6, world=2), "5 cannot be shared equally by 2 processes"),
    ],
)
def test_stream_refuses(changes, message):
    length = changes.pop("length")
    size = changes.pop("batch_size")
    with pytest.raises(ValueError, match=message):
        Stream(length, size, seed=0, start=Position(), **changes)


def test_corrupt_samples_are_replaced_by_the_same_others():
    """Whatever process reads them and whatever its generators did before."""

    def taken(workers):
        torch.manual_seed(workers)
        stream = Stream(12, 4, seed=0, start=Position())
        data = ToyData(12, corrupt=(0, 5))
        batches = list(islice(loader(data, stream, lambda s, _: stack(s), workers=workers, pin=False), 3))
        indices = [batch.tensors["index"].tolist() for batch in batches]
        return indices, [text for batch in batches for text in batch.corrupt]

    indices, told = taken(0)
    assert taken(2) == (indices, told)
    assert not {0, 5} & {i for batch in indices for i in batch}
    assert {text.split(":")[0] for text in told} == {"sample 0", "sample 5"}
    planned = [plan.indices for plan in islice(Stream(12, 4, seed=0, start=Position()), 3)]
    changed = [
        (a, b) for p, t in zip(planned, indices, strict=True) for a, b in zip(p, t, strict=True) if a != b
    ]
    assert sorted(a for a, _ in changed) == [0, 5]


def test_corrupt_samples_are_counted_and_limited(tmp_path):
    result = run(toy(corrupt=(3,)), tmp_path / "a", progress=False)
    notes = [row["text"] for row in result["history"] if row["kind"] == "note"][:-1]
    assert "skipped sample 3: picture_3.png: broken on purpose" in notes
    assert [row["corrupt"] for row in result["history"] if row["kind"] == "train"][-1] == len(notes)
    with pytest.raises(DivergedError, match=r"samples could not be read \(guard.corrupt=1\)"):
        run(replace(toy(corrupt=(3, 4, 5, 6)), guard=Guard(corrupt=1)), tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="10 samples in a row could not be read; the last: sample"):
        run(toy(corrupt=tuple(range(34)), loop_validate_every=100), tmp_path / "c", progress=False)


def test_seeds():
    assert mix(1, "a") == mix(1, "a")
    assert len({mix(1, 2), mix(2, 1), mix("1", 2), mix(12), mix(1, 2, 0)}) == 5
    assert 0 <= mix("x") < 2**63
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    before = torch.rand(1)
    with seeded(5):
        inside = torch.rand(1)
    after = torch.rand(1)
    assert torch.equal(torch.cat([before, after]), expected)
    with seeded(5):
        assert torch.equal(torch.rand(1), inside)
