"""The selective scan in plain PyTorch: the CPU path.

Two levels. The L tokens of a channel are n blocks of Q; Q steps run the blocks of many channels side by side and also
build the products of the decays inside a block, a logarithmic scan over the n block ends gives what enters each block,
and one multiply-add brings it in. About 2 sqrt(L) calls, and only products of decays: nothing is divided.

Channels pass in chunks. A chunk lies as (Q, N, batch, channel, n), so that a step is one contiguous stretch. The backward
pass computes the states again from the inputs and runs the same scan the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import ceil, isqrt, prod

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.kernels.precision import widened
from visionhybrid.kernels.selective_scan import ops

# States of one chunk (channels x tokens x N): 4 MB in float32, of which a handful stay in a 32 MB L3.
CHUNK = 2**20


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


class Blocks:
    """How `length` tokens become n blocks of Q, and back."""

    def __init__(self, length: int):
        self.length = length
        self.Q = isqrt(length - 1) + 1
        self.n = ceil(length / self.Q)
        self.padding = self.n * self.Q - length  # less than Q: it is all in the last block

    def cut(self, x: Tensor, out: Tensor) -> Tensor:
        """(..., L) -> `out` (Q, ..., n), zeros at the end."""
        x = F.pad(x, (0, self.padding)) if self.padding else x
        # A contiguous matrix transposed into another is the copy that PyTorch does fast.
        out.view(self.Q, -1).copy_(x.reshape(-1, self.Q).t())
        return out

    def join(self, x: Tensor, out: Tensor) -> None:
        """(Q, ..., n) -> `out` (..., L)."""
        rows = x.reshape(self.Q, -1).t()
        if out.is_contiguous() and not self.padding:
            out.view(-1, self.Q).copy_(rows)
        else:
            out.copy_(rows.reshape(*out.shape[:-1], -1)[..., : self.length])


def _scan_(decay: Tensor, h: Tensor, reverse: bool) -> Tensor:
    """h_t <- h_t + decay_t h_{t-1} in place and in order; `decay` ends as its running product within blocks."""
    decays, states = decay.unbind(0), h.unbind(0)
    order = range(len(states))[::-1] if reverse else range(len(states))
    for before, now in pairwise(order):
        states[now].addcmul_(decays[now], states[before])
        decays[now].mul_(decays[before])
    n, product, ends = h.shape[-1], decays[order[-1]], states[order[-1]]
    if n == 1:
        return h
    later, earlier = slice(1, None), slice(None, -1)
    # What each block ends with, from what it adds and multiplies: the reach doubles each time.
    reach = 1
    while reach < n:
        here, there = slice(reach, None), slice(None, -reach)
        if reverse:
            here, there = there, here
        old_product, old_ends = product, ends
        product, ends = old_product.clone(), old_ends.clone()
        ends[..., here].addcmul_(old_product[..., here], old_ends[..., there])
        product[..., here].mul_(old_product[..., there])
        reach *= 2
    if reverse:
        later, earlier = earlier, later
    h[..., later].addcmul_(decay[..., later], ends[..., earlier])
    return h


def _before(x: Tensor, reverse: bool, out: Tensor) -> Tensor:
    """x_{t-1} at t (x_{t+1} if `reverse`), 0 at the start."""
    start, end = (-1, 0) if reverse else (0, -1)
    later, earlier = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    out[later] = x[earlier]
    out[start][..., later] = x[end][..., earlier]
    out[start, ..., start] = 0
    return out


class Chunk:
    """Some rows of the batch and some channels of one group, cut into blocks: step, decay, input, B."""

    def __init__(self, space, rows, own, group, u, delta, A, B, delta_bias, delta_softplus):
        self.space, self.blocks = space, Blocks(u.shape[2])
        u, delta = u[rows, own], delta[rows, own]
        Q, n, N = self.blocks.Q, self.blocks.n, A.shape[1]
        self.shape = (Q, *u.shape[:2], n)
        self.wide = (Q, N, *u.shape[:2], n)
        self.u = self.blocks.cut(u, space("u", self.shape))
        self.step = step = self.blocks.cut(delta, space("step", self.shape))
        if delta_bias is not None:
            step += delta_bias[own, None].to(step)
        if delta_softplus:
            # log(1 + exp(x)), and x where that is above 20, as in PyTorch: there the two agree to 2e-9.
            soft = torch.clamp(step, max=20, out=space("h", self.shape)).exp_().log1p_()
            torch.maximum(soft, step, out=step)
        if self.blocks.padding:
            # Decay 1 and input 0: padding passes the state through.
            step[-self.blocks.padding :, ..., -1] = 0
        self.B = self.grouped(B[rows, group], "B")
        self.A = A[own].to(step).t()[:, None, :, None]  # (N, 1, c, 1)
        self.decay = torch.mul(step[:, None], self.A, out=space("decay", self.wide)).exp_()

    def grouped(self, x: Tensor, name: str) -> Tensor:
        """(b, N, L) -> (Q, N, b, 1, n)."""
        shape = (self.blocks.Q, *x.shape[:2], self.blocks.n)
        return self.blocks.cut(x, self.space(name, shape)).transpose(1, 2)[:, :, :, None]

    def states(self, decay: Tensor, reverse: bool) -> Tensor:
        """(Q, N, b, c, n); uses `decay` up."""
        entering = torch.mul(self.step, self.u, out=self.space("entering", self.shape))
        h = torch.mul(entering[:, None], self.B, out=self.space("h", self.wide))
        return _scan_(decay, h, reverse)


def _chunks(u: Tensor, B: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """group, rows of the batch, channels: whole groups for several rows while they fit, else parts of a group."""
    batch, channels, length = u.shape
    groups, N = B.shape[1:3]
    per_group = channels // groups
    fit = max(1, CHUNK // (N * length))
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
        chunk = Chunk(space, rows, own, group, u, delta, A, B, delta_bias, delta_softplus)
        h = chunk.states(chunk.decay, reverse[group])
        if C is None:
            for n in range(A.shape[1]):
                chunk.blocks.join(h[:, n], out[rows, own, n])
            continue
        y = _sum(h.mul_(chunk.grouped(C[rows, group], "C")), 1)
        if D is not None:
            y.addcmul_(chunk.u, D[own, None].to(y))
        chunk.blocks.join(y, out[rows, own])
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
        chunk = Chunk(space, rows, own, group, u, delta, A, B, delta_bias, delta_softplus)
        blocks, decay = chunk.blocks, chunk.decay
        h = chunk.states(space("product", chunk.wide).copy_(decay), back)
        g, other = space("g", chunk.wide), space("product", chunk.wide)
        if C is None:
            for n in range(A.shape[1]):
                g[:, n] = blocks.cut(grad[rows, own, n], space("dy", chunk.shape))
        else:
            dy = blocks.cut(grad[rows, own], space("dy", chunk.shape))
            C_cut = chunk.grouped(C[rows, group], "C")
            _add(blocks, dC[rows, group], torch.mul(dy[:, None], h, out=g).sum(3))
            torch.mul(dy[:, None], C_cut, out=g)
        # The cotangent of a state gathers from the states after it.
        _scan_(_before(decay, not back, other), g, not back)
        carried = _before(h, back, other).mul_(decay).mul_(g)  # g_t a_t h_{t-1}
        dA[own] += torch.mul(carried, chunk.step[:, None], out=h).sum((0, 2, 4)).t()
        dstep = _sum(carried.mul_(chunk.A), 1)
        entering = space("entering", chunk.shape)  # step * u
        _add(blocks, dB[rows, group], torch.mul(g, entering[:, None], out=h).sum(3))
        gB = _sum(g.mul_(chunk.B), 1)
        dstep.addcmul_(gB, chunk.u)
        if delta_softplus:
            # The derivative of softplus is 1 - exp(-softplus); above 20, where softplus is the identity, that is 1.
            dstep.mul_(torch.neg(chunk.step, out=entering).expm1_().neg_())
        if blocks.padding:
            dstep[-blocks.padding :, ..., -1] = 0
        dx = gB.mul_(chunk.step)
        if D is not None:
            dD[own] += torch.mul(dy, chunk.u, out=entering).sum((0, 1, 3))
            dx.addcmul_(dy, D[own, None].to(dx))
        if delta_bias is not None:
            dbias[own] += dstep.sum((0, 1, 3))
        blocks.join(dx, du[rows, own])
        blocks.join(dstep, ddelta[rows, own])
    sums = zip((dA, dB, dC, dD, dbias), (A, B, C, D, delta_bias), strict=True)
    return du, ddelta, *(total if x is None else total.to(x.dtype) for total, x in sums)


def _sum(x: Tensor, dim: int) -> Tensor:
    """`x` summed; the sum of one is that one, and its memory."""
    return x.select(dim, 0) if x.shape[dim] == 1 else x.sum(dim)


def _add(blocks: Blocks, total: Tensor, x: Tensor) -> None:
    """`total` (b, N, L) += `x` (Q, N, b, n)."""
    x = x.transpose(1, 2)
    joined = x.new_empty(*x.shape[1:3], blocks.length)
    blocks.join(x, joined)
    total += joined


OPERATORS = ops.define("eager", scan, scan_backward)


def unsupported(*args) -> str | None:
    return None


def forward(*args) -> Tensor:
    return OPERATORS.scan(*args)
