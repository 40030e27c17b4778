"""A run that was killed anywhere, and started again, ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_case import outcome, toy

from visionhybrid.train import loop, run, state
from visionhybrid.train.config import Augment, Classification, Images, Loop, Model, Optim

HERE = Path(__file__).parent


class KilledError(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


def run_until(config, out: Path, step: int, monkeypatch) -> None:
    """Run, and die right after the update that makes `step`, before anything of it is written."""
    record = loop.Trainer._record

    def die(self, values):
        if self.step == step:
            raise KilledError
        record(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_record", die)
        with pytest.raises(KilledError):
            run(config, out, progress=False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro_batch", [6, 2], ids=["whole", "accumulate3"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_any_step(tmp_path, monkeypatch, workers, micro_batch, precision):
    # checkpoints at every second step: half of the kills lose a step, which is then done again
    config = toy(loop_workers=workers, loop_micro_batch=micro_batch, loop_precision=precision)
    run(config, tmp_path / "whole", progress=False)
    expected = outcome(tmp_path / "whole")
    assert len([row for row in expected["log"] if row["kind"] == "train"]) == 12
    for step in range(1, 13):
        out = tmp_path / f"killed_at_{step}"
        run_until(config, out, step, monkeypatch)
        run(config, out, progress=False)
        assert outcome(out) == expected, f"killed at step {step}"


def test_killed_again_and_again(tmp_path, monkeypatch):
    config = toy()
    run(config, tmp_path / "whole", progress=False)
    for step in (3, 5, 6, 6, 11):
        run_until(config, tmp_path / "killed", step, monkeypatch)
    run(config, tmp_path / "killed", progress=False)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_number_of_workers_may_change(tmp_path, monkeypatch):
    run(toy(), tmp_path / "whole", progress=False)
    run_until(toy(loop_workers=2), tmp_path / "killed", 7, monkeypatch)
    run(toy(loop_workers=1), tmp_path / "killed", progress=False)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_the_comparison_can_fail(tmp_path, monkeypatch):
    """Break what makes it work, and the runs differ: here the generators are not seeded for each step."""
    config = toy()
    run(config, tmp_path / "whole", progress=False)
    monkeypatch.setattr(loop, "seed_all", lambda seed: None)
    torch.manual_seed(1)
    run(config, tmp_path / "other", progress=False)
    assert outcome(tmp_path / "other")["tensors"] != outcome(tmp_path / "whole")["tensors"]


@pytest.mark.parametrize("optimizer", ["sgd", "lamb", "adan", "lion", "muon"])
def test_other_optimizers(tmp_path, monkeypatch, optimizer):
    """State in odd places: none before the first step, numbers in the parameter groups, two algorithms in one."""
    config = replace(toy(), optim=Optim(name=optimizer, lr=1e-3))
    run(config, tmp_path / "whole", progress=False)
    run_until(config, tmp_path / "killed", 7, monkeypatch)
    run(config, tmp_path / "killed", progress=False)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def digits(**loop_fields) -> Classification:
    """A real classifier on real data with every random augmentation there is."""
    options = dict(depths=[1, 1, 5, 1], stem_chs=[8, 8, 8], dims=[32, 32, 64, 32], ntb_dims=[64, 64, 64])
    options |= dict(head_dim=8, mix_block_ratio=0.5, sr_ratios=[1, 1, 1, 1], strides=[2, 2, 1, 1])
    fields = dict(batch_size=8, steps=4, log_every=1, checkpoint_every=1, validate_every=4, tensorboard=False)
    return Classification(
        name="digits",
        model=Model(name="vh_nextvit_small", options={**options, "drop_path_rate": 0.2, "drop_rate": 0.1}),
        loop=Loop(**{**fields, **loop_fields}),
        data=Images(dataset="digits", held_out="val", num_classes=10, image_size=16),
        augment=Augment(
            policy="rand-m9-mstd0.5-inc1",
            color_jitter=0.4,
            erase=0.5,
            mixup=0.8,
            cutmix=1.0,
            smoothing=0.1,
            interpolation="random",
        ),
    )


def test_classifier_with_every_augmentation(tmp_path, monkeypatch):
    run(digits(workers=0), tmp_path / "whole", progress=False)
    run_until(digits(workers=2), tmp_path / "killed", 3, monkeypatch)
    run(digits(workers=2), tmp_path / "killed", progress=False)
    whole, killed = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert killed == whole


def start(code: str, *args: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(condition, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()[1].decode()[-2000:]}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError("nothing happened for 120 s")
        time.sleep(0.005)


def test_sigkill_while_a_checkpoint_is_written(tmp_path):
    """A real `kill -9`, when the optimizer's file of step 6 is half written; then another one somewhere in the run."""
    config = toy(loop_workers=2, loop_steps=40, loop_validate_every=20)
    run(config, tmp_path / "whole", progress=False)
    out, marker = tmp_path / "killed", tmp_path / "half_written"
    process = start(
        """
        import sys, time
        from pathlib import Path
        from train_case import toy
        from visionhybrid.train import run, state
        put = state._put
        def slow(path, content):
            if "step_00000006" in str(path) and path.name == "optimizer.safetensors":
                path.write_bytes(content[: len(content) // 2])
                Path(sys.argv[2]).touch()
                time.sleep(600)
            return put(path, content)
        state._put = slow
        run(toy(loop_workers=2, loop_steps=40, loop_validate_every=20), sys.argv[1], progress=False)
        """,
        str(out),
        str(marker),
    )
    wait_for(marker.exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert [name for name in left if not name.startswith(".")] == ["step_00000002", "step_00000004"]
    assert any(name.startswith(".step_00000006") for name in left)

    process = start(
        """
        import sys
        from train_case import toy
        from visionhybrid.train import run
        run(toy(loop_workers=2, loop_steps=40, loop_validate_every=20), sys.argv[1], progress=False)
        """,
        str(out),
    )
    wait_for(lambda: state.newest(out / "checkpoints")[0] != out / "checkpoints" / "step_00000004", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(config, out, progress=False)
    assert outcome(out) == outcome(tmp_path / "whole")
    assert not list((out / "checkpoints").glob(".*"))


def test_sigterm_saves_and_the_same_command_continues(tmp_path, monkeypatch):
    config = toy(loop_checkpoint_every=100, loop_validate_every=100)
    run(config, tmp_path / "whole", progress=False)
    record = loop.Trainer._record

    def stop(self, values):
        record(self, values)
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_record", stop)
        with pytest.raises(loop.Interrupted, match="stopped at step 5"):
            run(config, tmp_path / "killed", progress=False)
    assert state.newest(tmp_path / "killed" / "checkpoints")[0].name == "step_00000005"
    run(config, tmp_path / "killed", progress=False)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_log_reads_as_if_nothing_had_happened(tmp_path, monkeypatch):
    config = toy(loop_log_every=3, loop_checkpoint_every=2)
    run(config, tmp_path / "whole", progress=False)
    run_until(config, tmp_path / "killed", 8, monkeypatch)
    with open(tmp_path / "killed" / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "st')  # cut short by the kill
    run(config, tmp_path / "killed", progress=False)
    assert outcome(tmp_path / "killed")["log"] == outcome(tmp_path / "whole")["log"]
    text = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "killed")]
    rows = [[line.rsplit(",", 1)[0] for line in one.splitlines()] for one in text]
    assert rows[0] == rows[1]
