"""What a run trains: networks with their optimisers, prepared by accelerate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from visionhybrid.train import prodigy, state  # noqa: F401 - timm's factory knows prodigy then
from visionhybrid.train.config import Config, ConfigError, Loop, Optim
from visionhybrid.train.schedule import Rate

# What a changed config may change about an optimiser when a run continues; the rest comes from the checkpoint.
_FROM_CONFIG = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum")


@dataclass
class Part:
    """One network with its optimiser."""

    name: str
    net: nn.Module  # as wrapped by accelerate
    bare: nn.Module  # what the task built; the same parameters
    optimizer: Any
    rate: Rate

    def __post_init__(self) -> None:
        kept = self.bare.state_dict().keys()
        # running statistics; constants that no checkpoint holds do not change in a forward pass
        self.buffers = [buffer for name, buffer in self.bare.named_buffers() if name in kept]

    def share_buffers(self) -> None:
        """The first process's running statistics for all: they are what is saved, and each has seen its own samples only."""
        if PartialState().num_processes > 1:
            for buffer in self.buffers:
                torch.distributed.broadcast(buffer, 0)

    @property
    def optimizer_file(self) -> str:
        return "optimizer" if self.name == "model" else f"{self.name}_optimizer"


def make_accelerator(precision: str) -> Accelerator:
    """This process's accelerator; `accelerate launch` and its environment decide on device, DDP and FSDP."""
    # accelerate keeps one state per process and refuses another precision; runs in one process are independent here
    AcceleratorState._reset_state()
    GradientState._reset_state()
    shared: Any = PartialState._shared_state
    if shared.get("distributed_type") == DistributedType.FSDP:
        # accelerate leaves this behind, and a further accelerator would take it as settled, without a plugin
        kinds = {"xpu": DistributedType.MULTI_XPU, "npu": DistributedType.MULTI_NPU}
        shared["distributed_type"] = kinds.get(shared["device"].type, DistributedType.MULTI_GPU)
    try:
        accelerator = Accelerator(mixed_precision=precision)
    except ValueError as error:
        raise ConfigError(f"loop.precision: {precision} does not work on this machine: {error}") from None
    device = accelerator.device.type
    # in both cases accelerate would do something else without a word: DDP, and float32
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        raise ConfigError(f"accelerate has no FSDP on {device}; launch without --use_fsdp")
    if precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(f"loop.precision: fp16 does not work on {device}; use bf16 or no")
    return accelerator


def build(
    config: Config, nets: Mapping[str, nn.Module], accelerator: Accelerator, steps: int, steps_per_epoch: int
) -> list[Part]:
    """`nets`, by name, with the optimisers and learning rates of `config` for a run of `steps`."""
    for net in nets.values():
        _prepare(net, config.loop)
    optimizers = [_optimizer(config.optim, net) for net in nets.values()]
    prepared = accelerator.prepare(*nets.values(), *optimizers)
    parts = []
    for i, name in enumerate(nets):
        net, optimizer = prepared[i], prepared[len(nets) + i]
        if config.loop.compile:
            net.compile()
        rate = Rate(config.schedule, optimizer.optimizer, steps, steps_per_epoch)
        parts.append(Part(name, net, accelerator.unwrap_model(net), optimizer, rate))
    return parts


def _prepare(net: nn.Module, loop: Loop) -> None:
    if loop.channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if loop.grad_checkpointing:
        # timm's word for it, and diffusers'
        names = ("set_grad_checkpointing", "enable_gradient_checkpointing")
        switch = next((getattr(net, name) for name in names if hasattr(net, name)), None)
        if switch is None:
            raise ConfigError(f"loop.grad_checkpointing: {type(net).__name__} has none")
        switch()


def _optimizer(optim: Optim, net: nn.Module) -> torch.optim.Optimizer:
    given = {"betas": optim.betas, "eps": optim.eps}
    try:
        return create_optimizer_v2(
            net,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            filter_bias_and_bn=not optim.decay_1d,
            layer_decay=optim.layer_decay,
            **{name: value for name, value in given.items() if value is not None},
            **optim.options,
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"optim: timm cannot make {optim.name!r}: {error}") from None


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Continue with the `saved` state of a checkpoint, but with what the config of now says about rates.

    Raises: CheckpointError: it is of another optimiser, or its parameters are grouped otherwise.
    """
    sizes = [
        [len(group["params"]) for group in groups]
        for groups in (saved["param_groups"], optimizer.param_groups)
    ]
    # some optimisers add words to their groups as they go
    if sizes[0] != sizes[1] or not optimizer.param_groups[0].keys() <= saved["param_groups"][0].keys():
        raise state.CheckpointError(
            "the checkpoint is of another optimiser, or of other groups of parameters; continue with its optim.name and "
            "optim.layer_decay, or begin a new run from its weights (model.start=RUN)"
        )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == params[i].shape:
                values[name] = state.like(value, params[i])
    for group, now in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        group.update({name: now[name] for name in _FROM_CONFIG if name in now})
    optimizer.load_state_dict(saved)
