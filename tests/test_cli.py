"""The command: what it prints, its exit statuses, and that errors are one line unless --debug."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import RUNNER, error, hat_file, nextvit_file, photos_folder, run

import visionhybrid
from visionhybrid.cli import app


@pytest.fixture(scope="module")
def hat(tmp_path_factory):
    return hat_file(tmp_path_factory.mktemp("hat"))


@pytest.fixture(scope="module")
def nextvit(tmp_path_factory):
    return nextvit_file(tmp_path_factory.mktemp("nextvit"))


@pytest.fixture
def photos(tmp_path):
    return photos_folder(tmp_path)


# ---- list, info, inspect


def test_list_is_a_table_and_json():
    lines = run("list", "--filter", "vh_hat_*_x4").stdout.splitlines()
    assert lines[0].split() == ["name", "task", "scale", "parameters", "weights"]
    assert [line.split()[0] for line in lines[1:]] == ["vh_hat_large_x4", "vh_hat_small_x4"]
    assert lines[2].split()[1:4] == ["restoration", "x4", "9.6M"]
    found = json.loads(run("list", "--task", "classification", "--filter", "vh_next*small", "--json").stdout)
    assert [entry["name"] for entry in found] == ["vh_nextvit_small"]
    assert found[0]["parameters"] == 31_763_368
    assert "vh_nextvit_small.bd_in1k" in found[0]["weights"]


def test_list_of_nothing_fails():
    assert "no model matches 'vh_nothing*'" in run("list", "--filter", "vh_nothing*", status=1).stderr
    assert "task must be one of classification, restoration" in error("list", "--task", "detection")


def test_info_tells_all():
    text = run("info", "vh_nextvit_small").stdout
    for part in (
        "31,763,368",
        "5.8G at 3 x 224 x 224",
        "1024 channels at 1/32",
        "arXiv:2207.05501",
        "bd_in1k_384",
        "Apache",
    ):
        assert part in text
    found = json.loads(run("info", "vh_hat_small_x4.df2k", "--json").stdout)
    assert (found["scale"], found["input_size"], found["output_size"]) == (4, [3, 64, 64], [3, 256, 256])
    assert found["weights"]["df2k"]["file"] == "HAT-S_SRx4.pth"
    assert "bicubic" in found["weights"]["df2k"]["purpose"]


def test_info_of_a_misspelt_name_suggests():
    assert "did you mean 'vh_hat_small_x4'?" in error("info", "hat_smal_x4")


def test_inspect(hat, nextvit):
    text = run("inspect", hat).stdout
    for part in ("params_ema", "hat", "restoration, x2", "window_size = 8"):
        assert part in text
    found = json.loads(run("inspect", nextvit, "--json").stdout)
    assert found["options"]["strides"] == [1, 2, 1, 2]
    assert json.loads(found["metadata"]["classes"]) == ["ant", "bee", "cow"]


def test_inspect_of_unknown_weights_describes_them_and_fails(tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 3)}, tmp_path / "other.pth")
    result = run("inspect", tmp_path / "other.pth", status=1)
    assert "unknown" in result.stdout
    assert "no system recognises these weights" in result.stderr
    assert json.loads(run("inspect", tmp_path / "other.pth", "--json", status=1).stdout)["system"] is None


# ---- train, validate


def test_train_validate_classify_round_trip(tmp_path, photos):
    options = ("loop.epochs=none", "loop.steps=2", "loop.validate_every=2", "loop.batch_size=8")
    result = run("train", "nextvit_digits", *options, "--out", tmp_path / "run", "--no-progress")
    assert "top1" in result.stdout
    assert "loop.steps: None -> 2" in result.stderr
    assert run("inspect", tmp_path / "run").stdout.count("strides = [1, 2, 1, 2]") == 1
    steps = next((tmp_path / "run" / "checkpoints").glob("step_*2"))
    again = ("validate", "nextvit_digits", "--limit", 1, "--no-progress", "--json")
    metrics = json.loads(run(*again, "--model", tmp_path / "run").stdout)
    assert 0 <= metrics["top1"] <= 100
    assert json.loads(run(*again, "--model", steps).stdout) == pytest.approx(metrics)
    assert " %  " in run("classify", photos / "0.png", "--model", tmp_path / "run").stdout


def test_train_lists_recipes():
    lines = run("train", "--list").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert {"nextvit_digits", "nextvit_small_in1k", "hat_small_x4"} <= set(names)


def test_train_errors(tmp_path):
    assert "a recipe is needed" in error("train", status=2)
    assert "the nearest is 'nextvit_digits'" in error("train", "nextvit_digit", status=2)
    assert "the nearest is 'optim.lr'" in error("train", "nextvit_digits", "optim.lrr=1", status=2)
    assert "optim.lr: expected a number, got 'fast'" in error(
        "train", "nextvit_digits", "optim.lr=fast", status=2
    )
    lines = run(
        "train", "nextvit_small_in1k", f"data.root={tmp_path}", "--out", tmp_path / "r", status=1
    ).stderr.splitlines()
    assert lines[-1].startswith("error: ")


def test_demo_passes_its_options_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "visionhybrid.demo.run",
        lambda out, parts, seed: asked.append((out, tuple(parts), seed)) or out / "report.html",
    )
    assert run("demo", "--out", tmp_path).stdout == f"report: {tmp_path / 'report.html'}\n"
    run("demo", "--out", tmp_path, "--seed", 3, "--part", "digits", "--part", "generation")
    assert asked == [(tmp_path, (), 0), (tmp_path, ("digits", "generation"), 3)]

    def short(out, parts, seed):
        raise ValueError("the digits reached 90 %")

    monkeypatch.setattr("visionhybrid.demo.run", short)
    assert error("demo", "--out", tmp_path) == "the digits reached 90 %"


# ---- the command as a whole


def test_every_subcommand_has_help_with_examples():
    commands = ("demo", "list", "info", "inspect", "train", "validate", "classify", "restore")
    text = run("--help").stdout
    for command in commands:
        assert f"  {command} " in text
        help_text = run(command, "--help").stdout
        assert "Examples:" in help_text
        assert f"visionhybrid {command}" in help_text


def test_version():
    assert run("--version").stdout == f"visionhybrid {visionhybrid.__version__}\n"


def test_wrong_usage_is_status_2():
    for words in (["nonsense"], ["info"], ["list", "--nonsense"], ["classify"], ["restore", "a"]):
        assert run(*words, status=2).stderr.startswith("Usage: ")


def test_debug_counts_before_and_after_the_subcommand(tmp_path):
    for words in (["--debug", "inspect", "none.pth"], ["inspect", "none.pth", "--debug"]):
        result = RUNNER.invoke(app, words)
        assert isinstance(result.exception, ValueError)
        assert result.exit_code == 1
    assert error("inspect", "none.pth") == "none.pth: no such file"  # and is forgotten the next time


def test_interrupt_and_bugs_leave_one_line(monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    def bug(*args, **kwargs):
        raise TypeError("two\nlines")

    monkeypatch.setattr("visionhybrid.models.checkpoint.inspect", stop)
    monkeypatch.setitem(vars(visionhybrid), "inspect", stop)
    assert run("inspect", "x.pth", status=130).stderr == "stopped\n"
    monkeypatch.setitem(vars(visionhybrid), "inspect", bug)
    assert error("inspect", "x.pth") == "TypeError: two lines (--debug shows where)"


def process(*words):
    command = [Path(sys.executable).parent / "visionhybrid", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})


def test_as_a_process(tmp_path):
    """The installed script: statuses reach the shell, hostile files are refused, tracebacks only with --debug."""
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"visionhybrid {visionhybrid.__version__}\n",
        "",
    )
    evil = tmp_path / "evil.pth"
    evil.write_bytes(b"\x80\x02cposix\nsystem\nX\x05\x00\x00\x00true \x85R.")
    done = process("inspect", str(evil))
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"error: {evil}: refused, it would run posix.system; only tensors and plain values are read; "
        "of a model, save state_dict()\n"
    )
    done = process("inspect", str(evil), "--debug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_the_page_says_what_is_wrong_in_one_line(capsys):
    from visionhybrid import app

    with pytest.raises(SystemExit) as stop:
        app.main(["nowhere.pth"])
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "nowhere.pth" in said or 'pip install "visionhybrid[app]"' in said
