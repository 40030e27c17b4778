"""One phase of a graft: a generator with new mixers learns to imitate the one they were put into. See `grafting.graft`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import visionhybrid
from visionhybrid.diffusion import HybridDiT
from visionhybrid.train.config import ConfigError, Graft
from visionhybrid.train.distill import imitate, regress, relative_error
from visionhybrid.train.generate import Generate
from visionhybrid.train.sampler import Sample


class Grafted(nn.Module):
    """The student, run beside its teacher. The teacher is no part of it: not trained, not saved."""

    def __init__(self, student: HybridDiT, teacher: HybridDiT, names: list[str]) -> None:
        super().__init__()
        self.student, self.names = student, names
        self._teacher = [teacher.eval().requires_grad_(False)]

    def forward(self, *args: Any, phase: str = "tune", **kwargs: Any) -> Any:
        """The student's output, or what the losses of `phase` are made of; all by way of here, where DDP and FSDP watch."""
        if phase == "tune":
            return self.student(*args, **kwargs)
        how = regress if phase == "alone" else imitate
        return how(self.student, self.teacher(args[0].device), self.names, (args, kwargs))

    def teacher(self, device: torch.device) -> HybridDiT:
        return self._teacher[0].to(device)  # pyright: ignore[reportReturnType]

    def enable_gradient_checkpointing(self) -> None:
        self.student.enable_gradient_checkpointing()

    # What a pipeline asks of its transformer.

    @property
    def config(self) -> Any:
        return self.student.config

    @property
    def dtype(self) -> torch.dtype:
        return self.student.dtype

    @property
    def device(self) -> torch.device:
        return self.student.device


class GraftTask(Generate):
    """See `task.Task`. Metrics beside those of `Generate`: distance, |student - teacher|^2 / |teacher|^2 on held-out images."""

    def __init__(self, config: Graft) -> None:
        super().__init__(config)
        self.graft = config
        if not config.teacher:
            raise ConfigError("teacher: name the generator to imitate, as in teacher=runs/hybrid_dit_digits")
        self.teacher = self.open(config.teacher)
        wanted = (self.config.channels, config.data.image_size, config.data.num_classes)
        has = self.teacher.config
        if wanted != (has.in_channels, has.sample_size, has.num_classes):
            raise ConfigError(
                f"teacher: made for (channels, size, classes) {(has.in_channels, has.sample_size, has.num_classes)}, "
                f"the recipe's data has {wanted}"
            )

    def parts(self) -> dict[str, nn.Module]:
        config = self.graft
        if config.model.start:
            student = self.open(config.model.start)
            self.notes.append(f"started from {config.model.start}")
        else:
            student = copy.deepcopy(self.teacher)
            visionhybrid.attach(
                student, config.mixer, layers=list(config.layers) or None, **config.mixer_options
            )
        names = changed(student, self.teacher)
        if not names:
            raise ConfigError("nothing to train: no mixer of the student differs from the teacher's")
        student.requires_grad_(config.train == "all" and config.phase != "alone")
        for name in names:
            student.get_submodule(name).requires_grad_(True)
        return {"model": Grafted(student, self.teacher, names)}

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, net = self.graft, parts["model"]
        asked = self.exercise(batch)
        found = net(*asked.args, **asked.kwargs, phase=config.phase)
        if config.phase == "alone":
            loss, each = found
            return loss, {f"error/{name}": value for name, value in each.items()}
        if config.phase == "tune":
            return asked.loss(found[0]), {}
        task = asked.loss(found.prediction)
        logs = {"task": task, "output": found.output, "features": found.features}
        total = (
            config.task_weight * task
            + config.output_weight * found.output
            + config.feature_weight * found.features
        )
        return total, {name: value.detach() for name, value in logs.items()}

    def validate(
        self, model: nn.Module, accelerator: Accelerator, limit: int | None = None
    ) -> dict[str, float]:
        found = super().validate(model, accelerator, limit)
        teacher = self.teacher.to(accelerator.device)
        inputs = self.held_out_inputs(accelerator.device)
        return {**found, "distance": relative_error(model, teacher, inputs)}

    def release(self, model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
        super().release(model.student if isinstance(model, Grafted) else model, path, facts)


def changed(student: HybridDiT, teacher: HybridDiT) -> list[str]:
    """The attention whose mixer differs."""
    ours, theirs = (visionhybrid.describe(net).rows for net in (student, teacher))
    return [a.name for a, b in zip(ours, theirs, strict=True) if (a.mixer, a.options) != (b.mixer, b.options)]
