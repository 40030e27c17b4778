"""Checkpoints of a run: whole, verified, in order, and what happens when they are not."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from train_case import outcome, toy

from visionhybrid.train import run, state
from visionhybrid.train.config import Optim

# ---- checkpoints


def saved(folder, step, value=1.0):
    return state.write(folder, step, {"model": {"w": torch.full((300,), value)}}, {"step": step})


def test_pack_is_exact():
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "parts": (torch.ones(2), None)}, 7: {}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.99), "flag": True, "inf": math.inf, "$odd": "x"}],
    }
    packed, tensors = state.pack(tree)
    again = state.unpack(json.loads(json.dumps(packed)), tensors)
    assert repr(again) == repr(tree)
    with pytest.raises(state.CheckpointError, match=r"cannot store 'groups.0.f'"):
        state.pack({"groups": [{"f": print}]})


def test_newest_valid_one_is_taken_and_the_others_are_named(tmp_path):
    for step in (1, 2, 3, 4, 5, 6):
        saved(tmp_path, step)
    damage = {
        6: lambda path: (path / "manifest.json").write_text("{"),
        5: lambda path: os.truncate(path / "model.safetensors", 100),
        4: lambda path: flip(path / "model.safetensors"),
        3: lambda path: (path / "state.json").unlink(),
        2: lambda path: (path / "manifest.json").write_text('{"format": 99, "files": {}}'),
    }
    for step, action in damage.items():
        action(tmp_path / f"step_{step:08d}")
    path, skipped = state.newest(tmp_path)
    assert path == tmp_path / "step_00000001"
    reasons = [text.removeprefix("checkpoint ") for text in skipped]
    assert reasons == [
        "step_00000006 skipped: manifest.json is damaged",
        f"step_00000005 skipped: model.safetensors has 100 bytes instead of {(tmp_path / 'step_00000001/model.safetensors').stat().st_size}",
        "step_00000004 skipped: model.safetensors has another content than its manifest says",
        "step_00000003 skipped: state.json is missing",
        "step_00000002 skipped: format 99, this version reads 1",
    ]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_run_says_why_it_continues_from_an_older_one(tmp_path):
    run(toy(), tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    flip(max((tmp_path / "damaged" / "checkpoints").glob("step_*")) / "optimizer.safetensors")
    result = run(toy(), tmp_path / "damaged", progress=False)
    notes = [row["text"] for row in result["history"] if row["kind"] == "note"]
    assert "checkpoint step_00000012 skipped: optimizer.safetensors has another content" in notes[0]
    assert notes[1] == "continuing from step_00000010"
    assert outcome(tmp_path / "damaged") == outcome(tmp_path / "whole")


def test_no_valid_checkpoint_is_not_a_fresh_start(tmp_path):
    run(toy(), tmp_path, progress=False)
    for path in (tmp_path / "checkpoints").glob("step_*"):
        (path / "manifest.json").unlink()
    with pytest.raises(
        state.CheckpointError, match="no valid checkpoint to continue from; checkpoint step_00000012"
    ):
        run(toy(), tmp_path, progress=False)


def test_old_ones_go_only_after_the_new_one_verifies(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    put = state._put

    def wrong(path, content):
        return put(path, content if path.name != "model.safetensors" else content[:-1] + b"x") | {
            "sha256": state.hashlib.sha256(content).hexdigest()
        }

    monkeypatch.setattr(state, "_put", wrong)
    with pytest.raises(
        state.CheckpointError, match=r"what was written does not read back: model.safetensors has"
    ):
        saved(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        saved(tmp_path, step)
    os.truncate(tmp_path / "step_00000006" / "model.safetensors", 9)
    state.prune(tmp_path, keep=2, best=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "4", "5", "6"]


def test_same_step_again_replaces_it(tmp_path):
    saved(tmp_path, 1, 1.0)
    saved(tmp_path, 1, 2.0)
    assert state.read(tmp_path / "step_00000001")[0]["model"]["w"][0] == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_put_in_order(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    (tmp_path / "step_00000002").rename(tmp_path / ".step_00000002.old")  # killed between the two renames
    (tmp_path / ".step_00000003.99.tmp").mkdir()
    (tmp_path / ".metrics.csv.99.tmp").touch()
    state.clean(tmp_path, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_killed_while_an_old_checkpoint_is_removed(tmp_path, monkeypatch):
    for step in (1, 2):
        saved(tmp_path, step)

    def half(path):
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt  # stands for the end of the process

    with monkeypatch.context() as patch:
        patch.setattr(state.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            state.prune(tmp_path, 1, None)
    state.clean(tmp_path, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


def test_killed_before_an_old_checkpoint_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(state, "prune", lambda *args: None)
        run(toy(loop_steps=6), tmp_path, progress=False)
    run(toy(loop_steps=6), tmp_path, progress=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-2:] == [
        "step_00000005",
        "step_00000006",
    ]
    assert len(list((tmp_path / "checkpoints").iterdir())) <= 3  # the newest two, and the best


def test_killed_between_the_files_that_say_what_a_run_is(tmp_path):
    run(toy(), tmp_path, progress=False)
    (tmp_path / "environment.json").unlink()
    run(toy(), tmp_path, progress=False)
    assert json.loads((tmp_path / "environment.json").read_text())["processes"] == 1


def test_full_disk(tmp_path, monkeypatch):
    """The disk fills while the third checkpoint is written: the run ends with one line, and continues once there is room."""
    run(toy(), tmp_path / "whole", progress=False)
    put = state._put

    def full(path, content):
        if path.name == "optimizer.safetensors" and "step_00000006" in str(path):
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return put(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(state, "_put", full)
        with pytest.raises(state.CheckpointError) as error:
            run(toy(), tmp_path / "full", progress=False)
    assert str(error.value).startswith("disk full: checkpoint step_00000006 needs 0.0 MiB in ")
    assert str(error.value).endswith("step_00000005")
    assert "\n" not in str(error.value)
    names = sorted(p.name for p in (tmp_path / "full" / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005"]
    run(toy(), tmp_path / "full", progress=False)
    assert outcome(tmp_path / "full") == outcome(tmp_path / "whole")


def test_full_disk_elsewhere_names_the_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as `write` fails: without a name

    with monkeypatch.context() as patch:
        patch.setattr(state, "_put", full)
        with pytest.raises(OSError, match=r"cannot be written: No space left .*report\.md"):
            state.write_text(tmp_path / "report.md", "text")
    monkeypatch.setattr("train_case.ToyTask.samples", full)
    with pytest.raises(OSError, match=r"cannot be written: No space left .*samples/step_00000005"):
        run(toy(), tmp_path / "run", progress=False)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage._replace(free=10))
    monkeypatch.setattr(state, "_put", lambda *args: pytest.fail("wrote"))
    with pytest.raises(state.CheckpointError, match=r"disk full.*there is no earlier checkpoint"):
        saved(tmp_path, 1)


def test_no_pickle_and_every_file_named_in_the_manifest(tmp_path):
    run(toy(), tmp_path, progress=False)
    for path in (tmp_path / "checkpoints").iterdir():
        names = {file.name for file in path.iterdir()}
        listed = set(json.loads((path / "manifest.json").read_text())["files"])
        assert names == listed | {"manifest.json"}
        assert names == {
            "model.safetensors",
            "ema.safetensors",
            "optimizer.safetensors",
            "state.json",
            "manifest.json",
        }


def test_another_model_or_optimiser_is_refused(tmp_path):
    run(toy(), tmp_path, progress=False)
    with pytest.raises(state.CheckpointError, match=r"the checkpoint is of another optimiser"):
        run(replace(toy(), optim=Optim(name="sgd")), tmp_path, progress=False)
    with pytest.raises(
        state.CheckpointError, match=r"model has other tensors than the checkpoint: missing \[\], unexp"
    ):
        run(toy(norm=False), tmp_path, progress=False)


# ---- one run at a time

HOLD = """
import fcntl, sys
with open(sys.argv[1], "a+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
def test_a_directory_is_one_run_at_a_time(tmp_path):
    (tmp_path / ".unfinished.tmp").write_text("of the run that goes on")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process trains here"):
            run(toy(loop_steps=2), tmp_path, progress=False)
        assert (tmp_path / ".unfinished.tmp").exists()
        assert not (tmp_path / "checkpoints").exists()
        other.kill()  # no chance to clean up
    assert run(toy(loop_steps=2), tmp_path, progress=False)["steps"] > 0
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
