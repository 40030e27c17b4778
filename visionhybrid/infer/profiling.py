"""Where a model's parameters, operations, time and memory are: by block, and by kind of operation.

One forward pass is watched operator by operator: each is of a kind and belongs to the block that runs. Time is torch's profiler's
share of what the clock says without it. What stands inside an operator (our attention, oneDNN's convolutions) counts as it.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
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
_PARAMETERS = (
    ("convolution", (nn.modules.conv._ConvNd,)),
    ("matrix product", (nn.Linear,)),
    ("normalisation", (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)),
)
_MARK = "visionhybrid block: "


@dataclass(frozen=True, kw_only=True)
class Row:
    """A block or a kind of operation."""

    name: str
    parameters: int
    macs: int  # multiply-adds of products, convolutions, attention and scans, the whole batch
    seconds: float
    memory: int  # of a block: peak bytes of live tensors while it runs, weights apart; of a kind: bytes its operators wrote


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one kind of operation costs in one block."""

    macs: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One forward pass in eval mode, without gradients. JSON-able (`dataclasses.asdict`)."""

    name: str
    input_size: tuple[int, ...]  # (B, C, H, W)
    device: str
    dtype: str
    threads: int
    parameters: int
    macs: int
    seconds: float  # median of the repeats
    memory: int  # peak bytes of live tensors, weights apart
    blocks: tuple[Row, ...]  # in the order of the model; what is in none comes last, as "outside blocks"
    kinds: tuple[Row, ...]  # as `KINDS`
    cells: dict[str, dict[str, Cell]]  # block -> kind

    @property
    def title(self) -> str:
        size = " x ".join(map(str, self.input_size))
        return (
            f"{self.name}, {size}, {self.dtype} on {self.device}: {1e3 * self.seconds:.1f} ms, "
            f"{self.macs / 1e9:.2f} G multiply-adds"
        )


def profile(model: nn.Module, x: Tensor | tuple[int, ...], *, name: str = "", repeats: int = 5) -> Profile:
    """Watch `model(x)`.

    Args:
        model: any module; put into eval mode while it is watched. It stays on its device.
        x: the input, or its shape (B, C, H, W): noise on the model's device and in its type.
        name: for the title.
        repeats: forward passes timed by the clock, and as many by the profiler, after two to warm up.
    Raises:
        ValueError: `repeats` below 1.
    """
    if repeats < 1:
        raise ValueError(f"profile: repeats starts at 1, got {repeats}")
    first = next(model.parameters())
    if not isinstance(x, Tensor):
        x = torch.rand(x, device=first.device, dtype=first.dtype)
    blocks = dict(_blocks(model))
    trained = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(2):
                model(x)
            seconds = _clock(model, x, repeats)
            shares = _shares(model, blocks, x, repeats)
            tally = _counted(model, blocks, x)
    finally:
        model.train(trained)
    held = _parameters(model, blocks)
    total = sum(shares.values())
    outside = any(counts["", kind] for counts in (tally.macs, held) for kind in KINDS)
    # The loop around the blocks always costs something.
    outside = outside or sum(shares["", kind] for kind in KINDS) > 0.01 * total
    names = [*blocks, *([OUTSIDE] if outside else [])]
    cells = {
        block: {
            kind: Cell(
                macs=tally.macs[_key(block), kind], seconds=seconds * shares[_key(block), kind] / total
            )
            for kind in KINDS
        }
        for block in names
    }
    return Profile(
        name=name or type(model).__name__,
        input_size=tuple(x.shape),
        device=str(first.device),
        dtype=str(first.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=sum(tally.macs.values()),
        seconds=seconds,
        memory=tally.peak,
        blocks=tuple(
            Row(
                name=block,
                parameters=sum(held[_key(block), kind] for kind in KINDS),
                macs=sum(cell.macs for cell in cells[block].values()),
                seconds=sum(cell.seconds for cell in cells[block].values()),
                memory=tally.peaks[_key(block)],
            )
            for block in names
        ),
        kinds=tuple(
            Row(
                name=kind,
                parameters=sum(held[_key(block), kind] for block in names),
                macs=sum(cells[block][kind].macs for block in names),
                seconds=sum(cells[block][kind].seconds for block in names),
                memory=tally.written[kind],
            )
            for kind in KINDS
        ),
        cells=cells,
    )


def kind_of(operator: str) -> str:
    """The kind of an operator by its name, such as "aten::convolution"."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, operator)), REST)


# ---- blocks

OUTSIDE = "outside blocks"


def _blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model cut up: lists of blocks and whatever holds one are taken apart, all else is one piece."""
    for name, child in model.named_children():
        if isinstance(child, nn.Identity):
            continue
        if _is_list(name, child) or any(
            _is_list(n.rpartition(".")[2], m) for n, m in child.named_modules() if n
        ):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _is_list(name: str, module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and name in (
        "stages",
        "blocks",
        "layers",
        "groups",
    )


def _key(block: str) -> str:
    return "" if block == OUTSIDE else block


def _parameters(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[tuple[str, str], int]:
    """(block, kind) -> numbers; a tied one counts where it comes first."""
    block_of = {module: name for name, block in blocks.items() for module in block.modules()}
    held: dict[tuple[str, str], int] = defaultdict(int)
    seen: set[int] = set()
    for module in model.modules():
        kind = next((kind for kind, types in _PARAMETERS if isinstance(module, types)), REST)
        for p in module.parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                held[block_of.get(module, ""), kind] += p.numel()
    return held


# ---- time


def _clock(model: nn.Module, x: Tensor, repeats: int) -> float:
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


def _shares(
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


# ---- operations and memory


class _Tally(Count):
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

    def __init__(self, tally: _Tally) -> None:
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


def _counted(model: nn.Module, blocks: dict[str, nn.Module], x: Tensor) -> _Tally:
    tally = _Tally()
    with _around(blocks, tally.block.append, lambda name: tally.block.pop()), tally, _Attention(tally):
        model(x)
    return tally
