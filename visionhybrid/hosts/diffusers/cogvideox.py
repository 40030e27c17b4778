"""CogVideoX: joint attention of text and video tokens with the same projections; rotary, in the larger models, on the video only.

The model takes (B, T, C, H, W), so a hook on it knows the grid and adds it to `attention_kwargs`, which every attention gets,
through checkpoints as well.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from visionhybrid.hosts.diffusers.arguments import Call, added, argument, drop
from visionhybrid.hosts.diffusers.family import Family, SampleSize, does_more
from visionhybrid.hosts.diffusers.joint import VideoJointProcessor
from visionhybrid.hosts.layers import Layer

__all__ = ["FAMILIES"]

PLAIN = frozenset({"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"})
# places among the arguments of CogVideoXTransformer3DModel.forward
HIDDEN, KWARGS = 0, 6


def _layers(model: nn.Module, size: SampleSize) -> list[Layer]:
    """`size` in elements of the latent video, (frames, height, width)."""
    config: Any = model.config
    if size is not None and len(size) != 3:
        raise ValueError(f"attach: sample_size of a video model is (frames, height, width), got {size}")
    if size is None:
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        size = (frames, config.sample_height, config.sample_width)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            found.append(
                Layer(
                    name=name,
                    module=module,
                    dim=module.query_dim,
                    heads=module.heads,
                    head_dim=module.inner_dim // module.heads,
                    grid=_sides(config, *size),
                    axes=3,
                    joint=True,
                    reason=does_more(module, PLAIN),
                )
            )
    return found


def _sides(config: Any, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Of the grid of tokens; frames are made whole patches of them in version 1.5, which has such."""
    return -(-frames // (config.patch_size_t or 1)), height // config.patch_size, width // config.patch_size


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    handles = [model.register_forward_pre_hook(_tell, with_kwargs=True)]
    for name, module in model.named_modules():
        if isinstance(module, Attention) and name not in names:
            handles.append(module.register_forward_pre_hook(drop, with_kwargs=True))
    return handles


def _tell(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    frames, _, height, width = argument(args, kwargs, HIDDEN, "hidden_states").shape[1:]
    extra = {"grid": _sides(model.config, frames, height, width)}
    return added(args, kwargs, KWARGS, "attention_kwargs", extra)


FAMILIES = (
    Family(
        models=("CogVideoXTransformer3DModel",),
        layers=_layers,
        processor=lambda module: VideoJointProcessor(),
        hooks=_hooks,
        plain=PLAIN,
    ),
)
