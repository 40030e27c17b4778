"""Where a model's parameters, operations, time and memory are: by block, and by kind of operation.

`watching.py` follows one forward pass operator by operator: each is of a kind and belongs to the block that runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionhybrid.infer.watching import KINDS, REST, clock, counted, shares_of

_PARAMETERS = (
    ("convolution", (nn.modules.conv._ConvNd,)),
    ("matrix product", (nn.Linear,)),
    ("normalisation", (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)),
)


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
            seconds = clock(model, x, repeats)
            shares = shares_of(model, blocks, x, repeats)
            tally = counted(model, blocks, x)
    finally:
        model.train(trained)
    held = _parameters(model, blocks)
    outside = any(counts["", kind] for counts in (tally.macs, held) for kind in KINDS)
    # The loop around the blocks always costs something.
    outside = outside or sum(shares["", kind] for kind in KINDS) > 0.01 * sum(shares.values())
    names = [*blocks, *([OUTSIDE] if outside else [])]
    cells = _cells(names, tally.macs, shares, seconds)
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
            _row(
                block,
                [held[_key(block), kind] for kind in KINDS],
                cells[block].values(),
                tally.peaks[_key(block)],
            )
            for block in names
        ),
        kinds=tuple(
            _row(
                kind,
                [held[_key(block), kind] for block in names],
                [cells[block][kind] for block in names],
                tally.written[kind],
            )
            for kind in KINDS
        ),
        cells=cells,
    )


def _cells(
    names: Iterable[str],
    macs: Mapping[tuple[str, str], int],
    shares: Mapping[tuple[str, str], float],
    seconds: float,
) -> dict[str, dict[str, Cell]]:
    """block -> kind -> its cost; `shares` divide up `seconds`."""
    unit = seconds / sum(shares.values())
    return {
        block: {
            kind: Cell(macs=macs[_key(block), kind], seconds=unit * shares[_key(block), kind])
            for kind in KINDS
        }
        for block in names
    }


def _row(name: str, parameters: Iterable[int], cells: Collection[Cell], memory: int) -> Row:
    """The sum of some cells."""
    return Row(
        name=name,
        parameters=sum(parameters),
        macs=sum(cell.macs for cell in cells),
        seconds=sum(cell.seconds for cell in cells),
        memory=memory,
    )


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
