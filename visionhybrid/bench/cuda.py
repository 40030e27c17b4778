"""The `kernels` suite on a GPU, in bfloat16: against the best fused attention of PyTorch, and against copying.

What is bound by memory stands beside a copy of as many bytes as it must read and write: 70 % of the copy's bandwidth is
1 / 0.7 of its time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionhybrid.bench import peers
from visionhybrid.bench.floor import stopwatch
from visionhybrid.bench.harness import Case, Runner, Target
from visionhybrid.kernels import OPERATORS
from visionhybrid.kernels.linear_attention import linear_attention
from visionhybrid.kernels.selective_scan import selective_scan
from visionhybrid.kernels.sparse_linear_attention import sparse_linear_attention
from visionhybrid.kernels.window_attention import window_attention

OURS = "visionhybrid"
# Relative error that bfloat16 operands of another order of sums may show.
ROUNDED = 2e-2


def cuda_cases(*, quick: bool = False, only: str | None = None) -> list[Case]:
    """The suite; targets are for an H200. An operator without a promise on a GPU has no case."""
    sparse = (1, 2, 4096, 128) if quick else (2, 16, 32760, 128)
    windows = (1, 64, 64, 6, 30) if quick else (4, 256, 256, 6, 30)
    scan = (2, 64, 1024) if quick else (8, 768, 16384)
    suite = {
        "linear_attention": [
            (f"(1, 16, {N}, 64)", partial(_linear, (1, 16, N, 64)), "copying its bytes", 1 / 0.7)
            for N in ((4096,) if quick else (16384, 131072, 1048576))
        ],
        "selective_scan": [
            (f"{scan}, state size 16", partial(_scan, scan), "copying its bytes", 1 / 0.6),
        ],
        "sparse_linear_attention": [
            (f"{sparse}, 95 % sparse", partial(_sparse, sparse), "the best fused attention", 1 / 10),
        ],
        "window_attention": [
            (f"{windows}, window 16", partial(_window, windows), "SDPA with the bias written out", 1 / 1.5),
        ],
    }
    if only is not None and only not in OPERATORS:
        raise ValueError(f"bench kernels: --only must be one of {', '.join(OPERATORS)}, got {only!r}")
    return [
        Case(
            name=f"{name}_cuda_{i}",
            title=f"{name}, {shape}, bfloat16, beside {beside}",
            build=build,
            targets=(Target(runner=OURS, what="time", limit=limit),),
            rounds=2 if quick else 20,
            judged=not quick,
        )
        for name, made in suite.items()
        if only in (None, name)
        for i, (shape, build, beside, limit) in enumerate(made)
    ]


def _draw(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)


def _beside(
    name: str,
    peer: Callable[[], object],
    ours: Callable[[], Tensor],
    holds: tuple[Tensor, ...],
    exact: bool = False,
) -> list[Runner]:
    """The peer and ours; where the peer computes something else (`exact` false), ours is compared with itself."""

    def inference(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return call()

        return run

    common = dict(holds=holds, tolerance=ROUNDED, dtype=torch.bfloat16)
    run = inference(ours)
    return [
        Runner(name=name, run=inference(peer), output=None if exact else run, **common),
        Runner(name=OURS, run=run, **common),
    ]


def _linear(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    q, k, v = (_draw(*shape, device=device, seed=i) for i in range(3))
    # Reads q, k, v and writes as much as v: two copies.
    return _beside("copy", lambda: (q.clone(), v.clone()), lambda: linear_attention(q, k, v), (q, k, v))


def _scan(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    batch, channels, length = shape
    u, delta = (_draw(*shape, device=device, seed=i) for i in range(2))
    B, C = (_draw(batch, 16, length, device=device, seed=i) for i in (2, 3))
    A = -torch.rand(channels, 16, generator=torch.Generator(device).manual_seed(4), device=device) - 0.1
    half = delta[: (batch + 1) // 2]
    return _beside(
        "copy",
        lambda: (u.clone(), half.clone(), B.clone()),
        lambda: selective_scan(u, delta, A, B, C, delta_softplus=True),
        (u, delta, A, B, C),
    )


def _sparse(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    q, k, v = (_draw(*shape, device=device, seed=i) for i in range(3))

    def full(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    def ours() -> Tensor:
        out = sparse_linear_attention(q, k, v, topk=0.05)
        return out.sparse + out.linear

    best = _fastest(full, device)
    return _beside(f"full (SDPA, {best.name.lower()})", partial(full, best), ours, (q, k, v))


def _fastest(full: Callable[[SDPBackend], Tensor], device: torch.device) -> SDPBackend:
    """Of the fused backends that run here, the one whose third call is the shortest."""
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            for _ in range(3):
                times[backend] = stopwatch(partial(full, backend), device)
        except RuntimeError:  # not built, or not for this GPU
            times.pop(backend, None)
    return min(times, key=times.__getitem__)


def _window(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    q, k, v = (_draw(*shape, device=device, seed=i) for i in range(3))
    bias = _draw(shape[3], 256, 256, device=device, seed=3)
    return _beside(
        "SDPA",
        lambda: peers.shifted_windows(q, k, v, bias, 16, 0),
        lambda: window_attention(q, k, v, bias, window_size=16),
        (q, k, v, bias),
        exact=True,
    )
