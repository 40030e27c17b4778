"""The `kernels` suite: each operator beside what one would use without it.

The peer of an attention is often another function (softmax attention, which linear attention replaces): there the agreement
that the harness asks for is with the operator's definition, computed another way, and only the time is the peer's.
The targets are those of the project's kernel milestone, stated before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.bench.harness import Case, Runner, Target
from visionhybrid.kernels.linear_attention import linear_attention
from visionhybrid.kernels.neighborhood_attention import neighborhood_attention
from visionhybrid.kernels.selective_scan import selective_scan
from visionhybrid.kernels.sparse_linear_attention import sparse_linear_attention

OURS = "visionhybrid"


def cases(*, quick: bool = False, only: str | None = None) -> list[Case]:
    """The suite; `quick` takes small inputs and two rounds, and judges nothing."""
    suite = {
        "linear_attention": _linear_cases(quick),
        "selective_scan": _scan_cases(quick),
        "sparse_linear_attention": _sparse_cases(quick),
        "neighborhood_attention": _neighborhood_cases(quick),
    }
    if only is not None and only not in suite:
        raise ValueError(f"bench kernels: --only must be one of {', '.join(suite)}, got {only!r}")
    return [case for name, made in suite.items() if only in (None, name) for case in made]


def _faster(times: float) -> Target:
    return Target(runner=OURS, what="time", limit=1 / times)


def _draw(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _forward(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
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
    beside_softmax = {256: None} if quick else {4096: 18.0, 16384: 36.0}
    lengths = (512,) if quick else (4096, 16384, 65536, 262144)
    return [
        *(
            Case(
                name=f"linear_attention_{N}",
                title=f"linear_attention beside softmax attention, (2, 8, {N}, 40)",
                build=partial(_linear, N),
                targets=() if times is None else (_faster(times),),
                rounds=2 if quick else 3,
                judged=not quick,
            )
            for N, times in beside_softmax.items()
        ),
        *(
            Case(
                name=f"linear_attention_length_{N}",
                title=f"linear_attention beside the formula, (2, 8, {N}, 40)",
                build=partial(_linear_formula, N),
                rounds=2 if quick else 7,
                judged=not quick,
            )
            for N in lengths
        ),
    ]


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention as it is usually written."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    normaliser = q @ k.mean(-2, keepdim=True).mT + 1e-6
    return q @ (k.mT @ v / k.shape[-2]) / normaliser


def _linear(N: int, device: torch.device) -> list[Runner]:
    q, k, v = (_draw(2, 8, N, 40, device=device, seed=i) for i in range(3))
    softmax = _forward(lambda: F.scaled_dot_product_attention(q, k, v))
    return [
        Runner(
            name="softmax (SDPA)", run=softmax, output=_forward(lambda: _formula(q, k, v)), holds=(q, k, v)
        ),
        Runner(name=OURS, run=_forward(lambda: linear_attention(q, k, v)), holds=(q, k, v)),
    ]


def _linear_formula(N: int, device: torch.device) -> list[Runner]:
    q, k, v = (_draw(2, 8, N, 40, device=device, seed=i) for i in range(3))
    return [
        Runner(name="formula", run=_forward(lambda: _formula(q, k, v)), holds=(q, k, v)),
        Runner(name=OURS, run=_forward(lambda: linear_attention(q, k, v)), holds=(q, k, v)),
    ]


# ---- selective scan


def _scan_cases(quick: bool) -> list[Case]:
    one, sixteen = ((1, 8, 64), (1, 8, 64)) if quick else ((8, 96, 3136), (4, 192, 1024))
    common = dict(rounds=2 if quick else 5, judged=not quick)
    return [
        Case(
            name="selective_scan_1",
            title=f"selective_scan returning states, state size 1, {one}, beside one step a token",
            build=partial(_scan, one, 1),
            targets=(_faster(25),),
            **common,
        ),
        Case(
            name="selective_scan_1_copy",
            title=f"selective_scan returning states, state size 1, {one}, beside copying its bytes once",
            build=partial(_scan_copy, one),
            targets=(Target(runner=OURS, what="time", limit=6),),
            **common,
        ),
        Case(
            name="selective_scan_16",
            title=f"selective_scan, state size 16, {sixteen}, beside one step a token",
            build=partial(_scan, sixteen, 16),
            targets=(_faster(15),),
            **common,
        ),
    ]


def _scan_inputs(shape: tuple[int, int, int], N: int, device: torch.device) -> dict[str, Tensor]:
    batch, channels, length = shape
    return dict(
        u=_draw(*shape, device=device),
        delta=_draw(*shape, device=device, seed=1),
        A=-_draw(channels, N, device=device, seed=2).exp(),
        B=_draw(batch, N, length, device=device, seed=3),
        delta_bias=_draw(channels, device=device, seed=4),
    ) | ({} if N == 1 else dict(C=_draw(batch, N, length, device=device, seed=5)))


def _steps(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor, C: Tensor | None = None
) -> Tensor:
    """The recurrence as the authors' reference has it: decays and inputs first, then one step a token."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h, out = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + entering[:, :, t]
        out.append(h if C is None else torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return torch.stack(out, -1)


def _scan(shape: tuple[int, int, int], N: int, device: torch.device) -> list[Runner]:
    inputs = _scan_inputs(shape, N, device)
    holds = tuple(inputs.values())
    return [
        Runner(name="one step a token", run=_forward(lambda: _steps(**inputs)), holds=holds),
        Runner(name=OURS, run=_forward(lambda: selective_scan(**inputs, delta_softplus=True)), holds=holds),
    ]


def _scan_copy(shape: tuple[int, int, int], device: torch.device) -> list[Runner]:
    inputs = _scan_inputs(shape, 1, device)
    scan = _forward(lambda: selective_scan(**inputs, delta_softplus=True))
    moved = (inputs["u"], inputs["delta"], inputs["B"])

    def copy() -> Tensor:
        # Read every input once, write as much as the result.
        copies = [x.clone() for x in moved]
        return copies[0]

    return [
        Runner(name="copy", run=copy, output=scan, holds=tuple(inputs.values())),
        Runner(name=OURS, run=scan, holds=tuple(inputs.values())),
    ]


# ---- sparse linear attention


def _sparse_cases(quick: bool) -> list[Case]:
    shape = (1, 2, 512, 64) if quick else (1, 8, 8192, 64)
    common = dict(rounds=2 if quick else 3, judged=not quick)
    return [
        Case(
            name="sparse_linear_attention",
            title=f"sparse_linear_attention, {shape}, 95 % sparse, beside full attention",
            build=partial(_sparse, shape),
            targets=(_faster(6),),
            **common,
        ),
        Case(
            name="sparse_linear_attention_train",
            title=f"sparse_linear_attention, {shape}, 95 % sparse, forward and backward, beside full attention",
            build=partial(_sparse_train, shape),
            targets=(_faster(4),),
            **common,
        ),
    ]


def _sparse_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = sparse_linear_attention(q, k, v, topk=0.05)
    return out.sparse + out.linear


def _sparse(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    q, k, v = (_draw(*shape, device=device, seed=i) for i in range(3))
    ours = _forward(lambda: _sparse_call(q, k, v))
    return [
        Runner(
            name="full (SDPA)",
            run=_forward(lambda: F.scaled_dot_product_attention(q, k, v)),
            output=ours,
            holds=(q, k, v),
        ),
        Runner(name=OURS, run=ours, holds=(q, k, v)),
    ]


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


def _gathered(q: Tensor, k: Tensor, v: Tensor, K: int) -> Tensor:
    """Neighbourhoods as an index, keys and values gathered: (B, heads, H, W, K * K, D) of each."""

    def windows(side: int) -> Tensor:
        start = (torch.arange(side) - K // 2).clamp(0, side - K)
        return (start[:, None] + torch.arange(K)).to(q.device)  # (side, K)

    rows, columns = windows(q.shape[2])[:, None, :, None], windows(q.shape[3])[None, :, None, :]
    keys, values = (x[:, :, rows, columns].flatten(4, 5) for x in (k, v))
    weights = (torch.einsum("bhxyd,bhxynd->bhxyn", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhxyn,bhxynd->bhxyd", weights, values)


def _neighborhood(shape: tuple[int, ...], device: torch.device) -> list[Runner]:
    q, k, v = (_draw(*shape, device=device, seed=i) for i in range(3))
    return [
        Runner(name="gathered", run=_forward(lambda: _gathered(q, k, v, 11)), holds=(q, k, v)),
        Runner(
            name=OURS, run=_forward(lambda: neighborhood_attention(q, k, v, kernel_size=11)), holds=(q, k, v)
        ),
    ]
