"""One step of every phase before the long run, and what it takes in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from visionhybrid.train import state
from visionhybrid.train.config import Config
from visionhybrid.train.loop import Trainer
from visionhybrid.train.sampler import Batch

LIMIT = 2  # batches or pictures validated


@dataclass
class Saved:
    """What autograd keeps for the backward pass: bytes of the largest forward pass, each storage counted once."""

    peak: int = 0


@contextmanager
def saved_activations(exclude: set[int]) -> Iterator[Saved]:
    """Measure the tensors that forward passes inside save, without those whose storage starts at an address in `exclude`."""
    found, alive = Saved(), dict[int, list[int]]()
    total = 0

    def keep(tensor: Tensor) -> tuple[Tensor, int]:
        nonlocal total
        storage = tensor.untyped_storage() if tensor.layout is torch.strided else None
        address = storage.data_ptr() if storage is not None and not hasattr(tensor, "full_tensor") else 0
        if address and address not in exclude:
            entry = alive.setdefault(address, [0, storage.nbytes() if storage is not None else 0])
            total += entry[1] if entry[0] == 0 else 0
            entry[0] += 1
            found.peak = max(found.peak, total)
        return tensor, address

    def give(packed: tuple[Tensor, int]) -> Tensor:
        nonlocal total
        tensor, address = packed
        if (entry := alive.get(address)) and entry[0]:
            entry[0] -= 1
            if not entry[0]:
                total -= entry[1]
                del alive[address]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield found


def rehearse(config: Config, *, progress: bool = True) -> dict[str, Any]:
    """Train, validate, sample, save and load once, in a temporary directory.

    Returns: `seconds` and `memory`, phase or kind -> seconds, bytes (of one process; activations as measured in the first
        step, at the micro-batch that fits), `micro_batch`, `parameters` (count), `steps`, `steps_per_epoch`, `metrics` (of
        the few validated samples).
    """
    loop = replace(config.loop, tensorboard=False, workers=0)
    with tempfile.TemporaryDirectory(prefix="visionhybrid-dry-run-") as folder:
        trainer = Trainer(replace(config, loop=loop), Path(folder), progress=False)
        trainer.log.open(0)
        seconds: dict[str, float] = {}

        def timed(phase: str, action: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            result = action()
            seconds[phase] = time.perf_counter() - started
            return result

        batch: Batch = timed("data", lambda: next(trainer.batches()))
        addresses = {p.untyped_storage().data_ptr() for part in trainer.parts for p in _local(part.bare)}
        trainer.step = trainer.total - 1  # what a task does from some epoch on is part of the last step
        with saved_activations(addresses) as saved:
            timed("train", lambda: trainer.update(batch))
        trainer.step = 0
        memory = _memory(trainer, saved.peak)
        timed("validate and sample", lambda: trainer.validate(LIMIT))
        timed("save", trainer.save)
        path, reasons = state.newest(trainer.checkpoints)
        if path is None:
            raise state.CheckpointError(f"the checkpoint just written is not valid: {'; '.join(reasons)}")
        timed("load", lambda: trainer.load(path))
        result = {
            "seconds": seconds,
            "memory": memory,
            "micro_batch": trainer.micro,
            "parameters": sum(p.numel() for part in trainer.parts for p in part.bare.parameters()),
            "steps": trainer.total,
            "steps_per_epoch": trainer.steps_per_epoch,
            "metrics": trainer.metrics,
        }
        if progress and trainer.accelerator.is_main_process:
            Console(stderr=True).print(_table(config, result))
        return result


def _local(net: torch.nn.Module) -> list[Tensor]:
    return [p.to_local() if hasattr(p, "to_local") else p for p in net.parameters()]


def _bytes(tensors: Any) -> int:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in local)


def _memory(trainer: Trainer, activations: int) -> dict[str, int]:
    parameters = [p for part in trainer.parts for p in part.bare.parameters()]
    kept = [v for part in trainer.parts for s in part.optimizer.optimizer.state.values() for v in s.values()]
    found = {
        "parameters": _bytes(parameters),
        "gradients": _bytes(p for p in parameters if p.requires_grad),
        "optimiser": _bytes(kept),
        "average": _bytes(trainer.ema.average.values()) if trainer.ema else 0,
        "activations": activations,
    }
    found["sum"] = sum(found.values())
    if trainer.accelerator.device.type == "cuda":
        found["peak measured on the device"] = torch.cuda.max_memory_allocated(trainer.accelerator.device)
    return found


def _table(config: Config, result: dict[str, Any]) -> Table:
    table = Table(title=f"dry run of {config.name}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for phase, seconds in result["seconds"].items():
        table.add_row(phase, f"{seconds:.2f} s")
    table.add_section()
    for kind, size in result["memory"].items():
        table.add_row(kind, f"{size / 2**20:.1f} MiB")
    table.add_section()
    table.add_row("parameters", f"{result['parameters'] / 1e6:.2f} M")
    table.add_row("samples in a forward pass", str(result["micro_batch"]))
    table.add_row("steps", f"{result['steps']}, {result['steps_per_epoch']} an epoch")
    return table
