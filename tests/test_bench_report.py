"""What a run of the bench leaves: record, tables, plots, page; and its command."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from bench_case import CPU, case, fill, runner
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from visionhybrid.bench import SUITES, __main__, a2mamba, floor, harness, machine, models, report
from visionhybrid.bench.page import markdown

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
