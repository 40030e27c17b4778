"""Exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages of every floating tensor of the state dict, buffers included; integers are copied. Starts as a copy.

    Kept as plain tensors beside the model (not as a second module), so that it is sharded as the model is.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False) -> None:
        self.decay, self.warmup = decay, warmup
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        now = model.state_dict()
        for sharded in (True, False):  # torch takes no mixture, and FSDP2 leaves buffers whole
            names = [
                name
                for name, value in self.average.items()
                if value.is_floating_point() and hasattr(value, "full_tensor") == sharded
            ]
            if names:
                averages, values = [self.average[n] for n in names], [now[n].detach() for n in names]
                torch._foreach_lerp_(averages, values, 1 - decay)
        for name, value in self.average.items():
            if not value.is_floating_point():
                value.copy_(now[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model computes with the averages inside, and with exactly its own weights again outside."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        _copy(model, self.average)
        try:
            yield
        finally:
            _copy(model, own)


@torch.no_grad()
def _copy(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        value.copy_(values[name])
