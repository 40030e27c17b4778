"""The bench measures what it says: agreement, turns, targets; never how fast this machine is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from bench_case import CPU, case, fill, runner
from torch import Tensor

from visionhybrid.bench import apart, harness


def test_runs_are_taken_in_turns_and_all_kept() -> None:
    calls: list[str] = []

    def spy(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            calls.append(name)
            return torch.ones(1)

        return run

    result = harness.measure(case(runner("a", spy("a")), runner("b", spy("b")), rounds=3), device=CPU)
    # Comparison, which warms up, three rounds in turns, then memory: one count and the repeats, and the peer's operations.
    weighed = 1 + harness.MEMORY_REPEATS
    assert "".join(calls) == "ab" + "ababab" + "a" * weighed + "b" * weighed + "a"
    assert [len(row.seconds) for row in result.runners] == [3, 3]


def test_a_long_call_is_weighed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "LONG", 0.0)
    result = harness.measure(case(runner("a", fill(1))), device=CPU)
    assert len(result.peer.growth) == 1


def test_disagreement_stops_before_anything_is_timed() -> None:
    good, bad = runner("peer", lambda: torch.ones(4)), runner("wrong", lambda: torch.ones(4) * 1.01)
    with pytest.raises(ValueError, match=r"wrong differs from peer by 1.0e-02 .* nothing was timed"):
        harness.measure(case(good, bad), device=CPU)
    harness.measure(case(good, runner("near", bad.run, tolerance=0.02)), device=CPU)


@pytest.mark.parametrize("output", [torch.full((4,), torch.nan), torch.ones(5)])
def test_nan_and_other_shapes_disagree(output: Tensor) -> None:
    with pytest.raises(ValueError, match=r"differs|gives"):
        harness.measure(
            case(runner("peer", lambda: torch.ones(4)), runner("odd", lambda: output)), device=CPU
        )


def test_output_is_compared_before_run_changes_anything() -> None:
    """As a training step does: both start from the same weights, and each run moves them."""
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}

    def step(name: str, size: float) -> Callable[[], Tensor]:
        return lambda: state[name].add_(size)

    runners = [
        runner(name, step(name, size), output=lambda name=name: state[name] + 1)
        for name, size in (("a", 0.1), ("b", 0.7))
    ]
    result = harness.measure(case(*runners), device=CPU)
    assert result.runners[1].error == 0


def test_memory_ratio_of_a_doubled_workload_misses_its_target() -> None:
    targets = (
        harness.Target(runner="double", what="memory", limit=1.0),
        harness.Target(runner="same", what="memory", limit=1.2),
    )
    fills = {"peer": 32, "same": 32, "double": 64}
    runners = [runner(name, fill(mib), tolerance=2.0) for name, mib in fills.items()]
    result = harness.measure(case(*runners, targets=targets), device=CPU)
    assert {v.runner: v.met for v in result.verdicts} == {"double": False, "same": True}
    assert {v.runner: v.value for v in result.verdicts} == pytest.approx(
        {"double": 2.0, "same": 1.0}, rel=0.15
    )


def test_a_ratio_survives_a_passing_load() -> None:
    """Rounds 2 and 3 ran on a busy machine, which the peer escaped once."""
    base = harness.Measured(name="peer", dtype="float32", error=0, seconds=[1, 10, 1, 1, 1])
    fast = harness.Measured(name="fast", dtype="float32", error=0, seconds=[0.5, 5, 5, 0.5, 0.5])
    assert fast.ratios(base) == [0.5, 0.5, 5, 0.5, 0.5]
    assert fast.ratio(base) == 0.5


def test_targets_are_not_judged_at_other_sizes() -> None:
    target = harness.Target(runner="b", what="time", limit=1e-9)
    runners = (runner("a", fill(1)), runner("b", fill(1)))
    for judged, met in ((True, False), (False, None)):
        result = harness.measure(case(*runners, targets=(target,), judged=judged), device=CPU)
        assert [v.met for v in result.verdicts] == [met]


def test_a_target_for_nobody_is_an_error() -> None:
    target = harness.Target(runner="c", what="time", limit=1)
    with pytest.raises(ValueError, match="no runner or quantity"):
        harness.measure(case(runner("a", fill(1)), targets=(target,)), device=CPU)


def build_apart(device: torch.device) -> Sequence[harness.Runner]:
    assert torch.get_num_threads() == 1
    return [runner(str(os.getpid()), fill(1)), runner("visionhybrid", lambda: torch.zeros(()))]


def test_a_case_of_its_own_process_reports_from_there() -> None:
    """Its disagreement is the error that the same case raises here."""
    said: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    toy = harness.Case(name="toy", title="a toy", build=build_apart, apart=True)
    try:
        with pytest.raises(ValueError, match=r"bench toy: visionhybrid differs from (\d+) by") as here:
            harness.measure(toy, device=CPU)
        with pytest.raises(ValueError, match="bench toy: visionhybrid differs from") as there:
            apart.measure_apart(toy, device=CPU, report=lambda text, done: said.append(text))
    finally:
        torch.set_num_threads(threads)
    assert str(os.getpid()) in str(here.value)
    assert str(os.getpid()) not in str(there.value)
    assert said == ["building"]


def test_missing_peer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="spandrel")

    monkeypatch.setattr(harness, "import_module", gone)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'visionhybrid\[bench\]'"):
        harness.peer("spandrel.architectures.HAT")
