"""`graft`: the phases one after the other, what each layer costs and saves, and which layers are worth it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

import visionhybrid
from visionhybrid.infer.watching import wait
from visionhybrid.train import recipes, state, task
from visionhybrid.train.config import Config, ConfigError, Grafting, check
from visionhybrid.train.distill import Inputs, distance, output, regress, substituted
from visionhybrid.train.graft import Grafts
from visionhybrid.train.parts import make_accelerator
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
    """What `graft` did: each layer, and held-out metrics of teacher and student."""

    layers: list[LayerReport]
    teacher: dict[str, float]  # metrics on held-out data
    student: dict[str, float]
    weights: str
    seconds: float


def graft(config: Config | str, out: str | Path, *, progress: bool = True) -> GraftReport:
    """Run the phases of `config` in `out`/alone, /whole and /tune; the same call continues where it was stopped.

    Writes `out`/report.json and report.md. The grafted model is that of the last phase (`weights`). Under `accelerate launch` every
    process calls it, as it does `session.run`.

    Raises: ConfigError, ValueError: see `session.run`; no phase has steps.
    """
    found: Any = recipes.find(config) if isinstance(config, str) else check(config)
    if not isinstance(found, Grafting):
        raise ConfigError(f"graft: {found.name} is a recipe for {found.task}, not for grafting")
    out, started = Path(out), time.monotonic()
    phases = [name for name in PHASES if getattr(found, name).steps]
    if not phases:
        raise ConfigError("graft: alone.steps, whole.steps and tune.steps are all 0")
    grafts: Any = task.build(found)
    student, layers, done = found.student, list[LayerReport](), dict[str, Any]()
    for name in phases:
        if name != "alone" and not layers:
            student, layers = _choose(grafts, student, out)
        phase = getattr(found, name)
        this = replace(
            found,
            name=f"{found.name}_{name}",
            phase=name,
            student=student,
            loop=replace(found.loop, steps=phase.steps, epochs=None),
            optim=replace(found.optim, lr=phase.lr),
        )
        done = run(this, out / name, progress=progress)
        PartialState().wait_for_everyone()  # one process writes what all go on with
        student = str(out / name)
    if not layers:
        student, layers = _choose(grafts, student, out)
    report = GraftReport(
        layers=layers,
        teacher=validate(grafts.teacher, found, progress=progress, judge=grafts),
        student=validate(grafts.open(student), found, progress=progress, judge=grafts),
        weights=student if student != str(out / phases[-1]) else done["weights"],
        seconds=time.monotonic() - started,
    )
    if PartialState().is_main_process:
        state.write_text(out / "report.json", json.dumps(asdict(report), indent=1) + "\n")
        state.write_text(out / "report.md", _page(found, report))
    return report


def _choose(grafts: Any, start: str, out: Path) -> tuple[str, list[LayerReport]]:
    """Measure every new layer; with a budget, give those that do not fit their old mixer back."""
    config: Grafting = grafts.graft
    device = make_accelerator("no").device
    student = (grafts.open(start) if start else grafts.parts()["model"].student).to(device).eval()
    grafts.tell(grafts.changed(student))
    teacher, inputs = grafts.teacher.to(device), grafts.inputs(device)
    measured = _measure(grafts, student, inputs)
    kept = {layer.name for layer in measured}
    if config.budget is not None:
        kept = _within(config.budget, student, teacher, inputs, measured)
    measured, kept = broadcast_object_list([measured, kept])  # of the first process; times differ
    if config.budget is not None:
        if not kept:
            raise ConfigError(
                f"budget: {config.budget} is less than any layer costs, at least "
                f"{min(layer.output_error for layer in measured):.2g}; train `alone` longer or allow more"
            )
        if len(kept) < len(measured):
            start = str(out / "chosen")
            if PartialState().is_main_process:
                out.mkdir(parents=True, exist_ok=True)
                grafts.release(grafts.only(kept, student), Path(start), {"layers": sorted(kept)})
            PartialState().wait_for_everyone()
    return start, [replace(layer, kept=layer.name in kept) for layer in measured]


def _measure(grafts: Grafts, student: nn.Module, inputs: Inputs) -> list[LayerReport]:
    teacher, names = grafts.teacher, grafts.changed(student)
    rows = {row.name: row for row in visionhybrid.describe(student).rows}
    with torch.no_grad():
        _, errors = regress(student, teacher, names, inputs)
    before, after = (_seconds(net, names, inputs) for net in (teacher, student))
    wanted = output(teacher, inputs)
    return [
        LayerReport(
            name=name,
            mixer=rows[name].mixer or "",
            error=float(errors[name]),
            output_error=_with(student, teacher, {name}, inputs, wanted),
            seconds_before=before[name],
            seconds_after=after[name],
            fewer_products=rows[name].speedup,
            kept=True,
        )
        for name in names
    ]


def _with(
    student: nn.Module, teacher: nn.Module, names: set[str], inputs: Inputs, wanted: torch.Tensor
) -> float:
    """How far the teacher's output moves with the student's attention in the layers `names`."""
    with substituted(teacher, student, names):
        return distance(output(teacher, inputs), wanted)


def _within(
    budget: float, student: nn.Module, teacher: nn.Module, inputs: Inputs, measured: list[LayerReport]
) -> set[str]:
    """Layers in the order of what they save for what they cost, as long as the whole output stays within the budget."""
    kept: set[str] = set()
    wanted = output(teacher, inputs)
    for layer in sorted(measured, key=lambda x: x.output_error / (x.fewer_products or 1.0)):
        if _with(student, teacher, kept | {layer.name}, inputs, wanted) <= budget:
            kept.add(layer.name)
    return kept


@torch.no_grad()
def _seconds(net: nn.Module, names: list[str], inputs: Inputs, rounds: int = 5) -> dict[str, float]:
    """Median time of each module in forward passes of the whole."""
    taken: dict[str, list[float]] = {name: [] for name in names}
    began: dict[str, float] = {}
    weight = next(net.parameters())

    def begin(name: str, *_: Any) -> None:
        wait(weight)
        began[name] = time.perf_counter()

    def end(name: str, *_: Any) -> None:
        wait(weight)
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


def _page(config: Any, report: GraftReport) -> str:
    lines = [f"# {config.name}: {config.mixer} in {config.teacher or config.model.name}", ""]
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
