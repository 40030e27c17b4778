"""What a run does, as data: frozen dataclasses, `key=value` overrides, JSON.

A recipe (`visionhybrid/configs/*.py`) returns one of the `Config` subclasses of `tasks`; its class decides the task. Batch
size means the global one: all processes, all accumulated micro-batches.
"""

from visionhybrid.train.config.common import Config, ConfigError, Guard, Loop, Model, Optim, Schedule
from visionhybrid.train.config.saved import check, diff, from_json, to_json
from visionhybrid.train.config.tasks import (
    Adversarial,
    Augment,
    Classification,
    Diffusion,
    Generation,
    Graft,
    Images,
    Phase,
    Pictures,
    Restoration,
    Sampling,
)
from visionhybrid.train.config.words import flat, override

__all__ = [
    "Adversarial",
    "Augment",
    "Classification",
    "Config",
    "ConfigError",
    "Diffusion",
    "Generation",
    "Graft",
    "Guard",
    "Images",
    "Loop",
    "Model",
    "Optim",
    "Phase",
    "Pictures",
    "Restoration",
    "Sampling",
    "Schedule",
    "check",
    "diff",
    "flat",
    "from_json",
    "override",
    "to_json",
]
