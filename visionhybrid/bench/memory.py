"""How much memory one call needs at its peak.

Three instruments, because none alone can be trusted everywhere:

- `resident`: what the operating system sees (Linux). The peak of the resident set is reset through
  `/proc/self/clear_refs`, the heap's free pages are handed back first (`malloc_trim`), so the growth during the call is the
  call's own: tensors, operators' scratch space, packed weights, everything. This is the judge on a CPU.
- `device`: the peak of the CUDA allocator. This is the judge on a GPU.
- `live`: bytes of the tensor storages alive at once, counted at every operator. Exact, the same on every machine and under
  any load, but blind to what an operator allocates inside. It explains the judge's number, and stands in for it where
  there is neither `/proc` nor CUDA.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from visionhybrid.infer.memory import Count

Run = Callable[[], Any]


def held(objects: Iterable[object]) -> int:
    """Bytes of the distinct tensor storages that `objects` (modules, optimisers, tensors) keep alive, gradients included."""
    sizes: dict[int, int] = {}
    for tensor in _tensors(objects):
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            if each is not None:
                pointer, size = _extent(each)
                sizes[pointer] = size
    return sum(sizes.values())


def _tensors(objects: Iterable[object]) -> Iterator[Tensor]:
    for item in objects:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, nn.Module):
            for module in item.modules():
                # A plain attribute may hold packed or cached weights: they cost memory too.
                yield from module.parameters(recurse=False)
                yield from module.buffers(recurse=False)
                yield from (
                    leaf for leaf in tree_leaves(list(vars(module).values())) if isinstance(leaf, Tensor)
                )
        elif isinstance(item, torch.optim.Optimizer):
            yield from (leaf for leaf in tree_leaves(dict(item.state)) if isinstance(leaf, Tensor))
        else:
            raise TypeError(f"held: expected tensors, modules or optimisers, got {type(item).__name__}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of a tensor's memory; opaque layouts (oneDNN's packed weights) have no storage to ask."""
    if tensor.layout is not torch.strided:
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr() or id(tensor), storage.nbytes()


def resident(run: Run) -> int | None:
    """Growth of the resident set at its peak while `run()` runs, in bytes; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    # glibc's; musl has none and gives memory back by itself.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak resident set size, proc(5)
    except OSError:
        return None  # a locked-down container
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def device(run: Run) -> int:
    """Growth of the CUDA allocator at its peak while `run()` runs, in bytes."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return peak - before


def live(run: Run) -> int:
    """Bytes of storages born during `run()` and alive at once, at the worst moment."""
    gc.collect()
    with Count() as count:
        kept = run()
    del kept
    return count.peak
