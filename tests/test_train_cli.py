"""`python -m visionhybrid.train` and `accelerate launch -m visionhybrid.train`: what a person types and reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from train_case import ToyTask

from visionhybrid.train.__main__ import main

HERE = Path(__file__).parent


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import train_case\n\ndef tiny():\n    return train_case.toy(loop_steps=3)\n")
    return f"{file}:tiny"


def test_trains_and_continues(tmp_path, recipe, capsys):
    assert main([recipe, "optim.lr=0.5", "--out", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert "  optim.lr: 0.01 -> 0.5" in error
    assert "step 3: epoch 0.6  error" in error
    assert main([recipe, "optim.lr=0.5", f"--out={tmp_path / 'run'}"]) == 0
    assert "continuing from step_00000003" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), "--fresh", f"--out={tmp_path / 'run'}"]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_default_directory(tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([recipe]) == 0
    assert (tmp_path / "runs" / "toy" / "model.safetensors").is_file()


def test_dry_run(tmp_path, recipe, capsys):
    assert main([recipe, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run").exists()
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("activations", "optimiser", "save", "load", "MiB"))


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, ""),
        (
            ["nextvit_smal_in1k"],
            2,
            "error: no recipe 'nextvit_smal_in1k'; the nearest is 'nextvit_small_in1k'\n",
        ),
        (["nextvit_digits", "optim.lrr=1"], 2, "error: no field 'optim.lrr'"),
        (
            ["nextvit_digits", "--dryrun"],
            2,
            "error: no option '--dryrun'; have --out DIR, --dry-run, --fresh\n",
        ),
        (
            ["nextvit_small_in1k", "loop.precision=no", "data.root=/no/such/place"],
            2,
            "error: data.root: no such folder",
        ),
        (["hat_x2", "data.high=/no/such/place"], 2, "error: "),
        (["--help"], 0, ""),
    ],
)
def test_failures_are_one_line(words, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == status
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert len([line for line in shown.err.splitlines() if not line.startswith("  ")]) <= 1 or not words


def test_failures_of_a_run_are_one_line(tmp_path, recipe, capsys, monkeypatch):
    def small(self, part, parts, batch):
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(ToyTask, "loss", small)
    assert main([recipe, "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory with 1 sample")


def test_accelerate_launch(tmp_path, recipe):
    words = ["launch", "--cpu", "--num_processes", "1", "-m", "visionhybrid.train", recipe]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words, "--out", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "model.safetensors").is_file()
