"""What the machine could do at best: operations over the matrix-product peak, bytes over the copy bandwidth.

Both peaks are measured here and now, with the threads of the run, so that "2.1 times the floor" means the same on every
machine. The floor ignores every elementwise operator and every intermediate result: nothing can be below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Measured ceilings: `flops` per second by dtype name (a multiply-add is 2), and `bytes` per second read plus written."""

    flops: dict[str, float]
    bytes: float

    def floor(self, operations: float, moved: float, dtype: torch.dtype) -> float:
        """Seconds below which the work cannot be done: the larger of arithmetic and traffic."""
        return max(operations / self.flops[name_of(dtype)], moved / self.bytes)


def name_of(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def measure_peaks(device: torch.device, *, seconds: float = 1.5) -> Peaks:
    """Best rate over about `seconds` each of matrix products (float32, bfloat16) and of a copy.

    A product is tried as a square `mm` and as a 1x1 convolution of a channels-last map: on a CPU these are two libraries (MKL,
    oneDNN), of which either may be twice as fast as the other.
    """
    size = 2048 if device.type == "cpu" else 8192
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        image = torch.randn(1, 512, 64, 64, device=device, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        weight = torch.randn(512, 512, 1, 1, device=device, dtype=dtype)
        flops[name_of(dtype)] = max(
            2 * size**3 / _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds),
            2 * 512**2 * 64**2 / _best(lambda x=image, w=weight: conv2d(x, w), device, seconds),
        )
    # 256 MiB: beyond every last-level cache of today.
    source = torch.zeros(2**26, device=device)
    target = torch.zeros_like(source)
    moved = 2 * source.numel() * source.element_size()
    return Peaks(flops=flops, bytes=moved / _best(lambda: target.copy_(source), device, seconds))


def _best(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, stopwatch(run, device))
    return best


def stopwatch(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, the device's queue emptied before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    kept = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    del kept
    return seconds


def operations(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions of one call (a multiply-add is 2).

    Count on plain PyTorch operators: a fused custom operator shows nothing to the counter.
    """
    # Older torch does not count its fused attention on CPU; the plain products count, but hold the matrix of all weights.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry
    with FlopCounterMode(display=False) as counter, nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()
