"""Grafts: other mixers in a trained model, which then learns to imitate what it was."""

# `dict` as a factory.
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from visionhybrid.train.config.tasks import Classification, Generation


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a graft; `steps` 0 leaves it out."""

    steps: int = 0
    lr: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Grafting:
    """What every graft has, beside the task whose model it changes.

    `optim.lr` and `loop.steps` are each phase's own. First every new mixer alone learns what the old one gives for the same
    input; then the whole learns from the teacher's outputs, features and the task; then from the task alone.
    """

    teacher: str = ""  # what is imitated: a run directory, a diffusers folder or a checkpoint
    mixer: str = "linfusion"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    # selector of `visionhybrid.attach` -> options that its layers get besides; the first one that fits counts
    by_layer: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: tuple[str, ...] = ()  # selectors of `visionhybrid.attach`; empty: all
    # largest relative squared error of the output after the first phase; layers that cost most for what they save stay
    budget: float | None = None
    alone: Phase = Phase(steps=1000)
    whole: Phase = Phase(steps=1000, lr=1e-4)
    tune: Phase = Phase(steps=0, lr=1e-4)
    # of the first phase: squared error over the squared size of the teacher's, or plain errors
    regression: Literal["relative", "l1", "l2", "huber"] = "relative"
    task_weight: float = 1.0
    output_weight: float = 0.5
    variance_weight: float = 0.0  # of the variance that the output of a diffusion model holds besides
    feature_weight: float = 0.5
    # names or shell patterns of the changed layers that are compared; empty: all
    features: tuple[str, ...] = ()
    # "projections": the mixers and the projections to q, k, v and out; "mixed": all of the attention that has a new mixer; "all"
    train: Literal["projections", "mixed", "all"] = "mixed"
    projections: Literal["kept", "fresh"] = "kept"  # the student's begin as the teacher's, or are drawn anew
    student: str = ""  # to go on with: a run directory of an earlier phase
    # of this run; `visionhybrid graft` does one after the other
    phase: Literal["alone", "whole", "tune"] = "whole"


@dataclass(frozen=True, kw_only=True)
class Graft(Generation, Grafting):
    """In a generator. Data, diffusion and sampling as it was trained with; without `teacher` it is `model.pipeline`'s.

    `model.options` are keywords of `HybridDiT` in which the student differs from a teacher of that class.
    """

    task: ClassVar[str] = "graft"
    entry: ClassVar[str] = "visionhybrid.train.grafts:GraftGenerator"


@dataclass(frozen=True, kw_only=True)
class GraftClassifier(Classification, Grafting):
    """In a vision transformer of timm: `model` says which, `teacher` has its weights (or `model.options.pretrained=true`).

    Images that the teacher saw; the task is their labels. Outputs are compared as distributions over the classes.
    """

    task: ClassVar[str] = "graft_classifier"
    entry: ClassVar[str] = "visionhybrid.train.grafts:GraftClassifier"
