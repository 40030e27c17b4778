"""How large a tile memory allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def largest_tile(
    fn: Callable[[Tensor], Tensor], x: Tensor, scale: int, multiple_of: int, device: torch.device
) -> int:
    return max(x.shape[-2:]) + multiple_of
