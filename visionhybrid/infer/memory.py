"""How large a tile memory allows, known before the first one is run.

Rule: one window of 64 x 64 pixels is run and the most bytes that its tensors hold at any moment are counted; divided by its
pixels, that is the price of a pixel. On CUDA the allocator gives the figure; on the CPU operators are watched, which cannot
see the scratch memory inside a convolution: times `SCRATCH`. A tile may cost `SHARE` of what is free after the result has found
its place. Should that not suffice, `tiles.tiled` halves the tile.

Real peak over counted, one 128 x 128 image on the CPU (tests/test_restoration.py keeps the claim): vh_hat_small_x4 1.56 (192 x 192:
1.72; bfloat16: 1.32), vh_hat_x2 1.28. vh_hat_small_x4 then costs 17.6 kB a pixel: 8 GiB free, a tile of 528.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARE = 0.6  # of free memory, for one tile
SCRATCH = 1.8  # real peak over counted tensors
PROBE = 64  # pixels a side


def bytes_per_pixel(
    fn: Callable[[Tensor], Tensor], x: Tensor, multiple_of: int, device: torch.device
) -> float:
    """Peak bytes that `fn` holds on `device` while it runs, for each pixel (of all images) of its input.

    x: (B, C, H, W), of which the upper left corner serves as the sample.
    """
    side = max(PROBE, 2 * multiple_of)
    sample = x[:1, :, :side, :side]
    pixels = sample.shape[-2] * sample.shape[-1]
    if device.type == "cuda":
        fn(sample)  # the first call also pays for libraries and their workspaces
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn(sample)
        return (torch.cuda.max_memory_allocated(device) - before) / pixels
    with Count() as count:
        fn(sample)
    return SCRATCH * count.peak / pixels


def largest_tile(per_pixel: float, x: Tensor, scale: int, multiple_of: int, device: torch.device) -> int:
    """The largest side of a square tile for x (B, C, H, W) that memory allows; at least two windows of the model."""
    result = 4 * x.numel() * scale**2 if device.type == "cpu" else 0
    pixels = max(SHARE * (available(device) - result), 0) / (per_pixel * len(x))
    height, width = x.shape[-2:]
    if pixels >= height * width:
        return -(-max(height, width) // multiple_of) * multiple_of
    return max(math.isqrt(int(pixels)) // multiple_of, 2) * multiple_of


def available(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinite where there is no way to know."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type != "cpu":
        return math.inf
    return min(_machine(), _container())


def _machine() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    try:  # no Linux: half of what is installed
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, ValueError, OSError):
        return 4e9


def _container() -> float:
    """What the control group (a container, a batch job) leaves."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (Path("/sys/fs/cgroup") / limit).read_text().strip()
            return math.inf if most == "max" else int(most) - int((Path("/sys/fs/cgroup") / used).read_text())
        except (OSError, ValueError):
            continue
    return math.inf


class Count(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, from those made by the operators it sees."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.made = 0  # bytes alive, most alive at once, made in all
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_strided(t)}
        for tensor in tree_leaves(out):
            if _is_strided(tensor):
                self._add(tensor.untyped_storage(), given)
        return out

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:  # known already, or a weight or the input seen through a view
            return
        size = storage.nbytes()
        self.now += size
        self.made += size
        self.peak = max(self.peak, self.now)

        def freed(_, key=key, size=size):
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)


def _is_strided(leaf: object) -> bool:
    """Whether it has a storage to ask: oneDNN's packed weights have none."""
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided
