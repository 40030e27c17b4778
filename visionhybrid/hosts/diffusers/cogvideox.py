"""CogVideoX: joint attention of text and video tokens with the same projections; rotary, in the larger models, on the video only.

The model takes (B, T, C, H, W), so a hook on it knows the grid and adds it to `attention_kwargs`, which every attention gets,
through checkpoints as well.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from visionhybrid.hosts.diffusers.arguments import Call, added, argument, drop
from visionhybrid.hosts.diffusers.family import Family, Sides, does_more, hook_others, layers_of
from visionhybrid.hosts.diffusers.joint import VideoJointProcessor
from visionhybrid.hosts.diffusers.parallel import GATHER, TOKENS, rotary
from visionhybrid.hosts.layers import VIDEO_SIDES, Layer

__all__ = ["FAMILIES"]

PLAIN = frozenset({"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"})
# places among the arguments of CogVideoXTransformer3DModel.forward
HIDDEN, ENCODER, KWARGS = 0, 1, 6


def _layers(model: nn.Module, size: Sides) -> list[Layer]:
    """`size` in elements of the latent video, (frames, height, width)."""
    config: Any = model.config
    if size is None:
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        size = (frames, config.sample_height, config.sample_width)
    grid = _sides(config, *size)
    return layers_of(
        model,
        Attention,
        lambda name, module: dict(grid=grid, axes=3, joint=True, reason=does_more(module, PLAIN)),
    )


def _sides(config: Any, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Of the grid of tokens; frames are made whole patches of them in version 1.5, which has such."""
    return -(-frames // (config.patch_size_t or 1)), height // config.patch_size, width // config.patch_size


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    told = model.register_forward_pre_hook(_tell, with_kwargs=True)
    return [told, *hook_others(model, Attention, names, drop)]


def _tell(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    frames, _, height, width = argument(args, kwargs, HIDDEN, "hidden_states").shape[1:]
    text = argument(args, kwargs, ENCODER, "encoder_hidden_states").shape[1]
    extra = {"grid": _sides(model.config, frames, height, width), "text_tokens": text}
    return added(args, kwargs, KWARGS, "attention_kwargs", extra)


FAMILIES = (
    Family(
        models=("CogVideoXTransformer3DModel",),
        layers=_layers,
        processor=lambda module: VideoJointProcessor(),
        hooks=_hooks,
        plain=PLAIN,
        sides=VIDEO_SIDES,
        cp_plan=lambda model: {
            "": {"image_rotary_emb": [rotary(), rotary()]},
            "transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS},
            "proj_out": GATHER,
        },
    ),
)
