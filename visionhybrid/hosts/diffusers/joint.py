"""The processor for joint attention of text and image tokens, each with projections of its own: Flux, Stable Diffusion 3.

Mixers take the sequence as [text, image], which is Flux's order; SD3 has [image, text], so there the streams are put together
the other way than diffusers does, and taken apart again. Nothing but a sum over all tokens depends on it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

__all__ = ["JointProcessor"]

# to_q, to_k, to_v, both norms, and the one projection that `fuse_qkv_projections` makes
IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_qkv")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_added_qkv")


class JointProcessor:
    """Runs `attn.mixer` where diffusers' `FluxAttnProcessor` or `JointAttnProcessor2_0` would run softmax attention."""

    mixes = True
    _parallel_config: Any = None  # diffusers writes it when tokens are sharded over ranks

    def __call__(
        self,
        attn: Any,  # `FluxAttention`, or an `Attention` with added projections
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        grid: tuple[int, ...] | None = None,
        text_tokens: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """(B, N, C) and, in blocks with two streams, (B, M, C) of text; to the same shapes, image first.

        Args:
            image_rotary_emb: cosine and sine (M + N, D) of [text, image].
            grid: sides of the image. text_tokens: how many of `hidden_states` come first and are text, where there is one
                stream only.
        """
        mixer, name = attn.mixer, attn.mixer.about.name
        if attention_mask is not None:
            raise ValueError(f"{name}: cannot honour a bias on softmax logits, which attention_mask is here")
        if self._parallel_config is not None:
            raise ValueError(f"{name}: sees its rank's tokens only; context parallelism is not supported")
        q, k, v = _project(attn, hidden_states, IMAGE)
        if encoder_hidden_states is not None:
            text_tokens = encoder_hidden_states.shape[1]
            text = _project(attn, encoder_hidden_states, TEXT)
            q, k, v = (torch.cat(pair, 2) for pair in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=2) for x in (q, k))
        if grid is None:
            if mixer.about.grids:
                raise ValueError(
                    f"{name}: needs the sides of its {q.shape[2] - text_tokens} image tokens, which this model did not tell"
                )
            grid = (q.shape[2] - text_tokens,)

        out = mixer(q, k, v, grid=grid, text_tokens=text_tokens).transpose(1, 2).flatten(2)  # (B, M + N, C)
        if encoder_hidden_states is None:
            return _leave(attn, out)
        text, image = out.tensor_split([text_tokens], dim=1)
        return _leave(attn, image), text if attn.context_pre_only else attn.to_add_out(text)


def _project(attn: Any, x: Tensor, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, C) of one stream -> its q, k, v as (B, heads, N, D), normed."""
    to_q, to_k, to_v, norm_q, norm_k = (getattr(attn, name) for name in names[:5])
    if hasattr(attn.mixer, "hidden"):  # q and k come of other states than v
        x_q, x_k = attn.mixer.hidden(x)
        parts = to_q(x_q), to_k(x_k), to_v(x)
    elif attn.fused_projections:
        parts = getattr(attn, names[5])(x).chunk(3, dim=-1)
    else:
        parts = to_q(x), to_k(x), to_v(x)
    q, k, v = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts)
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def _leave(attn: Any, x: Tensor) -> Tensor:
    for layer in getattr(attn, "to_out", None) or ():  # Flux's single blocks have none
        x = layer(x)
    return x
