"""`vh_a2mamba_tiny` beside its own arithmetic done the plain way, beside timm's CAFormer-S18, and over image sizes.

`python -m visionhybrid.bench models --only a2mamba` runs the cases, then times each stage from 224 to 1024 pixels and plots it. The
targets were stated before anything was measured.

In the definition every pixel of a stage sees K x K keys in each branch, however far apart they lie, so stages 1 to 3 take time in
proportion to pixels at every size; stage 4 attends to all pixels. Tiles of queries read more keys than one query sees: in the near
branch about (17 / 11)^2 times as many in the first stage, at every size. In its far branch up to 484 pixels none too many, since K
keys at the map's own distance, side // K, are all that queries of a tile can see; with larger maps the distance stays at K and
tiles read up to (16 / 11)^2 times as many. Hence a step of the first stage there, between two ranges of proportional growth.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionhybrid.bench import report
from visionhybrid.bench.harness import Case, Runner, Series, Target
from visionhybrid.kernels.neighborhood_attention import plain
from visionhybrid.models.a2mamba import mixer

SIDES = (224, 384, 512, 768, 1024)
# 2.2 times the peer's time for as many multiply-adds: 2.69 G here, 4.13 G there.
CAFORMER = 2.2 * 2.69 / 4.13


def cases(batch: int, size: int, *, judged: bool, rounds: int) -> list[Case]:
    """Against the plain way, and against CAFormer."""
    ours, half = "visionhybrid", "visionhybrid bf16"
    shape = f"{batch}x3x{size}x{size}, inference"
    return [
        Case(
            name="a2mamba_tiny",
            title=f"vh_a2mamba_tiny deployed beside the operators' definitions, {shape}",
            build=partial(_definitions, batch, size),
            targets=(
                Target(runner=ours, what="time", limit=1 / 10),
                Target(runner=half, what="time", limit=1 / 10),
            ),
            rounds=min(rounds, 3),
            judged=judged,
        ),
        Case(
            name="a2mamba_tiny_caformer",
            title=f"vh_a2mamba_tiny deployed beside caformer_s18 (another network), {shape}",
            build=partial(_caformer, batch, size),
            targets=(
                Target(runner=ours, what="time", limit=CAFORMER),
                Target(runner=ours, what="memory", limit=1.5),
            ),
            rounds=rounds,
            judged=judged,
        ),
    ]


def _model() -> nn.Module:
    """As created from a seed, but for batch norms, which would hide a wrong fold."""
    torch.manual_seed(0)
    model = timm.create_model("vh_a2mamba_tiny").eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def _runner(name: str, model: nn.Module, x: Tensor, tolerance: float) -> Runner:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return Runner(name=name, run=run, holds=(model, x), tolerance=tolerance, dtype=x.dtype)


def _ours(model: nn.Module, x: Tensor, *tolerances: float) -> list[Runner]:
    deployed = copy.deepcopy(model).deploy()  # pyright: ignore[reportCallIssue]
    half = copy.deepcopy(deployed).to(torch.bfloat16)
    return [
        _runner("visionhybrid", deployed, x, tolerances[0]),
        _runner("visionhybrid bf16", half, x.to(torch.bfloat16), tolerances[1]),
    ]


def _definitions(batch: int, size: int, device: torch.device) -> list[Runner]:
    model = _model().to(device)
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)

    def run() -> Tensor:
        with torch.inference_mode(), definitions():
            return model(x)

    return [Runner(name="definitions", run=run, holds=(model, x)), *_ours(model, x, 1e-4, 5e-2)]


def definitions() -> Any:
    """While it is open, mixers gather every query's keys and scan token by token, all in the input's type."""
    return mock.patch.multiple(
        mixer,
        neighborhood_scores=_scores,
        neighborhood_aggregate=_aggregate,
        selective_scan=_scan,
        shared=mock.Mock(unsupported=lambda *maps: "the plain way"),
    )


def _scores(q: Tensor, k: Tensor, *, kernel_size: Any, dilation: Any, rpb: Tensor, scale: float) -> Tensor:
    return plain.scores(q, k, rpb, kernel_size, dilation, scale)


def _aggregate(weights: Tensor, v: Tensor, *, kernel_size: Any, dilation: Any) -> Tensor:
    return plain.aggregate(weights, v, kernel_size, dilation)


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, *, delta_bias: Tensor, **unused: bool) -> Tensor:
    step = F.softplus(delta + delta_bias[:, None])
    decay, entering = (step * A).exp(), step * u * B
    h, states = torch.zeros_like(u[..., 0]), []
    for t in range(u.shape[-1]):
        h = decay[..., t] * h + entering[..., t]
        states.append(h)
    return torch.stack(states, -1)[:, :, None]


def _caformer(batch: int, size: int, device: torch.device) -> list[Runner]:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    other = timm.create_model("caformer_s18").eval().to(device)
    # Other weights, other outputs: nothing to compare.
    free = float("inf")
    return [_runner("caformer_s18", other, x, free), *_ours(_model().to(device), x, free, free)]


# ---- over image sizes


def by_stage(sides: Sequence[int] = SIDES, rounds: int = 5) -> dict[int, list[float]]:
    """Seconds of each of the four stages for one image of each side: medians of `rounds` that take turns."""
    model: Any = _model().deploy()  # pyright: ignore[reportCallIssue]
    taken: dict[int, list[list[float]]] = {side: [] for side in sides}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for side in sides:
                y, row = model.stem(torch.randn(1, 3, side, side)), []
                for stage in model.stages:
                    start = time.perf_counter()
                    y = stage(y)
                    row.append(time.perf_counter() - start)
                if turn:  # the first builds tables
                    taken[side].append(row)
    return {side: [statistics.median(s) for s in zip(*rows, strict=True)] for side, rows in taken.items()}


def exponents(found: Mapping[int, Sequence[float]]) -> list[float]:
    """Of each stage, the power of the number of pixels that its time grows with (least squares of the logarithms); linear is 1."""
    pixels = [2 * math.log(side) for side in found]
    stages = zip(*found.values(), strict=True)
    return [statistics.linear_regression(pixels, [math.log(s) for s in stage]).slope for stage in stages]


def over_sizes(sides: Sequence[int] = SIDES, rounds: int = 5) -> Series:
    """`by_stage` as table and plot."""
    found = by_stage(sides, rounds)
    return Series(name="a2mamba_by_stage", table=by_stage_table(found), draw=partial(plot, found))


def by_stage_table(found: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """`by_stage` in words."""
    rows = [[f"{side} x {side}", *map(report.seconds, row)] for side, row in found.items()]
    return {
        "title": "vh_a2mamba_tiny deployed, one image: time by stage, which grows with pixels to the power of the last row",
        "columns": ["image", *(f"stage {i + 1}" for i in range(4))],
        "rows": [*rows, ["power", *(f"{power:.2f}" for power in exponents(found))]],
    }


def plot(found: Mapping[int, Sequence[float]], path: Path) -> None:
    """Time of each stage against the number of pixels, both logarithmic, beside a line of proportional growth for each."""
    figure = report.canvas(6, 4.5)
    axes = figure.subplots()
    pixels = [side**2 for side in found]
    for i, power in enumerate(exponents(found)):
        seconds = [row[i] for row in found.values()]
        (line,) = axes.loglog(pixels, seconds, "o-", label=f"stage {i + 1}: pixels to the {power:.2f}")
        axes.loglog(pixels, [seconds[0] * p / pixels[0] for p in pixels], ":", color=line.get_color())
    axes.set(xlabel="pixels (dotted: in proportion to them)", ylabel="seconds")
    axes.set_title("vh_a2mamba_tiny, one image, time by stage", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    report.save(figure, path)
