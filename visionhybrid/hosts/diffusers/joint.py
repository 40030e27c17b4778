"""Processors for joint attention of text and image tokens: Flux, Stable Diffusion 3, CogVideoX, HunyuanVideo.

Mixers take the sequence as [text, image], the order of Flux and CogVideoX; SD3 and HunyuanVideo have [image, text], so there the
streams are put together the other way than diffusers does, and taken apart again. Nothing but a sum over all tokens depends on it.
"""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from visionhybrid.hosts.diffusers.parallel import group_of
from visionhybrid.mixers.sharding import mix

__all__ = ["JointProcessor", "VideoJointProcessor"]

# to_q, to_k, to_v, both norms, and the one projection that `fuse_qkv_projections` makes
IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_qkv")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_added_qkv")


class JointProcessor:
    """Runs `attn.mixer` where diffusers' `FluxAttnProcessor` or `JointAttnProcessor2_0` would run softmax attention."""

    mixes = True
    rotates_text = True
    _parallel_config: Any = None  # diffusers writes it when ranks share the tokens

    def __call__(
        self,
        attn: Any,  # `FluxAttention` or `Attention`
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Any, ...] | None = None,
        grid: tuple[int, ...] | None = None,
        text_tokens: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, C) and, in blocks with two streams, (B, M, C) of text; to the same shapes, image first.

        Args:
            attention_mask: (B, 1, 1, N + M), True for real tokens, for mixers that take one.
            image_rotary_emb: cosine and sine, (M + N, D) of [text, image] or (N, D) of the image; the grid may come third.
            grid: sides of the image. text_tokens: how many of `hidden_states` come first and are text, where there is one
                stream only. Where ranks share the tokens, both are of the whole sequence, and so is the mask.
        """
        mixer, name = attn.mixer, attn.mixer.about.name
        group = group_of(self)
        q, k, v = _project(attn, hidden_states, IMAGE)
        rotary, sides = (image_rotary_emb or ())[:2], (image_rotary_emb or ())[2:]
        if rotary and not self.rotates_text:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        apart = getattr(attn, "add_q_proj", None) is not None  # text has projections of its own
        if encoder_hidden_states is not None:
            text_tokens = text_tokens if group else encoder_hidden_states.shape[1]
            text = _project(attn, encoder_hidden_states, TEXT if apart else IMAGE)
            q, k, v = (torch.cat(pair, 2) for pair in zip(text, (q, k, v), strict=True))
        if rotary and self.rotates_text:
            q, k = _rotate(q, rotary), _rotate(k, rotary)
        grid = sides[0] if sides else grid
        if grid is None:
            if mixer.about.grids or group is not None:
                raise ValueError(
                    f"{name}: needs the sides of its {q.shape[2] - text_tokens} image tokens, "
                    "which this model did not tell"
                )
            grid = (q.shape[2] - text_tokens,)
        if group is not None and attention_mask is not None:
            text_tokens = attention_mask.shape[-1] - prod(grid)

        extra = (
            {} if attention_mask is None else {"key_mask": self.key_mask(attention_mask, text_tokens, name)}
        )
        out = mix(mixer, q, k, v, grid=grid, text_tokens=text_tokens, group=group, **extra)
        out = out.transpose(1, 2).flatten(2)
        del q, k, v  # what follows is the larger for them
        if encoder_hidden_states is None:
            return _leave(attn, out)
        text, image = out.tensor_split([encoder_hidden_states.shape[1]], dim=1)
        if apart:
            text = text if attn.context_pre_only else attn.to_add_out(text)
        else:
            text = _leave(attn, text)
        return _leave(attn, image), text

    def key_mask(self, attention_mask: Tensor, text_tokens: int, name: str) -> Tensor:
        """(B, M + N), True for keys of [text, image] that count."""
        raise ValueError(f"{name}: cannot honour a bias on softmax logits, which attention_mask is here")


class VideoJointProcessor(JointProcessor):
    """Runs `attn.mixer` in HunyuanVideo and CogVideoX: rotary on the video only, padded text masked (as keys)."""

    rotates_text = False

    def key_mask(self, attention_mask: Tensor, text_tokens: int, name: str) -> Tensor:
        if attention_mask.dtype != torch.bool or attention_mask.shape[1:3] != (1, 1):
            return super().key_mask(attention_mask, text_tokens, name)
        return attention_mask[:, 0, 0].roll(text_tokens, 1)  # comes as [video, text]


def _project(attn: Any, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, C) of one stream -> its q, k, v as (B, heads, N, D), normed."""
    to_q, to_k, to_v, norm_q, norm_k = (getattr(attn, name) for name in names[:5])
    x_q, x_k = attn.mixer.hidden(x)
    if attn.fused_projections and x_q is x_k is x:
        parts = getattr(attn, names[5])(x).chunk(3, dim=-1)
    else:
        parts = to_q(x_q), to_k(x_k), to_v(x)
    q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def _rotate(x: Tensor, rotary: tuple[Any, ...]) -> Tensor:
    return cast(Tensor, apply_rotary_emb(x, rotary))  # a tensor, given cosine and sine


def _leave(attn: Any, x: Tensor) -> Tensor:
    for layer in getattr(attn, "to_out", None) or ():  # Flux's single blocks have none
        x = layer(x)
    return x
