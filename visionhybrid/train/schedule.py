"""The learning rate as a function of the step alone, by timm's schedulers."""

from __future__ import annotations

import math

from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch.optim import Optimizer

from visionhybrid.train.config import Schedule


class Rate:
    """Sets each parameter group's rate for a step; keeps nothing between steps, so resuming needs only the step."""

    def __init__(
        self, schedule: Schedule, optimizer: Optimizer, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.schedule, self.optimizer, self.steps_per_epoch = schedule, optimizer, steps_per_epoch
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        by_epoch = schedule.unit == "epoch"
        total = math.ceil(total_steps / steps_per_epoch) if by_epoch else total_steps
        self.timm = None
        if schedule.name != "constant":
            self.timm, _ = create_scheduler_v2(
                optimizer,
                sched=schedule.name,
                num_epochs=total - schedule.cooldown,
                decay_epochs=schedule.every,
                # timm takes effect one unit early (documented there); ours is the unit named
                decay_milestones=[m + 1 for m in schedule.milestones],
                decay_rate=schedule.power if schedule.name == "poly" else schedule.gamma,
                min_lr=schedule.min_lr,
                warmup_lr=schedule.warmup_lr,
                warmup_epochs=schedule.warmup,
                warmup_prefix=schedule.warmup_prefix,
            )

    def set(self, step: int) -> float:
        """Set the rates for `step`, counted from 0, and return that of the first group."""
        time = step // self.steps_per_epoch if self.schedule.unit == "epoch" else step
        if self.timm is None:
            warm = self.schedule.warmup
            for group in self.optimizer.param_groups:
                low, high = self.schedule.warmup_lr, group["initial_lr"]
                group["lr"] = low + (high - low) * time / warm if time < warm else high
                group["lr"] *= group.get("lr_scale", 1.0)
        else:
            self.timm.step(max(0, time - self.schedule.lag))
        return float(self.optimizer.param_groups[0]["lr"])
