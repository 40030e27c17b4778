"""What every task has: the network, the optimiser, the schedule, the loop, the guard."""

# `dict` as a factory.
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message is one line and names the field."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The network, and the weights that it begins with."""

    name: str  # as registered with timm
    options: dict[str, Any] = field(default_factory=dict)  # keywords of timm.create_model, JSON-able
    start: str = ""  # checkpoint or run directory whose weights to begin with
    start_strict: bool = True  # False: take what fits and say what did not


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser, as `timm.optim.create_optimizer_v2` makes it."""

    name: str = "adamw"  # any name timm.optim knows
    lr: float = 1e-3  # at the recipe's batch size; nothing is scaled behind your back
    weight_decay: float = 0.0
    decay_1d: bool = False  # also decay biases and norm weights
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    momentum: float = 0.9
    layer_decay: float | None = None
    clip_norm: float | None = None  # largest gradient norm
    options: dict[str, Any] = field(default_factory=dict)  # further keywords of the optimiser


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over time; all times are in `unit`s."""

    name: Literal["cosine", "tanh", "poly", "step", "multistep", "constant"] = "cosine"
    unit: Literal["update", "epoch"] = "update"  # "epoch": the rate changes between epochs only
    lag: int = 0  # use the value of `lag` units ago
    warmup: float = 0.0
    warmup_lr: float = 1e-6
    warmup_prefix: bool = False  # True: the schedule begins after the warm-up instead of under it
    min_lr: float = 0.0
    cooldown: int = 0  # the last units of the run, all at the schedule's last rate
    milestones: tuple[int, ...] = ()  # multistep: the first unit (counted from 0) at the lower rate
    gamma: float = 0.5  # step, multistep: factor
    every: int = 0  # step: units between two factors
    power: float = 1.0  # poly


@dataclass(frozen=True, kw_only=True)
class Loop:
    """How long, in which batches and precision, and what is written when."""

    batch_size: int = 32  # global
    epochs: float | None = None  # exactly one of epochs and steps
    steps: int | None = None
    micro_batch: int | None = None  # samples of one process in one forward pass; None: all of its share
    precision: Literal["no", "fp16", "bf16"] = "no"
    ema_decay: float | None = None
    ema_warmup: bool = False  # decay min(ema_decay, (1 + step) / (10 + step))
    seed: int = 0
    workers: int = 4  # loading processes per training process
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    log_every: int = 50  # steps
    validate_every: int = 0  # steps; 0: once an epoch, and always at the end
    checkpoint_every: int = 0  # steps; 0: with each validation
    keep: int = 3  # newest checkpoints kept, and the best one
    tensorboard: bool = True


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When to skip an update, and when to go back."""

    spike: float = 10.0  # a loss above this times its running mean is not used; 0: no limit
    warm: int = 100  # steps before spikes are looked for
    in_a_row: int = 10  # skipped updates before going back to the last checkpoint with another data order
    rollbacks: int = 3  # more than this ends the run
    corrupt: int = 1000  # more unreadable samples than this end the run


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every task has. Subclasses add fields, and name themselves and the task class that reads them."""

    name: str
    model: Model
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    loop: Loop = Loop()
    guard: Guard = Guard()

    task: ClassVar[str] = ""
    entry: ClassVar[str] = ""  # "module:class" implementing visionhybrid.train.task.Task
    kinds: ClassVar[dict[str, type[Config]]] = {}

    def __init_subclass__(cls) -> None:
        Config.kinds[cls.task] = cls
