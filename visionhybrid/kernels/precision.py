"""Types of operands: what autocast asks for, and what sums are kept in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`; it knows nothing of the meta device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's type where it is on for their device, as PyTorch's own matrix products do; else unchanged."""
    first = next(t for t in tensors if t is not None)
    if not autocasting(first):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def widened(x: Tensor) -> torch.dtype:
    """The type of sums, states and normalisers over `x`: float32, or float64 if it is that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in the type of sums."""
    return x.to(widened(x))
