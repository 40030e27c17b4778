"""`graft`: the phases one after the other, what each layer costs and saves, and which layers are worth it."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import visionhybrid
from visionhybrid.diffusion import HybridDiT
from visionhybrid.train import recipes, state
from visionhybrid.train.config import ConfigError, Graft, check
from visionhybrid.train.distill import Inputs, regress, relative_error
from visionhybrid.train.graft import GraftTask, changed
from visionhybrid.train.session import run, validate

PHASES = ("alone", "whole", "tune")


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One attention with a new mixer, after the first phase."""

    name: str
    mixer: str
    error: float  # of its own output, on the teacher's activations: relative, squared
    output_error: float  # of the model's output, were it the only one replaced
    seconds_before: float  # of the attention, in a batch of held-out images
    seconds_after: float
    fewer_products: float | None  # multiplications of softmax attention over those of the mixer
    kept: bool  # in the grafted model


@dataclass(frozen=True, kw_only=True)
class GraftReport:
    layers: list[LayerReport]
    teacher: dict[str, float]  # metrics on held-out data
    student: dict[str, float]
    weights: str
    seconds: float


def graft(config: Graft | str, out: str | Path, *, progress: bool = True) -> GraftReport:
    """Run the phases of `config` in `out`/alone, /whole and /tune; the same call continues where it was stopped.

    Writes `out`/report.json and report.md. The grafted pipeline is that of the last phase (`weights`).

    Raises: ConfigError, ValueError: see `session.run`; no phase has steps.
    """
    found = recipes.find(config) if isinstance(config, str) else check(config)
    if not isinstance(found, Graft):
        raise ConfigError(f"graft: {found.name} is a recipe for {found.task}, not for grafting")
    config, out, started = found, Path(out), time.monotonic()
    phases = [name for name in PHASES if getattr(config, name).steps]
    if not phases:
        raise ConfigError("graft: alone.steps, whole.steps and tune.steps are all 0")
    task = GraftTask(config)
    start, layers, done = config.model.start, list[LayerReport](), dict[str, Any]()
    for name in phases:
        if name != "alone" and not layers:
            start, layers = _choose(config, task, start, out)
        phase = getattr(config, name)
        this = replace(
            config,
            name=f"{config.name}_{name}",
            phase=name,
            model=replace(config.model, start=start),
            loop=replace(config.loop, steps=phase.steps, epochs=None),
            optim=replace(config.optim, lr=phase.lr),
        )
        done = run(this, out / name, progress=progress)
        start = str(out / name)
    if not layers:
        start, layers = _choose(config, task, start, out)
    report = GraftReport(
        layers=layers,
        teacher=validate(task.teacher, config, progress=False),
        student=validate(task.open(start), config, progress=False),
        weights=start if start != str(out / phases[-1]) else done["weights"],
        seconds=time.monotonic() - started,
    )
    state.write_text(out / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    state.write_text(out / "report.md", _page(config, report))
    return report


def _choose(config: Graft, task: GraftTask, start: str, out: Path) -> tuple[str, list[LayerReport]]:
    """Measure every new layer; with a budget, give those that do not fit their old mixer back."""
    student = task.open(start) if start else task.parts()["model"].student
    assert isinstance(student, HybridDiT)
    inputs = task.held_out_inputs(torch.device("cpu"))
    measured = _measure(student, task.teacher, inputs)
    kept = set(changed(student, task.teacher))
    if config.budget is not None:
        kept = _within(config.budget, student, task.teacher, inputs, measured)
        if not kept:
            raise ConfigError(
                f"budget: {config.budget} is less than any layer costs, at least "
                f"{min(layer.output_error for layer in measured):.2g}; train `alone` longer or allow more"
            )
        if len(kept) < len(measured):
            start = str(out / "chosen")
            task.release(_only(kept, student, task.teacher), Path(start), {"layers": sorted(kept)})
    return start, [replace(layer, kept=layer.name in kept) for layer in measured]


def _measure(student: HybridDiT, teacher: HybridDiT, inputs: Inputs) -> list[LayerReport]:
    names = changed(student, teacher)
    rows = {row.name: row for row in visionhybrid.describe(student).rows}
    with torch.no_grad():
        _, errors = regress(student, teacher, names, inputs)
    before, after = (_seconds(net, names, inputs) for net in (teacher, student))
    return [
        LayerReport(
            name=name,
            mixer=rows[name].mixer or "",
            error=float(errors[name]),
            output_error=relative_error(_only({name}, student, teacher), teacher, inputs),
            seconds_before=before[name],
            seconds_after=after[name],
            fewer_products=rows[name].speedup,
            kept=True,
        )
        for name in names
    ]


def _only(names: set[str], student: HybridDiT, teacher: HybridDiT) -> HybridDiT:
    """The student, but for the attention outside `names`, which is the teacher's."""
    mixed = copy.deepcopy(student)
    for name in set(changed(student, teacher)) - names:
        parent, _, leaf = name.rpartition(".")
        setattr(mixed.get_submodule(parent), leaf, copy.deepcopy(teacher.get_submodule(name)))
    mixed.note_mixers()
    return mixed.eval()


def _within(
    budget: float, student: HybridDiT, teacher: HybridDiT, inputs: Inputs, measured: list[LayerReport]
) -> set[str]:
    """Layers in the order of what they save for what they cost, as long as the whole output stays within the budget."""
    kept: set[str] = set()
    for layer in sorted(measured, key=lambda x: x.output_error / (x.fewer_products or 1.0)):
        if relative_error(_only(kept | {layer.name}, student, teacher), teacher, inputs) <= budget:
            kept.add(layer.name)
    return kept


@torch.no_grad()
def _seconds(net: nn.Module, names: list[str], inputs: Inputs, rounds: int = 5) -> dict[str, float]:
    """Median time of each module in forward passes of the whole."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    began: dict[str, float] = {}

    def begin(name: str, *_: Any) -> None:
        began[name] = time.perf_counter()

    def end(name: str, *_: Any) -> None:
        taken[name].append(time.perf_counter() - began[name])

    handles = [net.get_submodule(n).register_forward_pre_hook(partial(begin, n)) for n in names]
    handles += [net.get_submodule(n).register_forward_hook(partial(end, n)) for n in names]
    try:
        for _ in range(rounds):
            net(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
    return {name: median(values) for name, values in taken.items()}


def _page(config: Graft, report: GraftReport) -> str:
    lines = [f"# {config.name}: {config.mixer} in {config.teacher}", ""]
    lines += ["| held-out | teacher | student |", "|---|---|---|"]
    lines += [
        f"| {name} | {report.teacher.get(name, float('nan')):.4g} | {value:.4g} |"
        for name, value in report.student.items()
    ]
    lines += ["", "Each layer after the first phase; errors are relative and squared.", ""]
    lines += ["| layer | mixer | own error | output error | ms before | ms after | fewer products | kept |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for x in report.layers:
        products = "" if x.fewer_products is None else f"{x.fewer_products:.2f}"
        lines.append(
            f"| {x.name} | {x.mixer} | {x.error:.3g} | {x.output_error:.3g} | {1e3 * x.seconds_before:.2f} | "
            f"{1e3 * x.seconds_after:.2f} | {products} | {'yes' if x.kept else 'no'} |"
        )
    return "\n".join([*lines, ""])
