"""Flux: joint attention in double blocks (text and image apart) and single blocks (one sequence), rotary on all tokens.

The grid. Flux gets packed tokens, and only `img_ids` (frame, y, x) say where they lie. A hook on the model reads the sides from
them, if a mixer needs sides, and adds them and the number of text tokens to `joint_attention_kwargs`, which every attention gets.
That is one look at a tensor's values a step, where `torch.compile(fullgraph=True)` cannot follow: give
`joint_attention_kwargs={"grid": (H, W)}` then, in tokens, which is taken as it is. (Compiling block by block needs nothing.)

An IP-Adapter adds attention from the image's queries to its own tokens after the joint attention of double blocks. diffusers loads
it as a processor there, which is made one that runs the mixer first.

CLEAR's NTK factor multiplies the base of the rotary embedding: `transformer.pos_embed.theta = 10_000 * factor`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxIPAdapterAttnProcessor
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from visionhybrid.hosts.diffusers.arguments import Call, added, argument, drop
from visionhybrid.hosts.diffusers.family import Family, Sides, does_more, hook_others, layers_of
from visionhybrid.hosts.diffusers.joint import JointProcessor
from visionhybrid.hosts.layers import Layer

__all__ = ["FAMILIES", "FluxIPMixerProcessor"]

PLAIN = frozenset({"FluxAttnProcessor", "FluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0"})
# places among the arguments of FluxTransformer2DModel.forward
HIDDEN, ENCODER, IMG_IDS, KWARGS = 0, 1, 4, 7


class FluxIPMixerProcessor(FluxIPAdapterAttnProcessor):
    """Runs `attn.mixer` where diffusers' `FluxIPAdapterAttnProcessor` would run softmax attention; its weights are that one's."""

    mixes = True

    def __call__(
        self,
        attn: Any,  # the `FluxAttention` of a double block
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Any, ...] | None = None,
        ip_hidden_states: list[Tensor] | None = None,
        grid: tuple[int, ...] | None = None,
        text_tokens: int = 0,
    ) -> tuple[Tensor, ...]:
        """As `JointProcessor`; and what the image gets of `ip_hidden_states`, (B, L, C) of each adapter, where there are any."""
        joint = JointProcessor()
        joint._parallel_config = self._parallel_config
        out = joint(
            attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, grid, text_tokens
        )
        if ip_hidden_states is None:
            return out  # pyright: ignore[reportReturnType]
        q = attn.norm_q(attn.to_q(hidden_states).unflatten(2, (attn.heads, -1)))
        q = q.transpose(1, 2)  # not rotated
        seen = torch.zeros_like(out[0])
        for tokens, scale, to_k, to_v in zip(
            ip_hidden_states, self.scale, self.to_k_ip, self.to_v_ip, strict=True
        ):
            k, v = (
                to(tokens).unflatten(-1, (attn.heads, -1)).flatten(1, -3).transpose(1, 2)
                for to in (to_k, to_v)
            )
            seen = seen + scale * scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return *out, seen

    def release(self) -> FluxIPAdapterAttnProcessor:
        """diffusers' own processor with these weights, for `detach`."""
        self.__class__ = FluxIPAdapterAttnProcessor  # pyright: ignore[reportAttributeAccessIssue]
        return self


def _adapt(attn: Any, processor: Any) -> Any:
    """Loading an IP-Adapter, or unloading it, beside a mixer."""
    if type(processor) is FluxIPAdapterAttnProcessor:
        processor.__class__ = FluxIPMixerProcessor
    elif isinstance(attn.processor, FluxIPMixerProcessor) and type(processor).__name__ in PLAIN:
        processor = JointProcessor()
    if getattr(processor, "mixes", False):
        processor._parallel_config = attn.processor._parallel_config
    return processor


def _layers(model: nn.Module, size: Sides) -> list[Layer]:
    """`size` in latent pixels, of which two by two are packed to a token."""
    grid = None if size is None else tuple(side // 2 for side in size)
    return layers_of(
        model,
        FluxAttention,
        lambda name, module: dict(grid=grid, joint=True, reason=does_more(module, PLAIN)),
    )


def _hooks(model: nn.Module, names: set[str]) -> list[Any]:
    mixers = [model.get_submodule(f"{name}.mixer") for name in names]
    told = model.register_forward_pre_hook(partial(_tell, mixers=mixers), with_kwargs=True)
    return [told, *hook_others(model, FluxAttention, names, drop)]


def _tell(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, mixers: list[Any]) -> Call:
    """Numbers of text and image tokens, or the image's sides if they matter, into joint_attention_kwargs."""
    image, text = (
        argument(args, kwargs, place, name).shape[1]
        for place, name in ((HIDDEN, "hidden_states"), (ENCODER, "encoder_hidden_states"))
    )
    extra: dict[str, Any] = {"text_tokens": text, "grid": (image,)}
    given = argument(args, kwargs, KWARGS, "joint_attention_kwargs") or {}
    if "grid" not in given and any(mixer.about.grids or mixer.asks for mixer in mixers):
        extra["grid"] = _sides(argument(args, kwargs, IMG_IDS, "img_ids"))
    return added(args, kwargs, KWARGS, "joint_attention_kwargs", extra)


def _sides(ids: Tensor) -> tuple[int, int]:
    """(H, W) of the image whose tokens have places `ids`, (N, 3) or (B, N, 3): frame, y, x, row by row.

    Counts the first row, since in half precision places above 256 are rounded (diffusers makes them in the prompt's type).
    """
    ids = ids[0] if ids.ndim == 3 else ids
    row = ids[:, 1] == ids[0, 1]
    width, run, frames = torch.stack(
        [row.sum(), row.int().cumprod(0).sum(), (ids[:, 0] != ids[0, 0]).sum()]
    ).tolist()
    if frames or run != width or len(ids) % width:
        raise ValueError(
            "Flux: img_ids are not one image row by row (a second one beside it, as in Flux Kontext, has no place in a "
            "grid); use a mixer that needs none"
        )
    return len(ids) // width, width


FAMILIES = (
    Family(
        models=("FluxTransformer2DModel",),
        layers=_layers,
        processor=lambda module: JointProcessor(),
        hooks=_hooks,
        plain=PLAIN,
        adapt=_adapt,
    ),
)
