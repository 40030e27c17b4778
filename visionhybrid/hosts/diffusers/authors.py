"""Layouts of published weights whose tensors go by the model's own names: CLEAR's for Flux, TurboDiffusion's for Wan with SLA.

    attach(pipe, "clear", weights="Huage001/CLEAR", radius=16, down=4)
    attach(pipe, "sla", weights="TurboWan2.1-T2V-1.3B-480P.pth", topk=0.1, block_q=128)

CLEAR's files hold the projections that were distilled, and for pooled images `attn.processor.spatial_weight` of the shape
(1, 1, 1, down, 1, down, 1); the radius stands in their names only. TurboDiffusion's hold the whole fine-tuned model under Wan's
names, `blocks.<i>.self_attn.attn_op.local_attn.proj_l.*` among them; share of blocks and their lengths are the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from visionhybrid.hosts.layers import Layer
from visionhybrid.hosts.plan import Part

__all__ = ["clear", "turbodiffusion"]

Tensors = dict[str, dict[str, Tensor]]  # layer -> {key: tensor}
_CLEAR_KEY = re.compile(
    r"((?:single_)?transformer_blocks\.\d+\.attn)\.(processor\.spatial_weight|to_(?:q|k|v|out\.0)\.(?:weight|bias))"
)
_CLEAR_FILE = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?")
_PROJ_L = re.compile(r"(blocks\.\d+)\.self_attn\.attn_op\.local_attn\.(proj_l\.(?:weight|bias))")
# Wan's name -> diffusers' name
_WAN = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"patch_embedding\.(\w+)", r"patch_embedding.\1"),
        (r"text_embedding\.0\.(\w+)", r"condition_embedder.text_embedder.linear_1.\1"),
        (r"text_embedding\.2\.(\w+)", r"condition_embedder.text_embedder.linear_2.\1"),
        (r"time_embedding\.0\.(\w+)", r"condition_embedder.time_embedder.linear_1.\1"),
        (r"time_embedding\.2\.(\w+)", r"condition_embedder.time_embedder.linear_2.\1"),
        (r"time_projection\.1\.(\w+)", r"condition_embedder.time_proj.\1"),
        (r"(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
        (r"(blocks\.\d+)\.self_attn\.([qkv])\.(\w+)", r"\1.attn1.to_\2.\3"),
        (r"(blocks\.\d+)\.self_attn\.o\.(\w+)", r"\1.attn1.to_out.0.\2"),
        (r"(blocks\.\d+)\.self_attn\.(norm_[qk]\.weight)", r"\1.attn1.\2"),
        (r"(blocks\.\d+)\.cross_attn\.([qkv])\.(\w+)", r"\1.attn2.to_\2.\3"),
        (r"(blocks\.\d+)\.cross_attn\.o\.(\w+)", r"\1.attn2.to_out.0.\2"),
        (r"(blocks\.\d+)\.cross_attn\.(norm_[qk]\.weight)", r"\1.attn2.\2"),
        # the one with an affine map, before cross attention
        (r"(blocks\.\d+)\.norm3\.(\w+)", r"\1.norm2.\2"),
        (r"(blocks\.\d+)\.ffn\.0\.(\w+)", r"\1.ffn.net.0.proj.\2"),
        (r"(blocks\.\d+)\.ffn\.2\.(\w+)", r"\1.ffn.net.2.\2"),
        (r"head\.head\.(\w+)", r"proj_out.\1"),
        (r"head\.modulation", r"scale_shift_table"),
    )
)


def clear(
    name: str, state: Mapping[str, Tensor], layers: Sequence[Layer], options: Mapping[str, Any]
) -> tuple[list[Part], Tensors]:
    """CLEAR's weights for a Flux model that has `layers`; `name` may tell their radius.

    Raises:
        ValueError: a radius that nobody tells, or two; tensors that are not CLEAR's, or another model's.
    """
    told = _CLEAR_FILE.search(name)
    down = {int(value.shape[3]) for key, value in state.items() if key.endswith(".spatial_weight")} or {1}
    facts: dict[str, Any] = {"down": min(down)} | ({"radius": int(told[1])} if told else {})
    for key, value in facts.items():
        if options.get(key, value) != value:
            raise ValueError(f"{name}: these weights have {key} {value}, got {options[key]}")
    if "radius" not in {**facts, **options}:
        raise ValueError(f"{name}: CLEAR's weights do not say their radius; give radius= (8, 16 or 32)")
    by_name, tensors = {layer.name: layer for layer in layers}, {}
    for key, value in state.items():
        hit = _CLEAR_KEY.fullmatch(key)
        if hit is None or hit[1] not in by_name:
            raise ValueError(f"{name} does not fit this model: no place for {key}")
        pooled = hit[2] == "processor.spatial_weight"
        own = "mixer.spatial_weight" if pooled else hit[2]
        tensors.setdefault(hit[1], {})[own] = value.reshape(value.shape[3], -1) if pooled else value
    for path, own in tensors.items():
        attn = by_name[path].module
        lost = [
            key for key in attn.state_dict() if key.startswith("to_") and "add" not in key and key not in own
        ]
        if lost:
            raise ValueError(f"{name}: {path} lacks {lost[0]}")
        if by_name[path].reason:
            raise ValueError(f"{name}: {path}: {by_name[path].reason}")
    return [
        Part(by_name[path], "clear", {**options, **facts}) for path in by_name if path in tensors
    ], tensors


def turbodiffusion(
    name: str,
    state: Mapping[str, Tensor],
    layers: Sequence[Layer],
    options: Mapping[str, Any],
    model: nn.Module,
) -> tuple[list[Part], Tensors, dict[str, Tensor]]:
    """TurboDiffusion's weights for a Wan `model` that has `layers`.

    Returns: the parts; the mixers' tensors by layer; all others by diffusers' names, which replace the model's.
    Raises:
        ValueError: the tensors are not all that such a model has, and no more, in its shapes.
    """
    own = {key: value for key, value in model.state_dict().items() if ".mixer." not in key}
    by_name, tensors, rest = {layer.name: layer for layer in layers}, {}, {}
    for key, value in state.items():
        hit = _PROJ_L.fullmatch(key)
        if hit:
            tensors.setdefault(f"{hit[1]}.attn1", {})[f"mixer.{hit[2]}"] = value
            continue
        new = next((m.expand(new) for pattern, new in _WAN if (m := pattern.fullmatch(key))), None)
        if new not in own:
            raise ValueError(f"{name} does not fit this model: no place for {key}")
        # Wan's patches are a linear layer over (channel, t, h, w); diffusers' a convolution.
        rest[new] = value.reshape(own[new].shape) if key == "patch_embedding.weight" else value
    lost = [key for key in own if key not in rest]
    if lost:
        raise ValueError(f"{name} does not fit this model: it lacks {len(lost)} tensors, {lost[0]} first")
    if not tensors:
        raise ValueError(f"{name}: no attn_op.local_attn.proj_l, so these are not weights of SLA")
    for path in tensors:
        if path not in by_name or by_name[path].reason:
            why = by_name[path].reason if path in by_name else "no such attention"
            raise ValueError(f"{name} does not fit this model: {path}: {why}")
    return [Part(by_name[path], "sla", options) for path in by_name if path in tensors], tensors, rest
