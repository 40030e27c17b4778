"""The selective scan in C++: one pass over its operands instead of the ten of `eager.py`, whose gradient it shares.

Compiled when first called (`kernels/compiler.py`); taken on request, or by "auto" where `VISIONHYBRID_NATIVE=1` is set.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from visionhybrid.kernels import compiler
from visionhybrid.kernels.selective_scan import eager, ops

SOURCE = Path(__file__).with_suffix(".cpp")


def scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse):
    """As in `eager.py`."""
    out = ops.result(u, A, C)
    operands = [None if x is None else x.float().contiguous() for x in (u, delta, A, B, C, D, delta_bias)]
    written = out if out.dtype == torch.float32 else out.new_empty(out.shape, dtype=torch.float32)
    turned = torch.tensor(reverse, dtype=torch.uint8)
    states = u.new_empty(*u.shape[:2], A.shape[1], dtype=torch.float32)
    sizes = (torch.get_num_threads(), delta_softplus, *u.shape[:2], B.shape[1], A.shape[1], u.shape[2])
    compiler.library(SOURCE).selective_scan(
        *map(compiler.address, (*operands, turned, states, written)), *map(ctypes.c_int64, sizes)
    )
    return out if written is out else out.copy_(written)


OPERATORS = ops.define("native", scan, eager.scan_backward)


def unsupported(u: Tensor, *rest) -> str | None:
    if u.device.type not in ("cpu", "meta"):
        return "runs on a CPU"
    if u.dtype == torch.float64:
        return "computes in float32: use eager for float64"
    return compiler.missing()


def forward(*args) -> Tensor:
    return OPERATORS.scan(*args)
