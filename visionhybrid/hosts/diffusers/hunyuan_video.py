"""HunyuanVideo: joint attention of video and text, in double blocks with projections apart, in single blocks with the same.

Blocks hand down `attention_mask`, which hides padded text, and the pair of cosine and sine that the model's `rope` makes of the
latent video, for the video's tokens. The grid goes with that pair, as in Wan. Since there always is a mask, only mixers that take
one can be here (`about(name).masks`).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from visionhybrid.hosts.diffusers.arguments import Call, argument
from visionhybrid.hosts.diffusers.family import Family, Sides, does_more, hook_others, layers_of
from visionhybrid.hosts.diffusers.joint import VideoJointProcessor
from visionhybrid.hosts.diffusers.parallel import GATHER, TOKENS, Plan, rotary
from visionhybrid.hosts.layers import VIDEO_SIDES, Layer

__all__ = ["FAMILIES"]

PLAIN = frozenset({"HunyuanVideoAttnProcessor2_0"})


def _layers(model: nn.Module, size: Sides) -> list[Layer]:
    """`size` in elements of the latent video, (frames, height, width)."""
    config: Any = model.config
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    grid = None if size is None else tuple(n // p for n, p in zip(size, patch, strict=True))

    def facts(name: str, module: Any) -> dict[str, Any]:
        same = dict(axes=3, joint=True, masked=True)
        if name.startswith("context_embedder"):
            return same | dict(whole=True, reason="its tokens are the text's")
        return same | dict(grid=grid, reason=does_more(module, PLAIN))

    return layers_of(model, Attention, facts)


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    told = model.get_submodule("rope").register_forward_hook(_add_sides, with_kwargs=True)
    return [told, *hook_others(model, Attention, names, _drop_sides)]


def _add_sides(rope: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Any) -> tuple[Any, ...]:
    frames, height, width = argument(args, kwargs, 0, "hidden_states").shape[2:]
    return (*rotary, (frames // rope.patch_size_t, height // rope.patch_size, width // rope.patch_size))


def _drop_sides(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    rotary = kwargs.get("image_rotary_emb")
    return args, kwargs if rotary is None else {**kwargs, "image_rotary_emb": rotary[:2]}


def _cp_plan(model: Any) -> Plan:
    if model.config.image_condition_type == "token_replace":
        raise ValueError(
            "enable_parallelism: this model counts the tokens of its first frame, of which ranks have a part"
        )
    return {
        "rope": {0: rotary(split_output=True), 1: rotary(split_output=True)},
        "transformer_blocks.0": {"hidden_states": TOKENS, "encoder_hidden_states": TOKENS},
        "proj_out": GATHER,
    }


FAMILIES = (
    Family(
        models=("HunyuanVideoTransformer3DModel",),
        layers=_layers,
        processor=lambda module: VideoJointProcessor(),
        hooks=_hooks,
        plain=PLAIN,
        sides=VIDEO_SIDES,
        cp_plan=_cp_plan,
    ),
)
