"""Prodigy, Adam that finds its own rate: `optim.name=prodigy optim.lr=1`.

Mishchenko and Defazio, arXiv:2306.06101 algorithm 4; the names of konstmish/prodigy@1.1.2. `d` estimates how far the start is from a
solution; it only grows, and multiplies the rate. The moments are kept in units of d.

Not that package (prodigyopt): its sums over ranks need CUDA and FSDP's first version, and flattened copies of parameters as state have
no place in our checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from torch import Tensor
from torch.optim import Optimizer


class Prodigy(Optimizer):
    """
    Args:
        lr: factor on the rate that is found; 1 as a rule, with whatever schedule.
        weight_decay: decoupled, times the rate.
        d0: first estimate.
        bias_correction: of both moments, as in Adam.
        safeguard_warmup: small first rates of a warm-up do not enter the estimate's denominator.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        bias_correction: bool = True,
        safeguard_warmup: bool = True,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            d0=d0,
            bias_correction=bias_correction,
            safeguard_warmup=safeguard_warmup,
            # of all groups together, kept in each
            d=d0,
            numerator=0.0,
            steps=0,
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = self.param_groups[0]
        d, d0, beta3 = first["d"], first["d0"], sqrt(first["betas"][1])
        numerator, denominator = beta3 * first["numerator"], 0.0
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rate = self._rate(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state_of(p)
                numerator += d / d0 * rate * _number((p.grad * (state["start"] - p)).sum())
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=d * (1 - beta1))
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=d * d * (1 - beta2))
                state["s"].mul_(beta3).add_(p.grad, alpha=d / d0 * (d if group["safeguard_warmup"] else rate))
                denominator += _number(state["s"].abs().sum())
        found = max(d, numerator / denominator) if denominator else d
        for group in self.param_groups:
            rate = self._rate(group)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    p.mul_(1 - group["weight_decay"] * rate)
                    p.addcdiv_(
                        state["exp_avg"], state["exp_avg_sq"].sqrt().add_(found * group["eps"]), value=-rate
                    )
            group.update(d=found, numerator=numerator, steps=group["steps"] + 1)
        return loss

    def _rate(self, group: dict[str, Any]) -> float:
        steps, (beta1, beta2) = group["steps"] + 1, group["betas"]
        correction = sqrt(1 - beta2**steps) / (1 - beta1**steps) if group["bias_correction"] else 1.0
        return group["d"] * group["lr"] * correction

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["start"] = p.detach().clone()
            state.update({name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq", "s")})
        return state


def _number(x: Any) -> float:
    """A sum over all shards."""
    return float(x.full_tensor() if hasattr(x, "full_tensor") else x)


default_registry.register(
    OptimInfo(
        name="prodigy",
        opt_class=Prodigy,
        description="Adam that finds its own rate (arXiv:2306.06101)",
        has_betas=True,
    )
)
