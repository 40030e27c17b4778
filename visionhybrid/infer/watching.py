"""A forward pass watched operator by operator: of which kind each is, which block runs, how long it takes, what it does.

Time is torch's profiler's share of what the clock says without it. What stands inside an operator (our attention, oneDNN's
convolutions) counts as it.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from visionhybrid.infer.memory import Count

KINDS = ("convolution", "matrix product", "attention", "scan", "normalisation", "the rest")
REST = KINDS[-1]
# First match of an operator's name. Attention is whatever is one operator from queries to outputs, linear attention too.
_PATTERNS = (
    ("attention", r"visionhybrid::(linear|neighborhood|window|block_sparse)|scaled_dot_product|(flash|efficient)_attention"),
    ("scan", r"visionhybrid::selective_scan"),
    ("normalisation", r"(layer|batch|group|rms|instance)_norm"),
    ("convolution", r"conv"),
    ("matrix product", r"aten::_?(mm|bmm|mv|addmm|addmv|baddbmm|linear|matmul|einsum)\b|mkldnn::_linear"),
)  # fmt: skip
_MARK = "visionhybrid block: "


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, such as "aten::convolution"."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, operator)), REST)


def clock(model: nn.Module, x: Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        wait(x)
        start = time.perf_counter()
        model(x)
        wait(x)
        times.append(time.perf_counter() - start)
    return median(times)


def wait(x: Tensor) -> None:
    """Until the device of `x` has done what it was asked: GPUs answer before they have."""
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    elif x.device.type == "mps":
        torch.mps.synchronize()


def shares_of(
    model: nn.Module, blocks: dict[str, nn.Module], x: Tensor, repeats: int
) -> dict[tuple[str, str], float]:
    """(block, kind) -> time by torch's profiler, in its own unit; on a GPU that of the kernels."""
    cuda = x.device.type == "cuda"
    profiler = torch.autograd.profiler.profile(use_device="cuda" if cuda else None)
    ranges: list[Any] = []

    def enter(name: str) -> None:
        ranges.append(torch.profiler.record_function(_MARK + name))
        ranges[-1].__enter__()

    def leave(name: str) -> None:
        ranges.pop().__exit__(None, None, None)

    with _quietly(profiler), _around(blocks, enter, leave):
        for _ in range(repeats):
            model(x)
        wait(x)
    found: dict[tuple[str, str], float] = defaultdict(float)

    def add(event: Any, block: str, kind: str) -> None:
        if event.name.startswith(_MARK):
            block = event.name.removeprefix(_MARK)
        elif kind == REST:  # else it is inside an operator that has said what it is
            kind = kind_of(event.name)
        found[block, kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
        for child in event.cpu_children:
            add(child, block, kind)

    for event in profiler.function_events or ():
        if event.cpu_parent is None and event.device_type.name == "CPU":
            add(event, "", REST)
    return found


@contextmanager
def _quietly(profiler: Any) -> Iterator[None]:
    """The profiler at work. Kineto below it writes notes to the error stream as it starts and stops; those are dropped."""
    with _error_stream_shut():
        profiler.__enter__()
    try:
        yield
    finally:
        with _error_stream_shut():
            profiler.__exit__(None, None, None)


@contextmanager
def _error_stream_shut() -> Iterator[None]:
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextmanager
def _around(
    blocks: dict[str, nn.Module], enter: Callable[[str], object], leave: Callable[[str], object]
) -> Iterator[None]:
    """Call `enter(name)` before and `leave(name)` after each block runs."""

    def hook(action: Callable[[str], object], name: str) -> Callable[..., None]:
        def run(*args: Any) -> None:  # a hook that returns something would change what the block returns
            action(name)

        return run

    handles = []
    for name, block in blocks.items():
        handles.append(block.register_forward_pre_hook(hook(enter, name)))
        handles.append(block.register_forward_hook(hook(leave, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Tally(Count):
    """Books the operations and bytes of every operator under the block that runs and the operator's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.block = [""]
        self.inside = ""  # the kind of a function that is several operators
        self.macs: dict[tuple[str, str], int] = defaultdict(int)
        self.written: dict[str, int] = defaultdict(int)
        self.peaks: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func._overloadpacket
        if packet not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        before = self.made
        out = super().__torch_dispatch__(func, types, args, kwargs)
        kind = self.inside or kind_of(func.name())
        if packet in flop_registry:
            self.macs[self.block[-1], kind] += (
                flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
            )
        self.written[kind] += self.made - before
        self.peaks[self.block[-1]] = max(self.peaks[self.block[-1]], self.now)
        return out


class _Attention(TorchFunctionMode):
    """Tells the tally that what `scaled_dot_product_attention` falls apart into is attention."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.tally.inside = "attention"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.tally.inside = ""


def counted(model: nn.Module, blocks: dict[str, nn.Module], x: Tensor) -> Tally:
    tally = Tally()
    with _around(blocks, tally.block.append, lambda name: tally.block.pop()), tally, _Attention(tally):
        model(x)
    return tally
