"""Two processes train as one: DDP and FSDP2 with gloo on the CPU, and runs that change their number of processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_case import ToyTask, toy

from visionhybrid.train import find, override, run, state, validate
from visionhybrid.train.grafting import graft
from visionhybrid.train.log import read

HERE = Path(__file__).parent
# without what each process does with its own half of the batch (dropout, batch norm, mixing), the sums are the same
EXACT = "toy(dropout=0.0, norm=False, mixing=False, loop_steps=8, loop_validate_every=4)"
NORM = "toy(dropout=0.0, loop_steps=4, loop_validate_every=4)"
CODE = """
import os, sys
from accelerate import PartialState
from accelerate.utils import DistributedType
from train_case import toy
from visionhybrid.train import find, override, run
from visionhybrid.train.grafting import graft
from visionhybrid.train.processes import leave
if __name__ == "__main__":
    if "FSDP_VERSION" in os.environ:
        # accelerate offers FSDP only where it sees accelerators; torch's own works with gloo
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    out = sys.argv[1]
    {calls}
    leave(0)
"""


def launch(out: Path, calls: str, **environment: str) -> None:
    """What `accelerate launch` does: two processes that find each other by environment variables. They make the `calls`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = out.parent / f"{out.name}.py"
    script.write_text(textwrap.dedent(CODE).format(calls=calls))
    shared = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
        **environment,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(out)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.stderr.close()  # or a later test is blamed for what is left of it
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(e[-1500:] for e in errors)


def series(out: Path, name: str) -> torch.Tensor:
    return torch.tensor([row[name] for row in read(out / "log.jsonl") if row["kind"] == "train"])


def weights(out: Path, name: str = "model") -> torch.Tensor:
    path, _ = state.newest(out / "checkpoints")
    return torch.cat([t.flatten() for t in load_file(path / f"{name}.safetensors").values()])


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the run by one process."""
    out = tmp_path_factory.mktemp("alone")
    run(eval(EXACT, {"toy": toy}), out, progress=False)
    return out


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_are_one(tmp_path, environment, alone):
    calls = f'run({EXACT}, out, progress=False); run({NORM}, out + "/norm", progress=False)'
    launch(tmp_path / "two", calls, **environment)
    for name in ("loss", "grad_norm", "order"):
        torch.testing.assert_close(series(tmp_path / "two", name), series(alone, name), rtol=1e-4, atol=1e-6)
    for name in ("model", "ema", "optimizer"):
        torch.testing.assert_close(
            weights(tmp_path / "two", name), weights(alone, name), rtol=1e-3, atol=1e-5
        )
    found = json.loads((tmp_path / "two" / "environment.json").read_text())
    expected = (2, "FSDP", True) if environment else (2, "MULTI_CPU", False)
    assert (found["processes"], found["distributed"], found["sharded"]) == expected
    # what was measured by two processes is that of the one that is saved, running statistics included
    saved, _ = state.newest(tmp_path / "two" / "norm" / "checkpoints")
    net = ToyTask(toy()).parts()["model"]
    net.load_state_dict(load_file(saved / "ema.safetensors"))
    last = json.loads((saved / "state.json").read_text())["metrics"]
    assert validate(net, toy(), progress=False) == pytest.approx(last, rel=1e-6)
    # a checkpoint of two processes is continued by one, with the same global batches
    path = tmp_path / "two" / "checkpoints" / "step_00000008"
    state.shutil.rmtree(path)
    run(eval(EXACT, {"toy": toy}), tmp_path / "two", progress=False)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(alone), rtol=1e-3, atol=1e-5)
    notes = [row["text"] for row in read(tmp_path / "two" / "log.jsonl") if row["kind"] == "note"]
    assert any("is of 2 processes, here 1: the same global batches" in text for text in notes)


SMALL = (
    "'model.options.num_layers=2', 'model.options.attention_head_dim=8', 'loop.batch_size=16', 'loop.steps=4'"
)
SMALL += ", 'loop.log_every=1', 'loop.tensorboard=false', 'loop.validate_every=4', 'sampling.steps=1', 'sampling.each=1'"


TEACHER = f"override(find('hybrid_dit_digits'), [{SMALL}])"
STUDENT = "override(find('hybrid_dit_digits_linfusion'), [{small}, 'alone.steps=4', 'whole.steps=3', 'teacher={teacher}'])"
GRAFT = (
    """run({teacher}, out + "/teacher", progress=False); graft({student}, out + "/graft", progress=False)"""
)


@pytest.fixture(scope="module")
def grafted_alone(tmp_path_factory):
    """A generator and its graft by one process: their folder, the graft's recipe and its report."""
    out, known = tmp_path_factory.mktemp("grafted"), {"find": find, "override": override}
    run(eval(TEACHER, known), out / "teacher", progress=False)
    student = STUDENT.format(small=SMALL, teacher=out / "teacher")
    return out, student, graft(eval(student, known), out / "graft", progress=False)


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_train_and_graft_a_generator_as_one(tmp_path, environment, grafted_alone):
    one, student, report = grafted_alone
    two = tmp_path / "two"
    launch(two, GRAFT.format(teacher=TEACHER, student=student), **environment)
    for part, rtol in (("teacher", 1e-4), ("graft/alone", 1e-3), ("graft/whole", 1e-3)):
        torch.testing.assert_close(
            series(two / part, "loss"), series(one / part, "loss"), rtol=rtol, atol=1e-2 * rtol
        )
    found = json.loads((two / "graft" / "report.json").read_text())
    assert [layer["name"] for layer in found["layers"]] == [layer.name for layer in report.layers]
    # some 5e-10 here, what is left of sums that nearly cancel
    assert found["student"]["distance"] == pytest.approx(report.student["distance"], rel=0.02, abs=1e-10)
    assert (two / "graft" / "whole" / "pipeline" / "model_index.json").is_file()
