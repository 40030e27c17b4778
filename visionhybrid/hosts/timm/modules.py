"""timm's vision transformer with mixers: classes that `attach` gives to the modules that are there.

No module is replaced and no weight moves: attention, block and model become instances of the classes here, and instances of
timm's again when they are detached, so keys, hooks, optimisers and LoRA hold. The sides of the token grid are an argument of every
call from the model down, never state: recomputation under gradient checkpointing sees the grid of its own forward pass, also when
images of other sizes went through the model in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.models import checkpoint, register_notrace_module
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from visionhybrid.mixers import Mixer, create

__all__ = [
    "BLOCKS",
    "MODELS",
    "MixedAttention",
    "MixedViT",
    "MixedVisionTransformer",
    "as_bytes",
    "from_bytes",
]

Grid = tuple[int, int]


def as_bytes(facts: Mapping[str, Any]) -> Tensor:
    """JSON as a tensor, (bytes,) uint8: what a state dict can hold in any format."""
    return torch.tensor(list(json.dumps(facts, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")


def from_bytes(state: Tensor) -> dict[str, Any]:
    """ValueError for a tensor that is not of `as_bytes`."""
    try:
        return json.loads(bytes(state.tolist()).decode())
    except (ValueError, TypeError) as error:
        raise ValueError(f"not the description of a mixer: a tensor of {tuple(state.shape)}") from error


def chosen(mixer: Mixer) -> dict[str, Any]:
    """The options of `mixer` that are not the default."""
    defaults = json.loads(json.dumps(mixer.about.options))
    return {key: value for key, value in mixer.options.items() if value != defaults[key]}


class MixedAttention(Attention):
    """timm's `Attention` whose softmax is `mixer`; class and register tokens before the image are the mixer's text tokens.

    A state dict says which mixer it belongs to, in `<name>._extra_state`: plain timm refuses it, also if the mixer has no weights.
    """

    mixer: Mixer

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: Grid | None = None,
    ) -> Tensor:
        """(B, prefix + H * W, dim) -> the same shape, `grid` being (H, W)."""
        if attn_mask is not None or is_causal:
            raise ValueError(
                f"{self.mixer.about.name} mixers take neither attn_mask nor is_causal; detach first"
            )
        if grid is None:
            raise ValueError(
                f"a {self.mixer.about.name} mixer needs grid=(H, W); call the model, not its parts"
            )
        B, N, _ = x.shape
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        place = dict(grid=grid, text_tokens=N - grid[0] * grid[1])
        out = self.mixer(q, k, v, **place).transpose(1, 2).reshape(B, N, self.attn_dim)
        if hasattr(self.mixer, "beside"):
            out = out + self.mixer.beside(x, **place)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, each (B, heads, N, D), k and q of the mixer's own hidden states if it has some."""
        sources = (*self.mixer.hidden(x), x)
        if all(source is x for source in sources):
            return tuple(self._heads(part) for part in self.qkv(x).chunk(3, -1))
        # LoRA, quantisation: the weight alone does not say what such a layer computes.
        if type(self.qkv) is not nn.Linear:
            return tuple(self._heads(self.qkv(s).chunk(3, -1)[i]) for i, s in enumerate(sources))
        weights = self.qkv.weight.chunk(3)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        return tuple(self._heads(F.linear(*part)) for part in zip(sources, weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def facts(self) -> dict[str, Any]:
        return {"mixer": self.mixer.about.name, "options": chosen(self.mixer), "heads": self.num_heads}

    def get_extra_state(self) -> Tensor:
        return as_bytes(self.facts())

    def set_extra_state(self, state: Tensor) -> None:
        found = from_bytes(state)
        if found != self.facts():
            raise ValueError(f"these weights are of another mixer: {found}, here is {self.facts()}")


register_notrace_module(MixedAttention)  # as a decorator it hides the type


class MixedBlock(Block):
    """timm's `Block` that hands the grid to its attention."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: Grid | None = None,
    ) -> Tensor:
        mixed = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, grid=grid)
        x = x + self.drop_path1(self.ls1(mixed))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class MixedResPostBlock(ResPostBlock):
    """timm's `ResPostBlock`, whose norms come after attention and network."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grid: Grid | None = None,
    ) -> Tensor:
        mixed = self.attn(x, attn_mask=attn_mask, is_causal=is_causal, grid=grid)
        x = x + self.drop_path1(self.norm1(mixed))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class MixedViT(nn.Module):
    """What a vision transformer with mixers does differently from timm's class, which comes next among its bases."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, prefix + tokens, dim), as timm's."""
        return self._tokens(x, attn_mask, is_causal)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Outputs of some blocks, with the arguments and results of timm's `VisionTransformer.forward_intermediates`."""
        me: Any = self
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(me.blocks), indices)
        final, taps, grid = self._tokens(
            x, attn_mask, is_causal, take, last + 1 if stop_early else None, norm
        )
        prefix = [tap[:, : me.num_prefix_tokens] for tap in taps]
        taps = [tap[:, me.num_prefix_tokens :] for tap in taps]
        if output_fmt == "NCHW":
            taps = [tap.transpose(1, 2).unflatten(2, grid).contiguous() for tap in taps]
        with_prefix = return_prefix_tokens and me.num_prefix_tokens > 0
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": taps}
            if with_prefix:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else {**found, "image_features": final}
        taps = list(zip(taps, prefix, strict=True)) if with_prefix else taps
        return taps if intermediates_only else (final, taps)

    def _tokens(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        take: Any = (),
        stop: int | None = None,
        norm: bool = False,
    ) -> tuple[Tensor, list[Tensor], Grid]:
        """Normed tokens after the last block, tokens after the blocks `take`, and the grid."""
        me: Any = self
        grid = me.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = me.norm_pre(me.patch_drop(me._pos_embed(me.patch_embed(x))))
        taps = []
        masked = {} if attn_mask is None and not is_causal else dict(attn_mask=attn_mask, is_causal=is_causal)
        for i, block in enumerate(me.blocks if stop is None else me.blocks[:stop]):
            place = dict(grid=grid) if isinstance(block, tuple(BLOCKS.values())) else {}
            run = partial(block, **masked, **place)
            # As timm: with a mask nothing is recomputed.
            x = checkpoint(run, x) if me.grad_checkpointing and not masked else run(x)
            if i in take:
                taps.append(me.norm(x) if norm else x)
        return me.norm(x), taps, grid

    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """timm's, then the mixers', which begin as their own files say (most at zero)."""
        super().init_weights(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue], timm's class comes next
        for module in self.modules():
            if isinstance(module, Mixer):
                fresh = create(
                    module.about.name,
                    dim=module.dim,
                    heads=module.heads,
                    head_dim=module.head_dim,
                    **module.options,
                )
                with torch.no_grad():
                    for own, new in zip(module.parameters(), fresh.parameters(), strict=True):
                        own.copy_(new)


class MixedVisionTransformer(MixedViT, VisionTransformer):
    """timm's `VisionTransformer` with mixers."""


class MixedVisionTransformerDistilled(MixedViT, VisionTransformerDistilled):
    """timm's `VisionTransformerDistilled` (a class and a distillation token) with mixers."""


BLOCKS = {Block: MixedBlock, ResPostBlock: MixedResPostBlock}  # timm's class -> ours
MODELS = {
    VisionTransformer: MixedVisionTransformer,
    VisionTransformerDistilled: MixedVisionTransformerDistilled,
}
