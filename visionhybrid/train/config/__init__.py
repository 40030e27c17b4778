"""What a run does, as data: frozen dataclasses, `key=value` overrides, JSON.

A recipe (`visionhybrid/configs/*.py`) returns one of the `Config` subclasses of `tasks`; its class decides the task. Batch
size means the global one: all processes, all accumulated micro-batches.
"""

from visionhybrid.train.config.common import Config, ConfigError, Guard, Loop, Model, Optim, Schedule
from visionhybrid.train.config.grafts import Graft, GraftClassifier, Grafting, Phase
from visionhybrid.train.config.saved import check, diff, from_json, to_json
from visionhybrid.train.config.tasks import (
    Adversarial,
    Augment,
    Cache,
    Classification,
    Diffusion,
    Generation,
    Generator,
    Images,
    Latent,
    Pictures,
    Restoration,
    Sampling,
    Text,
)
from visionhybrid.train.config.words import flat, override

__all__ = [
    "Adversarial",
    "Augment",
    "Cache",
    "Classification",
    "Config",
    "ConfigError",
    "Diffusion",
    "Generation",
    "Generator",
    "Graft",
    "GraftClassifier",
    "Grafting",
    "Guard",
    "Images",
    "Latent",
    "Loop",
    "Model",
    "Optim",
    "Phase",
    "Pictures",
    "Restoration",
    "Sampling",
    "Schedule",
    "Text",
    "check",
    "diff",
    "flat",
    "from_json",
    "override",
    "to_json",
]
