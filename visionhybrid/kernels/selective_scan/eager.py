"""The selective scan in plain PyTorch: the CPU path.

Tokens lie as planes (RADIX, ..., n): token i * RADIX + j is element i of plane j, so that a step from one plane to the next
is one contiguous operation for n blocks at once. The steps leave in the last plane what each block ends with, which is the
same problem RADIX times shorter and is solved the same way; one multiply-add brings into each block what enters it. About
2 RADIX log(L) calls, three multiply-adds an element, and only products of decays: nothing is divided.

Exponentials are taken to base 2, as in the authors' kernel: PyTorch's exp2 runs vectorised on every CPU and is four times as
fast as its exp on some. The backward pass computes the states again from the inputs and runs the same scan the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil, e, log2, prod

import torch
from torch import Tensor

from visionhybrid.kernels.precision import widened
from visionhybrid.kernels.selective_scan import ops

# States worked on at once (channels x tokens x N): 4 MB in float32, of which a handful stay in a 32 MB L3.
CHUNK = 2**20
# Tokens of a block. Reading every eighth number costs PyTorch a quarter of reading every sixteenth; a smaller radix has more
# levels.
RADIX = 8
# log2(1 + 2^x) is x to the last bit of a float64 from here on.
LINEAR = 64.0


class Space:
    """Memory by name, used again by every chunk: fresh pages cost more than the arithmetic on them."""

    def __init__(self, like: Tensor):
        self.kind, self.device = widened(like), like.device
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        size = prod(shape)
        if name not in self.held or len(self.held[name]) < size:
            self.held[name] = torch.empty(size, dtype=self.kind, device=self.device)
        return self.held[name][:size].view(shape)


def _planes(x: Tensor) -> Tensor:
    """(..., n * RADIX) as (RADIX, ..., n), a view."""
    return x.unflatten(-1, (-1, RADIX)).movedim(-1, 0)


def _pieces(x: Tensor, planes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of (..., L) and of (RADIX, ..., n) that are alike: whole blocks, then the tokens that fill none."""
    rest = x.shape[-1] % RADIX
    whole = x.shape[-1] - rest
    yield _planes(x[..., :whole]), planes[..., : whole // RADIX]
    if rest:
        yield x[..., whole:].movedim(-1, 0), planes[:rest, ..., -1]


def _rest(x: Tensor, length: int) -> Tensor:
    """The part of planes (RADIX, ..., n) that is no token."""
    return x[length % RADIX or RADIX :, ..., -1]


def _cut(x: Tensor, out: Tensor) -> Tensor:
    """(..., L) -> `out` (RADIX, ..., n), zeros at the end."""
    for tokens, planes in _pieces(x, out):
        planes.copy_(tokens)
    _rest(out, x.shape[-1]).zero_()
    return out


def _join(x: Tensor, out: Tensor) -> None:
    """(RADIX, ..., n) -> `out` (..., L)."""
    for tokens, planes in _pieces(out, x):
        tokens.copy_(planes)


def _steps_(decays: Sequence[Tensor], states: Sequence[Tensor], products: bool) -> None:
    """h_t <- h_t + decay_t h_{t-1} along the sequences; `products`: each decay becomes the product so far."""
    for before, now in pairwise(range(len(states))):
        states[now].addcmul_(decays[now], states[before])
        if products:
            decays[now].mul_(decays[before])


def _scan_planes_(decay: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """h_t <- h_t + decay_t h_{t-1} over (RADIX, ..., n), in place; uses `decay` up."""
    n, turn = h.shape[-1], -1 if reverse else 1
    _steps_(decay.unbind(0)[::turn], h.unbind(0)[::turn], products=n > 1)
    if n == 1:
        return h
    others, last = (slice(1, None), 0) if reverse else (slice(None, -1), -1)
    earlier, later = (slice(1, None), slice(None, -1)) if reverse else (slice(None, -1), slice(1, None))
    _scan_(decay[last], h[last], reverse)
    h[others][..., later].addcmul_(decay[others][..., later], h[last][..., earlier])
    return h


def _scan_(decay: Tensor, h: Tensor, reverse: bool) -> None:
    """h_t <- h_t + decay_t h_{t-1} over (..., L), in place."""
    length, turn = h.shape[-1], -1 if reverse else 1
    rest = length % RADIX if length > RADIX else length - 1
    # Blocks first; the tokens that fill none, and the one that they follow, one by one.
    tail = slice(0, rest + 1) if reverse else slice(length - rest - 1, length)
    blocks = slice(rest, length) if reverse else slice(0, length - rest)
    if length > RADIX:
        planes = [_planes(x[..., blocks]).contiguous() for x in (decay, h)]
        _planes(h[..., blocks]).copy_(_scan_planes_(*planes, reverse))
    if rest:
        decays, states = (x[..., tail].unbind(-1)[::turn] for x in (decay, h))
        _steps_(decays, states, products=False)


def _after(decay: Tensor, reverse: bool, out: Tensor) -> Tensor:
    """decay_{t+1} at t (decay_{t-1} if `reverse`), 0 at the end: what leads from the next state's gradient to this one's."""
    if reverse:
        out[1:] = decay[:-1]
        out[0][..., 1:] = decay[-1][..., :-1]
        out[0][..., 0] = 0
    else:
        out[:-1] = decay[1:]
        out[-1][..., :-1] = decay[0][..., 1:]
        out[-1][..., -1] = 0
    return out


def _carried(decay: Tensor, h: Tensor, reverse: bool, out: Tensor) -> Tensor:
    """decay_t h_{t-1} (decay_t h_{t+1} if `reverse`), 0 at the start."""
    if reverse:
        torch.mul(decay[:-1], h[1:], out=out[:-1])
        torch.mul(decay[-1][..., :-1], h[0][..., 1:], out=out[-1][..., :-1])
        out[-1][..., -1] = 0
    else:
        torch.mul(decay[1:], h[:-1], out=out[1:])
        torch.mul(decay[0][..., 1:], h[-1][..., :-1], out=out[0][..., 1:])
        out[0][..., 0] = 0
    return out


class Chunk:
    """Some rows of the batch and some channels of one group: `step` and `entering` (step u) as planes (RADIX, b, c, n).

    `spent`: they are read once, and decays and states of a single state may take their place.
    """

    def __init__(self, space, group, rows, own, u, delta, A, B, delta_bias, delta_softplus, *, spent=False):
        self.space = space
        u, delta = u[rows, own], delta[rows, own]
        length, n, self.N = u.shape[2], ceil(u.shape[2] / RADIX), A.shape[1]
        self.shape = (RADIX, *u.shape[:2], n)
        self.u, self.spent = u, spent and self.N == 1
        self.step, self.entering = step, entering = space("step", self.shape), space("entering", self.shape)
        _cut(delta, step)
        if delta_bias is not None:
            step += delta_bias[own, None].to(step)
        if delta_softplus:
            # log(1 + e^x), and x where they agree; entering's memory is free so far.
            soft = torch.mul(step, log2(e), out=entering).clamp_(max=LINEAR).exp2_().log1p_()
            torch.maximum(step, soft, out=step)
        # Decay 1 and input 0: what fills the last block passes the state through.
        _rest(step, length).zero_()
        _cut(u, entering).mul_(step)
        self.A = A[own].to(step).t()[:, None, :, None]  # (N, 1, c, 1)
        self.B = self.grouped(B[rows, group], "B")

    def grouped(self, x: Tensor, name: str) -> Tensor:
        """(b, N, L) -> (RADIX, N, b, 1, n)."""
        shape = (RADIX, x.shape[1], x.shape[0], self.shape[-1])
        return _cut(x.transpose(0, 1), self.space(name, shape))[:, :, :, None]

    def pieces(self) -> Iterator[slice]:
        """The states, as many at a time as fit."""
        size = max(1, CHUNK // max(1, prod(self.shape)))
        return (slice(start, min(start + size, self.N)) for start in range(0, self.N, size))

    def wide(self, name: str, states: slice) -> Tensor:
        """Memory of (RADIX, states, b, c, n)."""
        return self.space(name, (RADIX, states.stop - states.start, *self.shape[1:]))

    def decay(self, states: slice) -> Tensor:
        step = self.step[:, None]
        out = step if self.spent else self.wide("decay", states)
        return torch.mul(step, self.A[states] * log2(e), out=out).exp2_()

    def states(self, decay: Tensor, states: slice, reverse: bool) -> Tensor:
        """(RADIX, states, b, c, n); uses `decay` up."""
        entering = self.entering[:, None]
        h = torch.mul(entering, self.B[:, states], out=entering if self.spent else self.wide("h", states))
        return _scan_planes_(decay, h, reverse)


def _chunks(u: Tensor, B: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """group, rows of the batch, channels: whole groups for several rows while they fit, else parts of a group."""
    batch, channels, length = u.shape
    groups = B.shape[1]
    per_group = channels // groups
    fit = max(1, CHUNK // length)
    rows, part = max(1, fit // per_group), min(fit, per_group)
    for group in range(groups):
        for row in range(0, batch, rows):
            for first in range(group * per_group, (group + 1) * per_group, part):
                yield group, slice(row, row + rows), slice(first, min(first + part, (group + 1) * per_group))


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
) -> Tensor:
    out, space = ops.result(u, A, C), Space(u)
    for group, rows, own in _chunks(u, B):
        chunk = Chunk(space, group, rows, own, u, delta, A, B, delta_bias, delta_softplus, spent=True)
        if C is not None:
            y, C_cut = space("y", chunk.shape).zero_(), chunk.grouped(C[rows, group], "C")
        for states in chunk.pieces():
            h = chunk.states(chunk.decay(states), states, reverse[group])
            for i, n in enumerate(range(states.start, states.stop)):
                if C is None:
                    _join(h[:, i], out[rows, own, n])
                else:
                    y.addcmul_(h[:, i], C_cut[:, n])
        if D is not None:
            y.addcmul_(_cut(chunk.u, space("u", chunk.shape)), D[own, None].to(y))
        if C is not None:
            _join(y, out[rows, own])
    return out


def scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    space = Space(u)
    du, ddelta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    # Sums over chunks, in the wide type.
    dA, dB, dC, dD, dbias = (
        u.new_zeros(0 if x is None else x.shape, dtype=space.kind) for x in (A, B, C, D, delta_bias)
    )
    for group, rows, own in _chunks(u, B):
        back = reverse[group]
        chunk = Chunk(space, group, rows, own, u, delta, A, B, delta_bias, delta_softplus)
        # Gradients of the step beside that through step u, and of step u.
        dstep, dentering = (space(name, chunk.shape).zero_() for name in ("dstep", "dentering"))
        if C is not None:
            dy = _cut(grad[rows, own], space("dy", chunk.shape))
            C_cut = chunk.grouped(C[rows, group], "C")
        for states in chunk.pieces():
            decay = chunk.decay(states)
            g, other = chunk.wide("g", states), chunk.wide("other", states)
            h = chunk.states(other.copy_(decay), states, back)
            if C is None:
                _cut(grad[rows, own, states].transpose(1, 2).transpose(0, 1), g)
            else:
                _add(dC[rows, group, states], torch.mul(dy[:, None], h, out=g).sum(3))
                torch.mul(dy[:, None], C_cut[:, states], out=g)
            # The cotangent of a state gathers from the states after it.
            _scan_planes_(_after(decay, back, other), g, not back)
            carried = _carried(decay, h, back, other).mul_(g)  # g_t decay_t h_{t-1}
            dA[own, states] += torch.mul(carried, chunk.step[:, None], out=h).sum((0, 2, 4)).t()
            _add(dB[rows, group, states], torch.mul(g, chunk.entering[:, None], out=h).sum(3))
            for i, n in enumerate(range(states.start, states.stop)):
                dstep.addcmul_(carried[:, i], chunk.A[n])
                dentering.addcmul_(g[:, i], chunk.B[:, n])
        dx = space("dx", chunk.shape)
        u_cut = _cut(chunk.u, space("u", chunk.shape))
        dstep.addcmul_(dentering, u_cut)
        if delta_softplus:
            # The derivative of softplus is 1 - exp(-softplus); above 20, where softplus is the identity, that is 1.
            dstep.mul_(torch.neg(chunk.step, out=dx).expm1_().neg_())
        torch.mul(dentering, chunk.step, out=dx)
        if D is not None:
            dD[own] += torch.mul(dy, u_cut, out=dentering).sum((0, 1, 3))
            dx.addcmul_(dy, D[own, None].to(dx))
        _join(dx, du[rows, own])
        _join(dstep, ddelta[rows, own])
        if delta_bias is not None:
            _rest(dstep, u.shape[2]).zero_()
            dbias[own] += dstep.sum((0, 1, 3))
    sums = zip((dA, dB, dC, dD, dbias), (A, B, C, D, delta_bias), strict=True)
    dA, dB, dC, dD, dbias = (total if x is None else total.to(x.dtype) for total, x in sums)
    return du, ddelta, dA, dB, dC, dD, dbias


def _add(total: Tensor, x: Tensor) -> None:
    """`total` (b, N, L) += `x` (RADIX, N, b, n)."""
    joined = total.new_empty(x.shape[1], x.shape[2], total.shape[-1])
    _join(x, joined)
    total += joined.transpose(0, 1)


OPERATORS = ops.define("eager", scan, scan_backward)


def unsupported(*args) -> str | None:
    return None


def forward(*args) -> Tensor:
    return OPERATORS.scan(*args)
