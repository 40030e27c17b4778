"""The timm host: mixers in the attention of timm's vision transformers (`VisionTransformer`: ViT, DeiT, DINOv2, SigLIP, CLIP ...).

    model = timm.create_model("vit_small_patch16_224", pretrained=True, img_size=448, dynamic_img_size=True)
    visionhybrid.attach(model, "linfusion")

`modules.py` has the classes that do the work; the mixer is `blocks.<i>.attn.mixer`. To load weights of a model with mixers, make
the timm model, attach the same mixers, `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

from timm.layers.attention import Attention
from torch import nn

from visionhybrid.hosts.layers import Layer, SampleSize, Selector, choose, sides
from visionhybrid.hosts.plan import Mixers, plan
from visionhybrid.hosts.report import Report, Row, row_of
from visionhybrid.hosts.timm.modules import BLOCKS, MODELS, MixedAttention, MixedViT

__all__ = ["attach", "attention", "describe", "detach", "mount"]

# Attention classes by name (they stand in files of many models) and why a mixer cannot take their place.
_REASONS = {
    "WindowAttention": "attention in windows with a bias for each relative position, which a mixer would lose",
    "WindowMultiHeadAttention": "attention in windows with cosine logits and a bias for each relative position",
    "EvaAttention": "rotary attention, whose angles belong to timm's Eva models",
    "AttentionRope": "rotary attention, whose angles belong to timm's Eva models",
    "DiffAttention": "the difference of two softmax attentions",
    "AttentionPoolLatent": "attention pooling: its queries are not the image's tokens",
    "AttentionPoolPrr": "attention pooling: its queries are not the image's tokens",
}


def attach(
    model: Any,
    mixer: Mixers,
    *,
    layers: Selector | None = None,
    weights: str | PathLike[str] | Mapping[str, Any] | None = None,
    sample_size: SampleSize = None,
    **options: Any,
) -> Report:
    """See `visionhybrid.attach`; `sample_size` in pixels, by default the model's `img_size`."""
    model = getattr(model, "_orig_mod", model)
    if weights is not None:
        raise ValueError(f"attach: no weights of mixers are published for {type(model).__name__}")
    mount(model, mixer, layers, sample_size, options)
    return describe(model, sample_size=sample_size)


def mount(
    model: Any,
    mixer: Mixers,
    layers: Selector | None,
    sample_size: SampleSize,
    options: Mapping[str, Any],
) -> None:
    """What `attach` does to `model`."""
    found = [_taken(layer) for layer in _layers(model, sample_size)]
    parts = plan(found, mixer, layers, options)
    for part, new in [(part, part.build()) for part in parts]:
        attn: Any = part.layer.module
        like = attn.qkv.weight
        kind = like.dtype if like.is_floating_point() else None  # a quantised projection computes in another
        attn.mixer = new.to(device=like.device, dtype=kind).train(model.training)
        attn.__class__ = MixedAttention
        block = model.get_submodule(part.layer.name.rpartition(".")[0])
        block.__class__ = BLOCKS.get(type(block), type(block))
    model.__class__ = MODELS.get(type(model), type(model))


def detach(model: Any, *, layers: Selector | None = None) -> Report:
    """See `visionhybrid.detach`."""
    model = getattr(model, "_orig_mod", model)
    found = [layer for layer in _layers(model, None) if isinstance(layer.module, MixedAttention)]
    if not found:
        raise ValueError(f"detach: {type(model).__name__} has no mixers")
    blocks, models = ({ours: theirs for theirs, ours in table.items()} for table in (BLOCKS, MODELS))
    chosen = choose(found, layers, "detach")
    for layer in chosen:
        attn: Any = layer.module
        del attn.mixer
        attn.__class__ = Attention
        block = model.get_submodule(layer.name.rpartition(".")[0])
        block.__class__ = blocks[type(block)]
    if len(chosen) == len(found):
        model.__class__ = models.get(type(model), type(model))
    return describe(model)


def describe(model: Any, *, sample_size: SampleSize = None) -> Report:
    """See `visionhybrid.describe`."""
    model = getattr(model, "_orig_mod", model)
    return Report(type(model).__name__, [_row(layer) for layer in _layers(model, sample_size)])


def attention(model: Any, sample_size: SampleSize = None) -> list[Layer]:
    """See `visionhybrid.hosts`."""
    return _layers(getattr(model, "_orig_mod", model), sample_size)


def _taken(layer: Layer) -> Layer:
    """`layer` as `attach` sees it: one that has a mixer cannot get another."""
    if not isinstance(layer.module, MixedAttention):
        return layer
    return replace(layer, reason=f"it has a mixer, {layer.module.mixer.about.name}; detach it first")


def _row(layer: Layer) -> Row:
    return row_of(layer, layer.module.mixer if isinstance(layer.module, MixedAttention) else None)


def _layers(model: nn.Module, size: SampleSize) -> list[Layer]:
    """Every attention of `model`: modules whose class is called so."""
    ours = type(model) in MODELS or isinstance(model, MixedViT)
    grid = _grid(model, size) if ours else None
    joint = bool(getattr(model, "num_prefix_tokens", 0))
    found = []
    for name, module in model.named_modules():
        attn: Any = module
        if "Attention" not in type(module).__name__ or not hasattr(attn, "num_heads"):
            continue
        heads = int(attn.num_heads)
        dim = getattr(getattr(attn, "qkv", None), "in_features", getattr(attn, "dim", 0))
        layer: dict[str, Any] = dict(name=name, module=module, dim=dim, heads=heads, joint=joint, beside=True)
        layer["head_dim"] = getattr(attn, "head_dim", dim // heads)
        found.append(Layer(**layer, grid=grid, reason=_reason(model, name, module, ours)))
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention that a mixer could replace")
    return found


def _reason(model: Any, name: str, attn: Any, ours: bool) -> str | None:
    """Why no mixer can take the place of this attention; None if one can."""
    kind = type(attn).__name__
    if kind in _REASONS:
        return _REASONS[kind]
    if not ours:
        return f"{kind} of {type(model).__name__}; timm models with mixers are {_names(MODELS)}"
    if type(attn) not in (Attention, MixedAttention):
        return f"{kind} is not timm's plain attention"
    block = model.get_submodule(name.rpartition(".")[0])
    if type(block) not in (*BLOCKS, *BLOCKS.values()):
        return f"it stands in a {type(block).__name__}; blocks that can hand on the grid are {_names(BLOCKS)}"
    if attn.attn_drop.p:
        return f"drops {attn.attn_drop.p:g} of its weights in training, and a mixer has none to drop"
    if not isinstance(model.patch_drop, nn.Identity):
        return "patch dropout leaves no grid of tokens in training"
    return None


def _names(table: Mapping[type, type]) -> str:
    return ", ".join(cls.__name__ for cls in table)


def _grid(model: Any, size: SampleSize) -> tuple[int, ...] | None:
    if size is None:
        return model.patch_embed.grid_size
    return tuple(model.patch_embed.dynamic_feat_size(sides(model, size)))
