"""Wan: self attention over a video's tokens (attn1), rotary before the mixer; attn2 is cross attention and stays.

The grid. Wan's blocks hand nothing down but `rotary_emb`, the pair of cosine and sine that the model's `rope` makes of the latent
video. A hook there adds the sides (T, H, W) as a third, and a hook on attention without a mixer takes them away again. So the
grid is an argument here as well, the same when a checkpointed block runs again.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from visionhybrid.hosts.diffusers.arguments import Call, argument
from visionhybrid.hosts.diffusers.family import Family, Sides, does_more, hook_others, layers_of
from visionhybrid.hosts.diffusers.parallel import group_of
from visionhybrid.hosts.layers import VIDEO_SIDES, Layer
from visionhybrid.mixers.sharding import mix

__all__ = ["FAMILIES", "WanMixerProcessor"]

PLAIN = frozenset({"WanAttnProcessor", "WanAttnProcessor2_0"})
ROTARY = 3  # place among the arguments of WanAttention.forward


class WanMixerProcessor:
    """Runs `attn.mixer` where diffusers' `WanAttnProcessor` would run softmax attention."""

    mixes = True
    _parallel_config: Any = None  # diffusers writes it when ranks share the tokens

    def __call__(
        self,
        attn: Any,  # a `WanAttention`
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Any, ...] | None = None,
    ) -> Tensor:
        """(B, N, C) to the same; `rotary_emb` holds cosine and sine (1, N, 1, D), and the sides (T, H, W)."""
        mixer, name, x = attn.mixer, attn.mixer.about.name, hidden_states
        if attention_mask is not None:
            raise ValueError(f"{name}: cannot honour a bias on softmax logits, which attention_mask is here")
        if encoder_hidden_states is not None:
            raise ValueError(f"{name}: mixes a video with itself, got encoder_hidden_states")
        rotary, sides = (rotary_emb or ())[:2], (rotary_emb or ())[2:]
        group = group_of(self)
        if not sides and (mixer.about.grids or group is not None):
            raise ValueError(f"{name}: needs (T, H, W) of {x.shape[1]} tokens, which this model did not tell")

        x_q, x_k = mixer.hidden(x)
        if attn.fused_projections and x_q is x_k is x:
            q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(x_q), attn.to_k(x_k), attn.to_v(x)
        q, k = attn.norm_q(q), attn.norm_k(k)  # over all heads at once
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))  # (B, N, heads, D)
        if rotary:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        del x_q, x_k
        out = mix(mixer, q, k, v, grid=sides[0] if sides else (x.shape[1],), group=group)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        del q, k, v  # what follows is the larger for them
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels are a pair; cosine and sine hold each value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).type_as(x)


def _layers(model: nn.Module, size: Sides) -> list[Layer]:
    """`size` in elements of the latent video, (frames, height, width)."""
    config: Any = model.config
    grid = None if size is None else tuple(n // p for n, p in zip(size, config.patch_size, strict=True))

    def facts(name: str, module: Any) -> dict[str, Any]:
        if module.is_cross_attention:
            return dict(axes=3, whole=True, reason="cross attention: its keys are the text's")
        return dict(grid=grid, axes=3, reason=does_more(module, PLAIN))

    return layers_of(model, WanAttention, facts)


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    told = model.get_submodule("rope").register_forward_hook(_add_sides, with_kwargs=True)
    return [told, *hook_others(model, WanAttention, names, _drop_sides)]


def _add_sides(rope: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rotary: Any) -> tuple[Any, ...]:
    video = argument(args, kwargs, 0, "hidden_states")  # (B, C, T, H, W)
    return (*rotary, tuple(n // p for n, p in zip(video.shape[2:], rope.patch_size, strict=True)))


def _drop_sides(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    rotary = argument(args, kwargs, ROTARY, "rotary_emb")
    if rotary is None:
        return args, kwargs
    if len(args) > ROTARY:
        return (*args[:ROTARY], rotary[:2], *args[ROTARY + 1 :]), kwargs
    return args, {**kwargs, "rotary_emb": rotary[:2]}


FAMILIES = (
    Family(
        models=("WanTransformer3DModel",),
        layers=_layers,
        processor=lambda module: WanMixerProcessor(),
        hooks=_hooks,
        plain=PLAIN,
        sides=VIDEO_SIDES,
    ),
)
