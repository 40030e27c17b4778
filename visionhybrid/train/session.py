"""A run from the first step to the released weights: `run`, and `validate` for weights that exist."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from torch import nn

import visionhybrid
from visionhybrid.infer.progress import bar
from visionhybrid.train import card, log, recipes, state, task
from visionhybrid.train.alone import alone
from visionhybrid.train.config import Config, ConfigError, check, diff, from_json, to_json
from visionhybrid.train.loop import Trainer
from visionhybrid.train.parts import make_accelerator


def run(
    config: Config | str,
    out: str | Path,
    *,
    dry_run: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Train as `config` says, in the run directory `out`; continue there if it holds a run.

    Args:
        config: a config or the name of a recipe (see `recipes.find`).
        dry_run: one step of every phase and a memory estimate in a temporary directory instead; `out` is not touched.
        resume: False: an `out` that already holds a run is an error.
        progress: print a progress line and what a person should know.
    Returns: `metrics` (last validation: name -> value), `history` (lines of log.jsonl), `steps`, `seconds`, `train_samples`, `out`, `weights`
        (what `visionhybrid.load` opens; of a generator a diffusers pipeline), `samples` (folder of pictures). A dry run: see `dryrun.rehearse`.
    Raises: ConfigError, ValueError: the config or the data cannot be used, or another process trains in `out`. CheckpointError: disk full, or no checkpoint of
        `out` is valid. DivergedError: the guard gave up. Interrupted: a signal came; a checkpoint was written.
    """
    config = recipes.find(config) if isinstance(config, str) else check(config)
    if dry_run:
        from visionhybrid.train.dryrun import rehearse

        return rehearse(config, progress=progress)
    out = Path(out)
    if not resume and any((out / "checkpoints").glob("step_*")):
        raise ValueError(f"{out} already holds a run; continue it (resume) or choose another directory")
    trainer = Trainer(config, out, progress=progress)
    with alone(out) if trainer.accelerator.is_main_process else nullcontext():
        _begin(trainer)
        try:
            trainer.fit()
            return _finish(trainer)
        finally:
            trainer.log.close()


def _begin(trainer: Trainer) -> None:
    """Write what the run is, find where it stands."""
    if trainer.accelerator.is_main_process:
        state.clean(trainer.out, trainer.checkpoints)
    trainer.accelerator.wait_for_everyone()
    path, skipped = state.newest(trainer.checkpoints)
    if path is None and skipped:
        raise state.CheckpointError(
            f"{trainer.out}: no valid checkpoint to continue from; {'; '.join(skipped)}"
        )
    if path is not None:
        trainer.load(path)
        if trainer.accelerator.is_main_process:
            trainer.prune()
    trainer.log.open(trainer.step)
    trainer.tell()
    for text in skipped:
        trainer.log.note(trainer.step, text)
    if path is not None:
        trainer.log.note(trainer.step, f"continuing from {path.name}")
    if trainer.accelerator.is_main_process:
        _describe(trainer)
    if path is None:
        if why := trainer.unsound():
            raise ValueError(f"the weights to begin with are no good: {why}")
        trainer.save()


def _describe(trainer: Trainer) -> None:
    saved, new = trainer.out / "config.json", to_json(trainer.config)
    if saved.is_file() and (old := saved.read_text(encoding="utf-8")) != new:
        try:
            changes = [f"config changed: {line}" for line in diff(trainer.config, from_json(old))]
        except ConfigError as error:  # of another version, say; the run goes on by the config of now
            changes = [f"config changed; the one before cannot be read: {error}"]
        for text in changes:
            trainer.log.note(trainer.step, text)
    state.write_text(saved, new)
    if not (trainer.out / "command.txt").is_file():
        state.write_text(trainer.out / "command.txt", shlex.join(sys.argv) + "\n")
    if not (trainer.out / "environment.json").is_file():
        state.write_text(trainer.out / "environment.json", json.dumps(environment(trainer), indent=2) + "\n")


def environment(trainer: Trainer) -> dict[str, Any]:
    """Versions, device, commit."""
    found = {
        "visionhybrid": visionhybrid.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": str(trainer.accelerator.device),
        "processes": trainer.accelerator.num_processes,
        "distributed": trainer.accelerator.distributed_type.value,
        "sharded": trainer.sharded,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }
    if trainer.accelerator.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(trainer.accelerator.device)
    return found


def _commit() -> str:
    """Of this package, if it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _finish(trainer: Trainer) -> dict[str, Any]:
    """Release the weights, write the card, gather what a caller wants to know."""
    weights = trainer.out / trainer.task.released
    _release(trainer)
    history = list(log.read(trainer.log.path))
    samples = trainer.out / "samples" / f"step_{trainer.step:08d}"
    result = {
        "metrics": trainer.metrics,
        "history": history,
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "train_samples": len(trainer.task.train_set),
        "out": str(trainer.out),
        "weights": str(weights),
        "samples": str(samples),
    }
    if trainer.accelerator.is_main_process:
        state.write_text(trainer.out / "report.md", card.text(trainer.config, result, environment(trainer)))
    return result


def _release(trainer: Trainer) -> None:
    """Write the (averaged) weights of the first part, with what a loader and a reader need to know."""
    facts = {**trainer.task.metadata(), "recipe": trainer.config.name, "step": trainer.step}
    facts["metrics"] = trainer.metrics
    with trainer.evaluating() as model:
        if trainer.sharded:
            tensors = state.whole(model.state_dict())  # every process takes part
            model = trainer.task.parts()[trainer.main.name]
            model.load_state_dict(tensors)
        if not trainer.accelerator.is_main_process:
            return
        trainer.task.release(model, trainer.out / trainer.task.released, facts)
    trainer.tell()


def validate(
    model: nn.Module | str | Path,
    config: Config | str,
    *,
    limit: int | None = None,
    progress: bool = True,
    judge: task.Task | None = None,
) -> dict[str, float]:
    """Metrics of `model` on the held-out data of `config`, in float32.

    Args:
        model: a module, a checkpoint file of any known kind, or a run directory (its released weights).
        config: a config or the name of a recipe; its `model` section is not used.
        limit: so many batches or pictures only.
        judge: the task of `config`, where it is built already.
    """
    if judge is None:
        judge = task.build(recipes.find(config) if isinstance(config, str) else check(config))
    if not isinstance(model, nn.Module):
        model = judge.open(model)
    accelerator = make_accelerator("no")
    model = model.to(accelerator.device).eval()
    with bar(progress and accelerator.is_main_process, "validating") as update, torch.no_grad():
        return judge.validate(model, accelerator, limit, update)
