"""Stable Diffusion 3 and 3.5: joint attention of image and text in every block; 3.5 medium's attn2 is the image's alone.

The model takes a map (B, C, H, W), so a hook on it knows the grid and adds it to `joint_attention_kwargs`, which every attention
gets, through checkpoints as well. The last block's attention gives no text back.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from visionhybrid.hosts.diffusers.arguments import Call, added, argument, drop
from visionhybrid.hosts.diffusers.family import (
    Family,
    Sides,
    as_pair,
    attention_of,
    does_more,
    hook_others,
    layers_of,
)
from visionhybrid.hosts.diffusers.joint import JointProcessor
from visionhybrid.hosts.diffusers.parallel import GATHER, TOKENS
from visionhybrid.hosts.layers import Layer

__all__ = ["FAMILIES"]

PLAIN = frozenset({"JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"})
# places among the arguments of SD3Transformer2DModel.forward
HIDDEN, ENCODER, KWARGS = 0, 1, 5


def _layers(model: nn.Module, size: Sides) -> list[Layer]:
    """`size` in latent pixels; a token is a patch of them."""
    config: Any = model.config
    size = size or as_pair(config.sample_size)
    grid = None if size is None else tuple(side // config.patch_size for side in size)

    def facts(name: str, module: Any) -> dict[str, Any]:
        return dict(grid=grid, joint=module.added_kv_proj_dim is not None, reason=does_more(module, PLAIN))

    return layers_of(model, Attention, facts)


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    told = model.register_forward_pre_hook(_tell, with_kwargs=True)
    alone = [name for name, attn in attention_of(model, Attention) if attn.added_kv_proj_dim is None]
    no_text = [
        model.get_submodule(name).register_forward_pre_hook(_no_text, with_kwargs=True)
        for name in names.intersection(alone)
    ]
    return [told, *no_text, *hook_others(model, Attention, names, drop)]


def _no_text(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    return args, {**kwargs, "text_tokens": 0}


def _tell(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    height, width = argument(args, kwargs, HIDDEN, "hidden_states").shape[2:]
    patch = model.config.patch_size
    text = argument(args, kwargs, ENCODER, "encoder_hidden_states").shape[1]
    extra = {"grid": (height // patch, width // patch), "text_tokens": text}
    return added(args, kwargs, KWARGS, "joint_attention_kwargs", extra)


FAMILIES = (
    Family(
        models=("SD3Transformer2DModel",),
        layers=_layers,
        processor=lambda module: JointProcessor(),
        hooks=_hooks,
        plain=PLAIN,
        cp_plan=lambda model: {
            "transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS},
            "proj_out": GATHER,
        },
    ),
)
