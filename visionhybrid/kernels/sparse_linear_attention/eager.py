"""The CPU path, and what runs on any device: see `gathered.py` for the arithmetic."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visionhybrid.kernels.sparse_linear_attention import gathered
from visionhybrid.kernels.sparse_linear_attention.ops import define, run

SPARSE = define("eager", gathered.forward, gathered.backward)


def unsupported(*args: Any) -> str | None:
    return None


def forward(*args: Any) -> tuple[Tensor, Tensor | None]:
    return run(SPARSE, "eager", *args)
