"""Checkpoints of A2Mamba: the authors' keys to ours, and what keys and shapes tell of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visionhybrid.models.checkpoint import rename

ALIASES = {"image_size": "img_size"}  # the authors' names of arguments

# What the names of a token mixer begin with: the authors' -> ours.
_MIXER = {
    "gate.0.": "gate.conv.",
    "gate.1.": "gate.norm.",
    "proj.0.": "proj_norm.",
    "proj.1.": "proj.",
    "rpb.0": "rpb",
    "rpb.1": "rpb",
    "rpb.2": "bias",
    "ssm.x_proj_weight": "ssm.x_proj",
    "ssm.dt_projs_weight": "ssm.dt_proj",
    "ssm.dt_projs_bias": "ssm.dt_bias",
    "ssm.A_logs": "ssm.A_log",
    "ssm.Ds": "ssm.D",
    "ssm.conv2d.": "ssm.conv.",
    "ssm.state_fusion.": "ssm.mix.",
}
_PARTS = ("conv", "norm")
_RULES = (
    (r"patch_embed\.(\d+)\.(.+)", lambda m: f"stem.{int(m[1]) // 3}.{_PARTS[int(m[1]) % 3]}.{m[2]}"),
    # Fixed by the head dim; ours are made in float32, which a checkpoint in half precision has not kept.
    (r"layers\.\d+\.rope\.angle", None),
    (r"layers\.(\d+)\.blocks\.(\d+)\.(.+)", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}.{block_key(m[3])}"),
    (r"layers\.(\d+)\.([01])\.(.+)", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.{_PARTS[int(m[2])]}.{m[3]}"),
    (r"classifier\.([01])\.(.+)", lambda m: f"norm.{_PARTS[int(m[1])]}.{m[2]}"),
    (r"classifier\.4\.(.+)", r"head.fc.\1"),
)  # fmt: skip


def block_key(name: str) -> str:
    """Our name of a tensor of a block."""
    name = name.replace("layer_scale", "scale")
    if not name.startswith("token_mixer."):
        return name
    rest = name.removeprefix("token_mixer.")
    start = next((start for start in _MIXER if rest.startswith(start)), "")
    return f"mixer.{_MIXER.get(start, '')}{rest.removeprefix(start)}"


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys -> ours; ours are returned as they are.

    The authors list the one table of a mixer twice. Either is enough; if the two differ the second counts, as for the authors.
    """
    if "patch_embed.0.weight" not in state:
        return dict(state)
    twice = {key for key in state if key.endswith(".rpb.0") and f"{key[:-1]}1" in state}
    ours = rename({key: value for key, value in state.items() if key not in twice}, _RULES)
    for key, value in ours.items():
        # All are 1x1 convolutions there.
        if re.search(r"\.scale[12]\.weight$", key):
            ours[key] = value.flatten()
        elif key == "head.fc.weight" or key.endswith(".ssm.mix.weight"):
            ours[key] = value.flatten(1)
    return ours


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`convert` under the name that timm expects; the last stage's tables of biases become those of the model's `img_size`.

    Resized as `GlobalMixer` does for a map of another size, so the model computes what the checkpoint's own would.
    """
    state, target = convert(state_dict), dict(model.named_parameters())
    for key, table in state.items():
        if key.endswith(".mixer.bias") and key in target and table.shape != target[key].shape:
            size = target[key].shape[-2:]
            state[key] = F.interpolate(table.float(), size=size, mode="bicubic").to(table.dtype)
    return state


def recognise(state: Mapping[str, Tensor]) -> bool:
    """Whether these are keys of an A2Mamba: the authors' or ours, deployed or not."""
    theirs = {"patch_embed.0.weight", "layers.0.blocks.0.token_mixer.ssm.A_logs"}
    ours = {"stem.0.conv.weight", "stages.0.blocks.0.mixer.ssm.A_log"}
    return theirs <= state.keys() or ours <= state.keys()


def options(
    state: Mapping[str, Tensor], *, variants: Mapping[str, Mapping[str, Any]], **given: Any
) -> dict[str, Any]:
    """Keywords of `A2Mamba`, read from keys and shapes; `given` adds what shows in none, under our names or the authors'.

    No shape shows whether the residual scales multiply the branch or the skip: for the widths and depths of a published model it is
    as in that model, others need `residual`. `scale_init` only matters to `init_weights`.

    Raises:
        ValueError: `given` contradicts a shape, or `residual` must be given and is not.
    """
    given = {ALIASES.get(name, name): value for name, value in given.items()}
    state = convert(state)
    seen = _visible(state)
    for name in seen.keys() & given.keys():
        if _plain(name, given[name]) != _plain(name, seen[name]):
            raise ValueError(f"{name} is {seen[name]} in this checkpoint, got {given[name]}")
    deployed = "stem.0.norm.weight" not in state
    like: Mapping[str, Any] = next(
        (v for v in variants.values() if all(list(v[name]) == seen[name] for name in ("depths", "dims"))), {}
    )
    scaled = [f"stages.{i}.blocks.0.scale1.weight" in state for i in range(4)]
    if "residual" not in given and (any(scaled) or deployed):
        kinds = like.get("residual", ("plain",) * 4)
        # Deployed, only the scales of skips are left.
        expected = [kind == "residual_scale" if deployed else kind != "plain" for kind in kinds]
        if scaled != expected:
            raise ValueError(
                "what the residual scales multiply shows in no shape; pass residual=, four of plain, layer_scale, residual_scale"
            )
        seen["residual"] = list(kinds)
    if "scale_init" in like:
        seen["scale_init"] = list(like["scale_init"])
    return {**seen, **given, **({"deployed": True} if deployed else {})}


def _visible(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options that keys and shapes of a converted checkpoint show."""
    places = {
        (int(m[1]), int(m[2])) for key in state if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))
    }
    blocks = [f"stages.{i}.blocks.0" for i in range(4)]
    widths = [_shape(state, f"{block}.mlp.fc2.weight")[:2] for block in blocks]
    tables = [_shape(state, f"{block}.mixer.rpb") for block in blocks]
    return dict(
        in_chans=_shape(state, "stem.0.conv.weight")[1],
        num_classes=_shape(state, "head.fc.weight")[0] if "head.fc.weight" in state else 0,
        img_size=_img_size(_shape(state, f"{blocks[3]}.mixer.bias")[-1]),
        depths=[sum(stage == i for stage, _ in places) for i in range(4)],
        dims=[dim for dim, _ in widths],
        num_heads=[2 * table[0] for table in tables],
        kernel_sizes=[(table[-1] + 1) // 2 for table in tables],
        mlp_ratios=[_ratio(dim, hidden) for dim, hidden in widths],
        proj_dim=_shape(state, "norm.conv.weight")[0],
    )


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(f"the checkpoint lacks {key}")
    return tuple(state[key].shape)


def tokens_of(img_size: int | Sequence[int]) -> int:
    """Pixels of the map for which the last stage's table of biases is made: the authors' (H // 32) (W // 32), 1 at least."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return max(1, height // 32) * max(1, width // 32)


def _img_size(tokens: int) -> int | list[int]:
    """The squarest size with a table for so many pixels."""
    height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
    return 32 * height if height**2 == tokens else [32 * height, 32 * (tokens // height)]


def _ratio(dim: int, hidden: int) -> float:
    ratio = hidden / dim
    return ratio if int(ratio * dim) == hidden else math.nextafter(ratio, math.inf)


def _plain(name: str, value: Any) -> Any:
    """What tells two values of an option apart."""
    if name == "img_size":
        return tokens_of(value)
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else value
