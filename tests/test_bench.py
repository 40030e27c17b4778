"""The bench measures what it says: structure of its record, agreement, memory; never how fast this machine is."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

from visionhybrid.bench import (
    SUITES,
    __main__,
    a2mamba,
    apart,
    floor,
    harness,
    machine,
    memory,
    models,
    report,
)
from visionhybrid.bench.page import markdown

MIB = 2**20
CPU = torch.device("cpu")


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


# --- memory


@pytest.mark.parametrize("instrument", [memory.resident, memory.live])
def test_memory_of_a_known_workload_and_of_its_double(instrument: Callable[..., int | None]) -> None:
    # The larger first: its peak must not linger.
    two, one = instrument(fill(64)), instrument(fill(32))
    if one is None or two is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert one == pytest.approx(64 * MIB, rel=0.15)
    assert two == pytest.approx(128 * MIB, rel=0.15)


def test_live_counts_a_storage_once_and_forgets_the_dead() -> None:
    def run() -> Tensor:
        x = torch.ones(MIB)  # 4 MiB
        for _ in range(5):
            x = x + 1  # the old one dies: 8 MiB at most
        view = x[: MIB // 2].view(2, -1)
        view.mul_(2)  # no new storage
        return view

    assert memory.live(run) == 8 * MIB


def test_live_leaves_out_what_was_there_before() -> None:
    x = torch.ones(MIB)
    assert memory.live(lambda: x.add_(1)) == 0


def test_live_counts_what_autograd_keeps() -> None:
    weight = torch.ones(MIB, requires_grad=True)

    def forward() -> Tensor:
        y = weight
        for _ in range(4):
            y = y.exp()  # keeps its result for the backward pass
        return y

    with torch.no_grad():
        without = memory.live(forward)
    assert without == 8 * MIB
    assert memory.live(forward) == 16 * MIB


def test_held_counts_parameters_buffers_gradients_and_optimiser_state_once() -> None:
    model = nn.BatchNorm1d(1024)  # weight, bias, mean, var of 4 KiB, and one int64
    optimiser = torch.optim.Adam(model.parameters())
    alone = 4 * 4096 + 8
    assert memory.held([model]) == memory.held([model, model, model.weight]) == alone
    model(torch.randn(4, 1024)).square().sum().backward()
    assert memory.held([model]) == alone + 2 * 4096
    optimiser.step()
    # Two moments for each of two parameters, and a step counter for each.
    assert memory.held([model, optimiser]) == alone + 2 * 4096 + 4 * 4096 + 2 * 4
    model.packed = torch.zeros(MIB)
    assert memory.held([model]) == alone + 2 * 4096 + 4 * MIB


def test_held_refuses_what_it_cannot_weigh() -> None:
    with pytest.raises(TypeError, match="got str"):
        memory.held(["weights"])


# --- floor


def test_floor_is_the_larger_of_arithmetic_and_traffic() -> None:
    peaks = floor.Peaks(flops={"float32": 100.0, "bfloat16": 400.0}, bytes=10.0)
    assert peaks.floor(1000, 20, torch.float32) == 10
    assert peaks.floor(1000, 20, torch.bfloat16) == 2.5
    assert peaks.floor(1000, 200, torch.float32) == 20


def test_operations_of_known_layers() -> None:
    x = torch.randn(2, 4, 8, 8)
    assert (
        floor.operations(lambda: nn.functional.conv2d(x, torch.randn(6, 4, 3, 3))) == 2 * 2 * 6 * 36 * 4 * 9
    )
    q = torch.randn(1, 2, 16, 8)
    assert floor.operations(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * (
        2 * 2 * 16 * 16 * 8
    )


def test_peaks_are_positive_and_of_both_dtypes() -> None:
    peaks = floor.measure_peaks(CPU, seconds=0.0)
    assert set(peaks.flops) == {"float32", "bfloat16"}
    assert all(rate > 1e6 for rate in (*peaks.flops.values(), peaks.bytes))


# --- harness


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


# --- record, table, plot, page


@pytest.fixture(scope="module")
def data() -> report.Record:
    small, large = nn.Linear(64, 64), nn.Linear(64, 64)
    large.load_state_dict(small.state_dict())
    x = torch.randn(8, 64)
    runners = (
        runner("peer", lambda: small(x), holds=(small, x)),
        runner("visionhybrid", lambda: large(x), holds=(large, x)),
    )
    targets = tuple(
        harness.Target(runner="visionhybrid", what=w, limit=n) for w, n in (("time", 1e9), ("memory", 1e-9))
    )
    peaks = floor.Peaks(flops={"float32": 1e9, "bfloat16": 1e9}, bytes=1e9)
    results = [harness.measure(case(*runners, targets=targets), device=CPU, peaks=peaks)]
    return report.record(
        "models", results, facts=machine.facts(CPU), command="python -m ...", quick=False, peaks=peaks
    )


def test_record_is_json_with_every_raw_sample(data: report.Record) -> None:
    assert json.loads(json.dumps(data)) == data
    assert data["versions"]["torch"] == torch.__version__.split("+")[0]
    assert data["machine"]["threads"] == torch.get_num_threads()
    (only,) = data["cases"]
    assert only["operations"] == 2 * 8 * 64 * 64
    for row in only["runners"]:
        assert len(row["seconds"]) == 3
        assert row["time"] == sorted(row["seconds"])[1]
        assert row["held"] == 4 * (64 * 64 + 64 + 8 * 64)
        assert row["floor"] == pytest.approx(only["operations"] / 1e9)
    assert only["runners"][0]["ratio"] == 1
    assert only["runners"][0]["ratio_quartiles"] == [1, 1]


def test_table_and_page_show_targets_beside_values(data: report.Record) -> None:
    text = markdown([data])
    (line,) = (line for line in text.splitlines() if line.startswith("| visionhybrid |"))
    assert "<= 1000000000.00 met" in line
    assert "<= 0.00 missed" in line
    assert data["machine"]["processor"] in text
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.tables(data))
    (line,) = (line for line in console.export_text().splitlines() if line.startswith(" visionhybrid "))
    assert re.search(r"met .* missed", line)
    # a load is what ended a minute ago, too; what is busy is busy now
    for used, busy in ((0.0, False), (1.9, True)):
        there = {**data, "machine": {**data["machine"], "cores": 2, "load_1min": 3.0, "busy": used}}
        assert ("not quiet: 1.9 of 2 cores busy" in markdown([there])) == busy
        del there["machine"]["busy"]
        assert "not quiet: 3.0 of 2 cores loaded" in markdown([there])
    (line,) = (line for line in text.splitlines() if line.startswith("## Targets"))
    assert line == "## Targets: 1 of 2 met"
    quick = {**data, "quick": True}
    assert "nothing is judged" in markdown([quick])


def test_plot_is_a_picture(data: report.Record, tmp_path: Path) -> None:
    path = report.plot(data, tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_cases_of_a_family_stand_side_by_side(tmp_path: Path) -> None:
    def at(length: int, *names: str) -> harness.Result:
        # 4 kB may come from memory the process has already; what is held counts always.
        runners = [runner(name, lambda: torch.ones(length), holds=(torch.ones(1),)) for name in names]
        return harness.measure(case(*runners, family="toys", length=length), device=CPU)

    results = [at(2000, "visionhybrid"), at(1000, "peer", "visionhybrid")]
    facts = machine.facts(CPU)
    data = report.record("kernels", results, facts=facts, command="", quick=False, peaks=None)
    lines = markdown([data]).splitlines()
    start = lines.index("### toys: time and peak memory against length")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 2 : start + 6]]
    assert rows[0] == ["length", "peer", "visionhybrid"]
    assert [row[0] for row in rows[2:]] == ["1,000", "2,000"], "shortest first"
    assert [bool(row[1]) for row in rows[2:]] == [True, False], "the peer ends at its last length"
    path = report.plot_lengths(data, tmp_path / "lengths.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    alone = {**data, "cases": data["cases"][:1]}
    assert report.plot_lengths(alone, tmp_path / "none.png") is None


def test_what_another_device_would_measure_is_listed(data: report.Record) -> None:
    there = {**data, "not_measured": ["the GPU's part"]}
    assert "- the GPU's part" in markdown([there])
    assert "Not measured" not in markdown([data])


# --- the command


def test_run_writes_record_plot_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = case(runner("peer", fill(1)), runner("visionhybrid", fill(1)))
    monkeypatch.setattr(models, "cases", lambda *, quick, only: [toy])
    linear = a2mamba.over_sizes((32, 64), 1)
    monkeypatch.setattr(models, "series", lambda *, quick, only: [linear])
    threads = torch.get_num_threads()
    try:
        data = __main__.run("models", quick=True, rounds=2, out=tmp_path, threads=1, progress=False)
    finally:
        torch.set_num_threads(threads)
    written = ["models.json", "models.md", "models.png", "models_a2mamba_by_stage.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert f"### {linear.table['title']}" in (tmp_path / "models.md").read_text()
    assert json.loads((tmp_path / "models.json").read_text()) == data
    assert data["machine"]["threads"] == 1
    assert [len(row["seconds"]) for row in data["cases"][0]["runners"]] == [2, 2]


def test_train_is_a_part_of_the_suite(data: report.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        __main__, "run", lambda suite, **options: asked.append((suite, options["only"])) or data
    )
    assert CliRunner().invoke(__main__.app, ["diffusion", "--train"]).exit_code == 0
    assert CliRunner().invoke(__main__.app, ["models", "--only", "hat"]).exit_code == 0
    assert asked == [("diffusion", "train"), ("models", "hat")]


def test_page_command_renders_records(data: report.Record, tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text(json.dumps(data))
    page = tmp_path / "page.md"
    found = CliRunner().invoke(__main__.app, ["page", str(tmp_path / "models.json"), "--to", str(page)])
    assert found.exit_code == 0, found.output
    assert page.read_text() == markdown([data])


def test_unknown_suite_and_part_are_named() -> None:
    with pytest.raises(ValueError, match="no suite 'model'; have models"):
        __main__.run("model")
    with pytest.raises(ValueError, match="--only must be one of hat, nextvit, a2mamba, got 'swin'"):
        models.cases(only="swin")


def test_help_lists_every_suite() -> None:
    text = CliRunner().invoke(__main__.app, ["--help"]).output
    assert all(re.search(rf"\b{suite}\b", text) for suite in SUITES)


# --- the models suite


@pytest.mark.parametrize("only", models.SYSTEMS)
def test_models_suite_has_the_promised_targets(only: str) -> None:
    promised = {
        "hat_small_x4": {
            ("visionhybrid", "time"): 1 / 3,
            ("visionhybrid", "memory"): 1 / 2,
            ("visionhybrid bf16", "time"): 1 / 6,
        },
        "nextvit_small": {("visionhybrid", "time"): 0.72, ("visionhybrid bf16", "time"): 0.35},
        "a2mamba_tiny": {("visionhybrid", "time"): 0.1, ("visionhybrid bf16", "time"): 0.1},
        "a2mamba_tiny_caformer": {
            ("visionhybrid", "time"): 2.2 * 2.69 / 4.13,
            ("visionhybrid", "memory"): 1.5,
        },
    }
    no_worse = {("visionhybrid", "time"): 1.0, ("visionhybrid", "memory"): 1.0}
    for each in models.cases(only=only):
        targets = {(target.runner, target.what): target.limit for target in each.targets}
        assert targets == promised.get(each.name, no_worse)
        assert each.judged
    assert not any(each.judged for each in models.cases(only=only, quick=True))


def test_a2mamba_by_stage_and_size(tmp_path: Path) -> None:
    found = a2mamba.by_stage((32, 64), 1)
    assert list(found) == [32, 64]
    assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in found.values())
    grown = {side: [side**2.0, 5.0, side**3.0, side**4.0] for side in (224, 512, 1024)}
    assert a2mamba.exponents(grown) == pytest.approx([1, 0, 1.5, 2])
    assert a2mamba.by_stage_table(grown)["rows"][-1] == ["power", "1.00", "0.00", "1.50", "2.00"]
    a2mamba.plot(found, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert models.series(only="hat") == []


def test_a2mamba_definitions_are_the_model() -> None:
    """Without its tiles and blocks, and in other code after it closes."""
    model, x = timm.create_model("vh_a2mamba_nano", num_classes=3).eval(), torch.randn(1, 3, 64, 40)
    with torch.inference_mode():
        want = model(x)
        with a2mamba.definitions():
            counted = model(x)
        torch.testing.assert_close(counted, want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(x), want, atol=0, rtol=0)
