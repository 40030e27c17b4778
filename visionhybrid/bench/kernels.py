"""The `kernels` suite: each operator beside what one would use without it. On a GPU: `cuda.py`.

The peer of an attention is often another function (softmax attention, which linear attention replaces): there the agreement
that the harness asks for is with the operator's definition, computed another way, and only the time is the peer's.
The targets are those of the project's kernel milestone, stated before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.bench import peers
from visionhybrid.bench.cuda import cuda_cases as cuda_cases
from visionhybrid.bench.harness import Case, Runner, Target
from visionhybrid.kernels import compiler
from visionhybrid.kernels.linear_attention import linear_attention
from visionhybrid.kernels.neighborhood_attention import neighborhood_attention
from visionhybrid.kernels.selective_scan import selective_scan
from visionhybrid.kernels.sparse_linear_attention import sparse_linear_attention
from visionhybrid.kernels.window_attention import window_attention

OURS = "visionhybrid"
# The scan's C++, taken on request; judged where it can be compiled.
COMPILED = "visionhybrid, native"


def cases(*, quick: bool = False, only: str | None = None) -> list[Case]:
    """The suite; `quick` takes small inputs and two rounds, and judges nothing."""
    suite = {
        "linear_attention": _linear_cases(quick),
        "selective_scan": _scan_cases(quick),
        "sparse_linear_attention": _sparse_cases(quick),
        "neighborhood_attention": _neighborhood_cases(quick),
        "window_attention": _window_cases(quick),
    }
    if only is not None and only not in suite:
        raise ValueError(f"bench kernels: --only must be one of {', '.join(suite)}, got {only!r}")
    found = [case for name, made in suite.items() if only in (None, name) for case in made]
    return [replace(case, apart=not quick) for case in found]


def _faster(times: float) -> Target:
    return Target(runner=OURS, what="time", limit=1 / times)


def _draw(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _forward(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return call()

    return run


def _both(
    call: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward."""

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*leaves), leaves, cotangent)

    return run


# ---- linear attention


def _linear_cases(quick: bool) -> list[Case]:
    """Softmax attention stands beside it up to 16k tokens: beyond, one call of it takes minutes."""
    beside_softmax = {256: None} if quick else {4096: 18.0, 16384: 36.0}
    lengths = (256, 512) if quick else (4096, 16384, 65536, 262144)
    short, long = lengths[0], lengths[-1]
    return [
        *(
            Case(
                name=f"linear_attention_{N}",
                title=f"linear_attention, (2, 8, {N}, 40), beside "
                + ("softmax attention" if N in beside_softmax else "the formula"),
                build=partial(_linear, N, softmax=N in beside_softmax),
                targets=(_faster(beside_softmax[N]),) if beside_softmax.get(N) else (),
                rounds=2 if quick else 3 if N == 16384 else 5,
                judged=not quick,
                family="linear_attention (2, 8, N, 40)",
                length=N,
            )
            for N in lengths
        ),
        Case(
            name="linear_attention_linear",
            title=f"linear_attention, {long} tokens in one call, beside the same number in calls of {short}",
            build=partial(_linear_growth, short, long),
            targets=(Target(runner=OURS, what="time", limit=1.1),),
            rounds=2 if quick else 5,
            judged=not quick,
        ),
    ]


def _linear(N: int, device: torch.device, *, softmax: bool) -> list[Runner]:
    q, k, v = (_draw(2, 8, N, 40, device=device, seed=i) for i in range(3))
    formula = _forward(lambda: peers.formula(q, k, v))
    runners = [
        Runner(name="formula", run=formula, holds=(q, k, v)),
        Runner(name=OURS, run=_forward(lambda: linear_attention(q, k, v)), holds=(q, k, v)),
    ]
    if softmax:
        full = _forward(lambda: F.scaled_dot_product_attention(q, k, v))
        runners.insert(0, Runner(name="softmax (SDPA)", run=full, output=formula, holds=(q, k, v)))
    return runners


def _linear_growth(short: int, long: int, device: torch.device) -> list[Runner]:
    """Time of the long sequence over that of its pieces, in turns: 1 means linear in the number of tokens."""
    q, k, v = (_draw(2, 8, long, 40, device=device, seed=i) for i in range(3))
    pieces = [tuple(x[:, :, i : i + short].contiguous() for x in (q, k, v)) for i in range(0, long, short)]

    def calls() -> None:
        for piece in pieces:
            linear_attention(*piece)

    def kept() -> list[Tensor]:
        return [linear_attention(*piece) for piece in pieces]

    def first() -> Tensor:
        return linear_attention(*pieces[0])

    runs = {
        f"calls of {short}": calls,
        # Fresh pages for all results, as in one call; those of a call whose result is dropped serve the next.
        f"calls of {short}, results kept": kept,
        # What the system takes to hand out that memory, whoever computes what goes into it.
        "the result filled with zeros": lambda: torch.empty_like(v).fill_(0),
        OURS: lambda: linear_attention(q, k, v),
    }
    return [
        Runner(name=name, run=_forward(run), output=_forward(first), holds=(q, k, v))
        for name, run in runs.items()
    ]


# ---- selective scan


def _scan_cases(quick: bool) -> list[Case]:
    one, sixteen = ((1, 8, 64), (1, 8, 64)) if quick else ((8, 96, 3136), (4, 192, 1024))
    common = dict(rounds=2 if quick else 7, judged=not quick)
    states, outputs = (
        f"selective_scan returning states, state size 1, {one}",
        f"selective_scan, state size 16, {sixteen}",
    )
    cases = [
        Case(
            name="selective_scan_1_copy",
            title=f"{states}, beside copying its bytes once",
            build=partial(_scan_copy, one),
            targets=(Target(runner=_judged_scan(), what="time", limit=6),),
            **common,
        )
    ]
    for N, shape, title, times in ((1, one, states, 25), (16, sixteen, outputs, 15)):
        target = Target(runner=_judged_scan(), what="time", limit=1 / times)
        cases += [
            Case(
                name=f"selective_scan_{N}",
                title=f"{title}, beside one step a token",
                build=partial(_scan, shape, N, "one step a token", peers.steps),
                targets=(target,),
                **common,
            ),
            Case(
                name=f"selective_scan_{N}_definition",
                title=f"{title}, beside its definition in float32",
                build=partial(_scan, shape, N, "definition", peers.recurrence),
                **common,
            ),
        ]
    return cases


def _judged_scan() -> str:
    return OURS if compiler.missing() else COMPILED


def _scan_inputs(shape: tuple[int, int, int], N: int, device: torch.device) -> dict[str, Tensor]:
    batch, channels, length = shape
    return dict(
        u=_draw(*shape, device=device),
        delta=_draw(*shape, device=device, seed=1),
        A=-_draw(channels, N, device=device, seed=2).exp(),
        B=_draw(batch, N, length, device=device, seed=3),
        delta_bias=_draw(channels, device=device, seed=4),
    ) | ({} if N == 1 else dict(C=_draw(batch, N, length, device=device, seed=5)))


def _our_scans() -> dict[str, Callable[..., Tensor]]:
    """What "auto" takes unasked, and the C++ where there is a compiler."""
    names = {OURS: "eager"} | ({} if compiler.missing() else {COMPILED: "native"})
    return {
        name: partial(selective_scan, delta_softplus=True, backend=backend) for name, backend in names.items()
    }


def _scan(
    shape: tuple[int, int, int], N: int, name: str, peer: Callable[..., Tensor], device: torch.device
) -> list[Runner]:
    inputs = _scan_inputs(shape, N, device)
    return [
        Runner(name=name, run=_forward(partial(call, **inputs)), holds=tuple(inputs.values()))
        for name, call in ({name: peer} | _our_scans()).items()
    ]


def _scan_copy(shape: tuple[int, int, int], device: torch.device) -> list[Runner]:
    """Beside the two things that no scan can do without: its bytes, and the exponentials of steps and decays."""
    inputs = _scan_inputs(shape, 1, device)
    ours = {name: _forward(partial(call, **inputs)) for name, call in _our_scans().items()}
    output = ours[OURS]
    moved = (inputs["u"], inputs["delta"], inputs["B"])
    # Softplus takes an exponential and a logarithm of the like; a piece stays in the cache.
    piece = torch.zeros(2**16, device=device)
    pieces = -(-3 * inputs["u"].numel() // piece.numel())

    def copy() -> Tensor:
        # Read every input once, write as much as the result.
        copies = [x.clone() for x in moved]
        return copies[0]

    def exponentials() -> None:
        for _ in range(pieces):
            torch.exp2(piece, out=piece)

    holds = tuple(inputs.values())
    return [
        Runner(name="copy", run=copy, output=output, holds=holds),
        Runner(name="exponentials", run=_forward(exponentials), output=output, holds=holds),
        *(Runner(name=name, run=run, holds=holds) for name, run in ours.items()),
    ]


# ---- sparse linear attention


def _sparse_cases(quick: bool) -> list[Case]:
    """Full attention stands beside it up to 8k tokens."""
    lengths = (512,) if quick else (2048, 8192, 32768)
    target = 512 if quick else 8192
    heads = 2 if quick else 8
    common = dict(rounds=2 if quick else 3, judged=not quick)
    return [
        *(
            Case(
                name=f"sparse_linear_attention_{N}",
                title=f"sparse_linear_attention, (1, {heads}, {N}, 64), 95 % sparse"
                + (", beside full attention" if target >= N else ""),
                build=partial(_sparse, (1, heads, N, 64), full=target >= N),
                targets=(_faster(6),) if target == N else (),
                family=f"sparse_linear_attention (1, {heads}, N, 64), 95 % sparse",
                length=N,
                **common,
            )
            for N in lengths
        ),
        Case(
            name="sparse_linear_attention_train",
            title=f"sparse_linear_attention, (1, {heads}, {target}, 64), 95 % sparse, forward and backward, "
            "beside full attention",
            build=partial(_sparse_train, (1, heads, target, 64)),
            targets=(_faster(4),),
            **common,
        ),
    ]


def _sparse_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = sparse_linear_attention(q, k, v, topk=0.05)
    return out.sparse + out.linear


def _sparse(shape: tuple[int, ...], device: torch.device, *, full: bool) -> list[Runner]:
    q, k, v = (_draw(*shape, device=device, seed=i) for i in range(3))
    ours = Runner(name=OURS, run=_forward(lambda: _sparse_call(q, k, v)), holds=(q, k, v))
    if not full:
        return [ours]
    dense = _forward(lambda: F.scaled_dot_product_attention(q, k, v))
    return [Runner(name="full (SDPA)", run=dense, output=ours.run, holds=(q, k, v)), ours]


def _sparse_train(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    leaves = [_draw(*shape, device=device, seed=i).requires_grad_() for i in range(3)]
    cotangent = _draw(*shape, device=device, seed=3)
    ours = _both(_sparse_call, leaves, cotangent)
    full = _both(F.scaled_dot_product_attention, leaves, cotangent)
    return [
        Runner(name="full (SDPA)", run=full, output=lambda: ours()[0], holds=tuple(leaves)),
        Runner(name=OURS, run=ours, output=lambda: ours()[0], holds=tuple(leaves)),
    ]


# ---- neighbourhood attention


def _neighborhood_cases(quick: bool) -> list[Case]:
    shape = (1, 1, 16, 16, 8) if quick else (8, 2, 56, 56, 24)
    return [
        Case(
            name="neighborhood_attention",
            title=f"neighborhood_attention, {shape}, kernel 11, beside gathering the windows",
            build=partial(_neighborhood, shape),
            targets=(_faster(8), Target(runner=OURS, what="memory", limit=0.25)),
            rounds=2 if quick else 5,
            judged=not quick,
        )
    ]


def _neighborhood(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    q, k, v = (_draw(*shape, device=device, seed=i) for i in range(3))
    return [
        Runner(name="gathered", run=_forward(lambda: peers.gathered(q, k, v, 11)), holds=(q, k, v)),
        Runner(
            name=OURS, run=_forward(lambda: neighborhood_attention(q, k, v, kernel_size=11)), holds=(q, k, v)
        ),
    ]


# ---- window attention


def _window_cases(quick: bool) -> list[Case]:
    shape = (1, 32, 32, 2, 30) if quick else (1, 128, 128, 6, 30)
    return [
        Case(
            name=f"window_attention{'_train' if train else ''}",
            title=f"window_attention, {shape}, window 16 shifted by 8, bias, "
            + ("forward and backward, " if train else "")
            + "beside SDPA with the bias written out",
            build=partial(_window, shape, train=train),
            rounds=2 if quick else 5,
            judged=not quick,
        )
        for train in (False, True)
    ]


def _window(shape: tuple[int, ...], device: torch.device, *, train: bool) -> list[Runner]:
    leaves = [_draw(*shape, device=device, seed=i) for i in range(3)]
    leaves.append(_draw(shape[3], 256, 256, device=device, seed=3))
    calls = {
        "SDPA": lambda q, k, v, bias: peers.shifted_windows(q, k, v, bias, 16, 8),
        OURS: lambda q, k, v, bias: window_attention(q, k, v, bias, window_size=16, shift=8),
    }
    if not train:
        return [
            Runner(name=name, run=_forward(partial(call, *leaves)), holds=tuple(leaves))
            for name, call in calls.items()
        ]
    leaves, cotangent = [x.requires_grad_() for x in leaves], _draw(*shape, device=device, seed=4)
    return [
        Runner(name=name, run=run, output=lambda run=run: run()[0], holds=tuple(leaves))
        for name, run in ((name, _both(call, leaves, cotangent)) for name, call in calls.items())
    ]
