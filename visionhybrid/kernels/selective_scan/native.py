"""The selective scan in C++: one pass over its operands instead of the ten of `eager.py`, one for each state backward.

Compiled when first called (`kernels/compiler.py`); taken on request, or by "auto" where `VISIONHYBRID_NATIVE=1` is set.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from visionhybrid.kernels import compiler
from visionhybrid.kernels.compiler import address
from visionhybrid.kernels.selective_scan import ops

SOURCE = Path(__file__).with_suffix(".cpp")
# Sums over the channels of a group are kept in parts, so many in all: enough for the threads of one machine.
PARTS = 64


class _Scans(ctypes.Structure):
    """`Scans` of `native.cpp`, and what it points to."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("u", "delta", "A", "B", "C", "D", "bias", "reverse")),
        *((name, ctypes.c_int64) for name in ("soft", "batch", "channels", "groups", "N", "length")),
    ]

    def __init__(self, u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
        operands = [None if x is None else x.float().contiguous() for x in (u, delta, A, B, C, D, delta_bias)]
        self.held = (*operands, torch.tensor(reverse, dtype=torch.uint8))
        sizes = (u.shape[0], u.shape[1], B.shape[1], A.shape[1], u.shape[2])
        super().__init__(*map(address, self.held), delta_softplus, *sizes)


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """As in `eager.py`."""
    scans = _Scans(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    out = ops.result(scans.held[0], A, C)
    states = u.new_empty(*u.shape[:2], A.shape[1], dtype=torch.float32)
    run = compiler.library(SOURCE).selective_scan
    run(ctypes.byref(scans), ctypes.c_int64(torch.get_num_threads()), address(states), address(out))
    return out if C is None else out.to(u.dtype)


def scan_backward(grad, u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    scans = _Scans(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse)
    (batch, channels, _), (groups, N, length) = u.shape, B.shape[1:]
    parts = max(1, min(channels // groups, PARTS // max(1, batch * groups)))

    def zeros(*shape: int) -> Tensor:
        return u.new_zeros(shape, dtype=torch.float32)

    du, ddelta = (torch.empty_like(x, dtype=torch.float32) for x in scans.held[:2])
    dA, dB, dD, dbias = (
        zeros(*shape)
        for shape in (
            (batch, channels, N),
            (batch, groups, parts, N, length),
            (batch, channels),
            (batch, channels),
        )
    )
    dC = None if C is None else torch.zeros_like(dB)
    counts = (ctypes.c_int64(n) for n in (torch.get_num_threads(), parts))
    results = (grad.float().contiguous(), du, ddelta, dA, dB, dC, dD, dbias)
    compiler.library(SOURCE).selective_scan_backward(ctypes.byref(scans), *counts, *map(address, results))
    sums = (
        (du, u), (ddelta, delta), (dA.sum(0), A), (dB.sum(2), B), (None if dC is None else dC.sum(2), C),
        (dD.sum(0), D), (dbias.sum(0), delta_bias),
    )  # fmt: skip
    return tuple(zeros(0) if like is None else total.to(like.dtype) for total, like in sums)


OPERATORS = ops.define("native", scan, scan_backward)


def unsupported(u: Tensor, *rest) -> str | None:
    if u.device.type not in ("cpu", "meta"):
        return "runs on a CPU"
    if u.dtype == torch.float64:
        return "computes in float32: use eager for float64"
    return compiler.missing()


def forward(*args) -> Tensor:
    return OPERATORS.scan(*args)
