"""SANA: self attention over an image that is linear to begin with (attn1), which the mixer `linear` computes as well.

The grid. A block is called with the sides of the image but calls its attention with nothing beside the tokens, and no dictionary
goes down. So a hook on the block puts its own arguments, the sides, where the thread keeps them just before: every thread has its
own value, and a block that a checkpoint runs again sets it again.

Where ranks share the tokens a block is told its own rows, and its feed-forward network, which convolves the image, gets the next
row of either neighbour.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn

from visionhybrid.hosts.diffusers.arguments import Call, argument
from visionhybrid.hosts.diffusers.family import Family, Sides, as_pair, does_more, layers_of
from visionhybrid.hosts.diffusers.parallel import GATHER, TOKENS, group_of
from visionhybrid.hosts.layers import Layer
from visionhybrid.mixers.base import Halo
from visionhybrid.mixers.sharding import Shards, mix

__all__ = ["FAMILIES", "SanaMixerProcessor"]

PLAIN = frozenset({"SanaLinearAttnProcessor2_0"})
# places among the arguments of SanaTransformerBlock.forward
HEIGHT, WIDTH = 5, 6

HERE = threading.local()  # `sides` of the block that runs in this thread


class SanaMixerProcessor:
    """Runs `attn.mixer` where diffusers' `SanaLinearAttnProcessor2_0` would run linear attention."""

    mixes = True
    _parallel_config: Any = None  # diffusers writes it when ranks share the tokens

    def __call__(
        self,
        attn: Any,  # an `Attention`, its fields wider than diffusers declares them
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C) to the same."""
        mixer, name, x = attn.mixer, attn.mixer.about.name, hidden_states
        if attention_mask is not None or encoder_hidden_states is not None:
            raise ValueError(f"{name}: mixes an image with itself, got a mask or encoder_hidden_states")
        x_q, x_k = mixer.hidden(x)
        q, k, v = attn.to_q(x_q), attn.to_k(x_k), attn.to_v(x)
        q = q if attn.norm_q is None else attn.norm_q(q)  # over all heads at once
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = (y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, N, D)
        out = mix(mixer, q, k, v, grid=HERE.sides, group=group_of(self)).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out


def _layers(model: nn.Module, size: Sides) -> list[Layer]:
    """`size` in latent pixels; a token is a patch of them."""
    config: Any = model.config
    size = size or as_pair(config.sample_size)
    grid = None if size is None else tuple(side // config.patch_size for side in size)

    def facts(name: str, module: Any) -> dict[str, Any]:
        cross = "cross attention: its keys are the text's" if module.is_cross_attention else None
        return dict(
            grid=grid, own="linear", whole=bool(cross), reason=cross or does_more(module, PLAIN, "linear")
        )

    return layers_of(model, Attention, facts)


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    handles = []
    for name, block in model.named_modules():
        if isinstance(block, SanaTransformerBlock) and f"{name}.attn1" in names:
            handles += [
                block.register_forward_pre_hook(_tell, with_kwargs=True),
                block.ff.register_forward_pre_hook(partial(_more_rows, block.attn1)),
                block.ff.register_forward_hook(partial(_own_rows, block.attn1)),
            ]
    return handles


def _tell(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    height, width = argument(args, kwargs, HEIGHT, "height"), argument(args, kwargs, WIDTH, "width")
    HERE.sides = height, width
    shards = _shards(block.attn1)
    if shards is None:
        return None
    if height % shards.ranks:
        raise ValueError(f"SANA: {shards.ranks} ranks share whole rows of the image, which has {height}")
    rows = height // shards.ranks
    if len(args) > HEIGHT:
        return (*args[:HEIGHT], rows, *args[HEIGHT + 1 :]), kwargs
    return args, {**kwargs, "height": rows}


def _shards(attn: Any) -> Shards | None:
    group = group_of(attn.processor)
    return None if group is None else Shards(group, HERE.sides)


def _more_rows(attn: Any, network: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
    """This rank's rows (B, C, h, W) with the one above and below, where there are such."""
    shards = _shards(attn)
    if shards is None:
        return None
    tokens = args[0].flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h * W, C)
    around, _ = shards.around(tokens, Halo(1))
    return (around.squeeze(1).transpose(1, 2).unflatten(2, (-1, shards.grid[1])),)


def _own_rows(attn: Any, network: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    shards = _shards(attn)
    if shards is None:
        return None
    return out.narrow(2, int(shards.rank > 0), shards.grid[0] // shards.ranks)


FAMILIES = (
    Family(
        models=("SanaTransformer2DModel",),
        layers=_layers,
        processor=lambda module: SanaMixerProcessor(),
        hooks=_hooks,
        plain=PLAIN,
        cp_plan=lambda model: {"transformer_blocks.0": {"hidden_states": TOKENS}, "proj_out": GATHER},
    ),
)
