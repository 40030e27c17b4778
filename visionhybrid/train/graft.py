"""One phase of a graft: a model with new mixers learns to imitate the one they were put into. See `grafting.graft`.

`Grafts` is what a graft adds to a task, whatever that trains; `grafts.py` has it for generators and for classifiers. How a model
is fed and what its output should be is the task's business, an `Exercise`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import visionhybrid
from visionhybrid import mixers
from visionhybrid.train.config import ConfigError, Grafting
from visionhybrid.train.distill import REGRESSIONS, Inputs, imitate, regress, relative_error
from visionhybrid.train.sampler import Sample
from visionhybrid.train.task import Update, untold

# modules of an attention that a mixer stands between, in diffusers, timm and here
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "qkv", "proj")


class Exercise(Protocol):
    """What a model is asked about one batch."""

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> dict[str, Any]: ...

    def loss(self, output: Tensor) -> Tensor:
        """How far an output is from what the data says: a scalar, the mean over the batch."""
        ...


class Grafted(nn.Module):
    """The student, run beside its teacher. The teacher is no part of it: not trained, not saved."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, names: list[str], features: list[str], regression: str
    ) -> None:
        super().__init__()
        self.student, self.names, self.features = student, names, features
        self.measure = REGRESSIONS[regression]
        self._teacher = [teacher]

    def forward(self, *args: Any, phase: str = "tune", **kwargs: Any) -> Any:
        """The student's output, or what the losses of `phase` are made of; all by way of here, where DDP and FSDP watch."""
        if phase == "tune":
            return self.student(*args, **kwargs)
        device = next(self.student.parameters()).device
        teacher = self._teacher[0].to(device)
        if phase == "alone":
            return regress(self.student, teacher, self.names, (args, kwargs), self.measure)
        return imitate(self.student, teacher, self.features, (args, kwargs))

    def __getattr__(self, name: str) -> Any:
        """A pipeline asks much of its denoiser, the loop asks for checkpointing: all that is the student's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("student"), name)


class Grafts:
    """See `task.Task`: mixed into one, before it. Metrics beside its own: distance, |student - teacher|^2 / |teacher|^2 of the
    outputs on held-out images.

    The task has `exercise(batch)`, `held_out_inputs(device, count)`, `open`, and here `distances(output, wanted, asked)`.
    """

    config: Any
    notes: list[str]
    teacher: nn.Module

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.graft: Grafting = config
        self.teacher = self.open_teacher().eval().requires_grad_(False)
        self.aware: set[str] = set()  # layers of the teacher that say the grid, see `tell`

    def open_teacher(self) -> nn.Module:
        raise NotImplementedError

    def distances(self, output: Tensor, wanted: Tensor, asked: Any) -> dict[str, Tensor]:
        """Between outputs of student and teacher: name -> scalar; `Grafting` has a weight for each, `<name>_weight`."""
        raise NotImplementedError

    # -- the student -------------------------------------------------------------------------------------------------

    def plain(self) -> nn.Module:
        """A copy of the teacher as it was opened."""
        found = copy.deepcopy(self.teacher)
        if self.aware:
            visionhybrid.detach(found)
        return found

    def new_student(self) -> nn.Module:
        """The teacher's copy, before it gets other mixers."""
        return self.plain()

    def parts(self) -> dict[str, nn.Module]:
        config = self.graft
        student = self.open(config.student) if config.student else self._grafted()
        if config.student:
            self.notes.append(f"started from {config.student}")
        names = self.changed(student)
        if not names:
            raise ConfigError("nothing to train: no mixer of the student differs from the teacher's")
        self.tell(names)
        student.requires_grad_(config.train == "all" and config.phase != "alone")
        for name in names:
            for key, parameter in student.get_submodule(name).named_parameters():
                own = key.split(".")[0]
                parameter.requires_grad_(config.train != "projections" or own in (*PROJECTIONS, "mixer"))
        features = self._features(names)
        return {"model": Grafted(student, self.teacher, names, features, config.regression)}

    def _grafted(self) -> nn.Module:
        config, student = self.graft, self.new_student()
        layers = list(config.layers) or None
        table = {
            pattern: (config.mixer, {**config.mixer_options, **options})
            for pattern, options in {**config.by_layer, "*": {}}.items()
        }
        visionhybrid.attach(student, table, layers=layers)
        if config.projections == "fresh":
            for name in self.changed(student):
                for part in PROJECTIONS:
                    if hasattr(attention := student.get_submodule(name), part):
                        _reset(attention.get_submodule(part))
        return student

    def _features(self, names: list[str]) -> list[str]:
        """The layers whose outputs are compared."""
        wanted = self.graft.features
        if not self.graft.feature_weight:
            return []
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"features: no changed layer is called {pattern!r}; there are {', '.join(names[:6])} ..."
                )
        return [name for name in names if not wanted or any(fnmatchcase(name, p) for p in wanted)]

    def changed(self, student: nn.Module) -> list[str]:
        """The attention whose mixer differs from the teacher's."""
        ours, theirs = (visionhybrid.describe(net).rows for net in (student, self.teacher))
        return [a.name for a, b in zip(ours, theirs, strict=True) if _kind(a) != _kind(b)]

    def tell(self, names: list[str]) -> None:
        """Let the teacher's own attention get the grid as the student's does: through a mixer that computes the same.

        The student's attention is run on the teacher's inputs, and the sides of the grid are among them only where a mixer is.
        """
        rows = visionhybrid.describe(self.teacher).rows
        silent = {row.name: row.own for row in rows if row.name in names and row.mixer is None}
        if silent:
            visionhybrid.attach(self.teacher, silent)
            self.aware.update(silent)
            for name in silent:
                mixer: Any = self.teacher.get_submodule(name).mixer
                mixer.asks = True

    def only(self, kept: set[str], student: nn.Module) -> nn.Module:
        """A copy of the teacher with the student's attention in the layers `kept`."""
        rows = [row for row in visionhybrid.describe(student).rows if row.name in kept]
        heads = {row.name: (row.heads, row.head_dim) for row in visionhybrid.describe(self.teacher).rows}
        if any((row.heads, row.head_dim) != heads[row.name] for row in rows):
            raise ConfigError(
                "budget: the student's attention has other heads than the teacher's; convert all of it"
            )
        mixed = self.plain()
        visionhybrid.attach(mixed, {row.name: (row.mixer or "", row.options) for row in rows})
        for row in rows:
            state = student.get_submodule(row.name).state_dict()
            mixed.get_submodule(row.name).load_state_dict(state, strict=True)
        return mixed.eval()

    # -- training ----------------------------------------------------------------------------------------------------

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, net = self.graft, parts["model"]
        asked: Exercise = self.exercise(batch)
        found = net(*asked.args, **asked.kwargs, phase=config.phase)
        if config.phase == "alone":
            loss, each = found
            return loss, {f"error/{name}": value for name, value in each.items()}
        if config.phase == "tune":
            return asked.loss(found if isinstance(found, Tensor) else found[0]), {}
        terms = {
            "task": asked.loss(found.prediction),
            **self.distances(found.prediction.float(), found.wanted, asked),
            "feature": found.features,
        }
        total = torch.stack(
            [getattr(config, f"{name}_weight") * value for name, value in terms.items()]
        ).sum()
        return total, {name: value.detach() for name, value in terms.items()}

    def validate(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        limit: int | None = None,
        update: Update = untold,
    ) -> dict[str, float]:
        found = super().validate(model, accelerator, limit, update)
        teacher = self.teacher.to(accelerator.device)
        return {**found, "distance": relative_error(model, teacher, self.inputs(accelerator.device))}

    def inputs(self, device: torch.device) -> Inputs:
        """Held-out images, always the same: as many as fit in one batch of the validation, and no more than 64."""
        return self.held_out_inputs(device, min(64, self.config.eval_batch))

    def release(self, model: nn.Module, path: Path, facts: dict[str, Any]) -> None:
        super().release(model.student if isinstance(model, Grafted) else model, path, facts)


def _kind(row: Any) -> tuple[str, dict[str, Any]]:
    """What mixes in a layer, the model's own attention by the mixer that computes the same."""
    name = row.mixer or row.own
    return name, {**mixers.about(name).options, **row.options}


def _reset(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
