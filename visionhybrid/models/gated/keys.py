"""Checkpoints of RAVLT and MALA: the authors' keys to ours, and what keys and shapes tell of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from visionhybrid.models.checkpoint import rename

_AUTHORS = "patch_embed.proj.0.weight"
_RULES = (
    (r"patch_embed\.proj\.(\d+)\.(.+)", lambda m: f"stem.{int(m[1]) // 3}.{('conv', 'norm')[int(m[1]) % 3]}.{m[2]}"),
    (r"layers\.\d+\.RoPE\.angle", None),
    (r"layers\.(\d+)\.blocks\.(\d+)\.pos\.(.+)", r"stages.\1.blocks.\2.cpe.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.norm([12])\.norm\.(.+)", r"stages.\1.blocks.\2.norm\3.\4"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.(.+)", r"stages.\1.blocks.\2.mixer.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.ffn\.(.+)", r"stages.\1.blocks.\2.mlp.\3"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.gamma_([12])", r"stages.\1.blocks.\2.scale\3.gamma"),
    (r"layers\.(\d+)\.downsample\.reduction\.(.+)", lambda m: f"stages.{int(m[1]) + 1}.downsample.conv.{m[2]}"),
    (r"layers\.(\d+)\.downsample\.norm\.(.+)", lambda m: f"stages.{int(m[1]) + 1}.downsample.norm.{m[2]}"),
    (r"proj\.(.+)", r"norm.conv.\1"),
    (r"norm\.(.+)", r"norm.norm.\1"),
    (r"head\.(.+)", r"head.fc.\1"),
)  # fmt: skip


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours; ours are returned as they are."""
    if _AUTHORS not in state:
        return dict(state)
    ours = rename(state, _RULES)
    for key, value in ours.items():
        if key.endswith(".gamma"):
            ours[key] = value.flatten()  # theirs are (1, C, 1, 1)
        elif key == "head.fc.weight":
            ours[key] = value.flatten(1)  # theirs is a 1x1 convolution
    return ours


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`convert` under the name and signature that timm expects."""
    return convert(state_dict)


def proj_dim(state: Mapping[str, Tensor]) -> int | None:
    """Width of the final projection of a model of this family, 0 if it was cut off; None for weights of another family."""
    block = "layers.0.blocks.0.attn" if _AUTHORS in state else "stages.0.blocks.0.mixer"
    if f"{block}.qkvo.weight" not in state:
        return None
    final = next((key for key in ("norm.conv.weight", "proj.weight") if key in state), None)
    return state[final].shape[0] if final else 0


def options(
    state: Mapping[str, Tensor], *, variants: Mapping[str, Mapping[str, Any]], **given: Any
) -> dict[str, Any]:
    """Keywords of a `GatedBackbone`, read from keys and shapes; `given` adds or repeats some.

    The number of heads shows in the authors' rotary angles; without those it is that of the variant with these widths.

    Raises:
        ValueError: `given` contradicts a shape, or the number of heads must be given.
    """
    angles = [len(state[key]) for i in range(4) if (key := f"layers.{i}.RoPE.angle") in state]
    ours = convert(state)
    places = {
        (int(m[1]), int(m[2])) for key in ours if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))
    }
    first = [f"stages.{i}.blocks.0" for i in range(4)]
    dims = [ours[f"{block}.mlp.fc2.weight"].shape[0] for block in first]
    seen: dict[str, Any] = dict(
        in_chans=ours["stem.0.conv.weight"].shape[1],
        num_classes=ours["head.fc.weight"].shape[0] if "head.fc.weight" in ours else 0,
        depths=[sum(stage == i for stage, _ in places) for i in range(4)],
        dims=dims,
        mlp_ratios=[
            ours[f"{block}.mlp.fc2.weight"].shape[1] / dim for block, dim in zip(first, dims, strict=True)
        ],
        proj_dim=ours["norm.conv.weight"].shape[0],
    )
    for name in seen.keys() & given.keys():
        if _plain(given[name]) != _plain(seen[name]):
            raise ValueError(f"{name} is {_plain(seen[name])} in this checkpoint, got {_plain(given[name])}")
    like = next(
        (v for v in variants.values() if all(_plain(v[n]) == seen[n] for n in ("dims", "depths"))), {}
    )
    if len(angles) == 4:
        seen["num_heads"] = [dim // (2 * angle) for dim, angle in zip(dims, angles, strict=True)]
    elif "num_heads" in like:
        seen["num_heads"] = _plain(like["num_heads"])
    elif "num_heads" not in given:
        raise ValueError("the number of heads shows in no shape; pass num_heads=, such as (1, 2, 4, 8)")
    start = like.get("layer_scale", (1.0,) * 4)
    deployed = "stem.0.norm.weight" not in ours
    seen["layer_scale"] = [
        value if deployed or f"{block}.scale1.gamma" in ours else None
        for value, block in zip(start, first, strict=True)
    ]
    return {**seen, **given, **({"deployed": True} if deployed else {})}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
