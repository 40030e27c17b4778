"""The authors' checkpoints of HAT: keys, bias tables, index buffers, and the options that a state dict shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visionhybrid.models.checkpoint import rename
from visionhybrid.models.hat.model import HAT

BLOCK_RULES = (
    (r"(norm[12]\.\w+)", r"\1"),
    (r"(?:attn\.)?relative_position_bias_table", r"mixer.bias_table"),
    (r"(?:attn\.)?((?:qkv|proj)\.\w+)", r"mixer.\1"),
    (r"(mlp\.fc[12]\.\w+)", r"\1"),
    (r"conv_block\.cab\.0\.(\w+)", r"conv.conv1.\1"),
    (r"conv_block\.cab\.2\.(\w+)", r"conv.conv2.\1"),
    (r"conv_block\.cab\.3\.attention\.1\.(\w+)", r"conv.fc1.\1"),
    (r"conv_block\.cab\.3\.attention\.3\.(\w+)", r"conv.fc2.\1"),
)


def _inner(key: str) -> str:
    return next(iter(rename({key: torch.empty(0)}, BLOCK_RULES)))


RULES = (
    (r"relative_position_index_(?:SA|OCA)", None),
    (r"conv_first\.(\w+)", r"stem.\1"),
    (r"patch_embed\.norm\.(\w+)", r"enter.norm.\1"),
    (r"absolute_pos_embed", r"enter.position"),
    (
        r"layers\.(\d+)\.residual_group\.(blocks\.\d+)\.(.+)",
        lambda m: f"groups.{m[1]}.{m[2]}.{_inner(m[3])}",
    ),
    (r"layers\.(\d+)\.residual_group\.overlap_attn\.(.+)", lambda m: f"groups.{m[1]}.overlap.{_inner(m[2])}"),
    (r"layers\.(\d+)\.conv\.(\w+)", r"groups.\1.conv.\2"),
    (r"norm\.(\w+)", r"merge.norm.\1"),
    (r"conv_after_body\.(\w+)", r"merge.conv.\1"),
    (r"conv_before_upsample\.0\.(\w+)", r"tail.before.\1"),
    (r"upsample\.(\d+)\.(\w+)", lambda m: f"tail.up.{int(m[1]) // 2}.{m[2]}"),
    (r"conv_last\.(\w+)", r"tail.last.\1"),
)
# Our key -> the authors', for `export_official`.
INVERSE = (
    (r"stem\.(\w+)", r"conv_first.\1"),
    (r"enter\.norm\.(\w+)", r"patch_embed.norm.\1"),
    (r"enter\.position", r"absolute_pos_embed"),
    (
        r"groups\.(\d+)\.(blocks\.\d+)\.mixer\.bias_table",
        r"layers.\1.residual_group.\2.attn.relative_position_bias_table",
    ),
    (r"groups\.(\d+)\.(blocks\.\d+)\.mixer\.(.+)", r"layers.\1.residual_group.\2.attn.\3"),
    (
        r"groups\.(\d+)\.(blocks\.\d+)\.conv\.conv([12])\.(\w+)",
        lambda m: f"layers.{m[1]}.residual_group.{m[2]}.conv_block.cab.{2 * int(m[3]) - 2}.{m[4]}",
    ),
    (
        r"groups\.(\d+)\.(blocks\.\d+)\.conv\.fc([12])\.(\w+)",
        lambda m: (
            f"layers.{m[1]}.residual_group.{m[2]}.conv_block.cab.3.attention.{2 * int(m[3]) - 1}.{m[4]}"
        ),
    ),
    (r"groups\.(\d+)\.(blocks\.\d+\..+)", r"layers.\1.residual_group.\2"),
    (
        r"groups\.(\d+)\.overlap\.mixer\.bias_table",
        r"layers.\1.residual_group.overlap_attn.relative_position_bias_table",
    ),
    (r"groups\.(\d+)\.overlap\.(?:mixer\.)?(.+)", r"layers.\1.residual_group.overlap_attn.\2"),
    (r"groups\.(\d+)\.conv\.(\w+)", r"layers.\1.conv.\2"),
    (r"merge\.norm\.(\w+)", r"norm.\1"),
    (r"merge\.conv\.(\w+)", r"conv_after_body.\1"),
    (r"tail\.before\.(\w+)", r"conv_before_upsample.0.\1"),
    (r"tail\.up\.(\d+)\.(\w+)", lambda m: f"upsample.{2 * int(m[1])}.{m[2]}"),
    (r"tail\.last\.(\w+)", r"conv_last.\1"),
)


def table_from_official(table: Tensor, window_size: int, key_window_size: int | None = None) -> Tensor:
    """A bias table as the authors store it, (offsets, heads), as ours: (heads, rows, columns) of key minus query.

    Inside windows theirs counts query minus key: reversed. For overlapping windows (`key_window_size` e given) theirs counts
    key minus query from a constant that is (e - 2) (w + e) too small and wraps around: rolled.
    """
    if key_window_size is None:
        plain = table.flip(0)
    else:
        plain = table.roll((key_window_size - 2) * (window_size + key_window_size), 0)
    side = math.isqrt(len(plain))
    return plain.t().reshape(-1, side, side).contiguous()


def table_to_official(table: Tensor, window_size: int, key_window_size: int | None = None) -> Tensor:
    """The inverse of `table_from_official`."""
    plain = table.flatten(1).t()
    if key_window_size is None:
        return plain.flip(0).contiguous()
    return plain.roll(-(key_window_size - 2) * (window_size + key_window_size), 0).contiguous()


def official_index(window_size: int, key_window_size: int | None = None) -> Tensor:
    """The authors' index buffer, (queries, keys) int64: SA, or OCA with its negative entries if `key_window_size` is given."""
    w, e = window_size, key_window_size or window_size
    query, key = torch.arange(w), torch.arange(e)
    if key_window_size is None:
        offset, step = query[:, None] - key + w - 1, 2 * w - 1
    else:
        offset, step = key - query[:, None] + w - e + 1, w + e - 1
    return (step * offset[:, None, :, None] + offset[None, :, None, :]).reshape(w * w, e * e)


def recognise(state: Mapping[str, Tensor]) -> bool:
    """HAT in the authors' layout or in ours; not SwinIR or DAT, which have neither branch nor overlapping block."""
    official = {
        "layers.0.residual_group.overlap_attn.relative_position_bias_table",
        "layers.0.residual_group.blocks.0.conv_block.cab.0.weight",
        "conv_last.weight",
    }
    ours = {"groups.0.overlap.mixer.bias_table", "groups.0.blocks.0.conv.conv1.weight", "tail.last.weight"}
    return official <= state.keys() or ours <= state.keys()


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys and tables as ours; ours unchanged.

    Raises:
        KeyError: a key that HAT does not have.
        ValueError: an index buffer that is not the authors', so the tables beside it would be read wrongly.
    """
    if not any(key.startswith("layers.") for key in state):
        return dict(state)
    converted = rename(state, RULES)
    w, e = _windows(state)
    for name, want in (("SA", official_index(w)), ("OCA", official_index(w, e))):
        have = state.get(f"relative_position_index_{name}")
        if have is not None and not torch.equal(have.cpu(), want):
            raise ValueError(
                f"relative_position_index_{name} is not the authors': these weights come from another HAT"
            )
    for key, value in converted.items():
        if key.endswith("bias_table"):
            converted[key] = table_from_official(value, w, e if ".overlap." in key else None)
        elif key == "enter.position":
            side = math.isqrt(value.shape[1])
            converted[key] = value.reshape(1, side, side, -1)
    return converted


def _windows(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Window sides w and e from the tables of a state dict in the authors' layout."""
    root = "layers.0.residual_group."
    w = (math.isqrt(len(state[f"{root}blocks.0.attn.relative_position_bias_table"])) + 1) // 2
    return w, math.isqrt(len(state[f"{root}overlap_attn.relative_position_bias_table"])) - w + 1


def export_official(model: HAT) -> dict[str, Tensor]:
    """The weights in the authors' layout, index buffers included: their code and spandrel load it strictly."""
    own = model.state_dict()
    mixer = model.groups[0].overlap.mixer
    w, e = mixer.window_size, mixer.key_window_size
    for key, value in own.items():
        if key.endswith("bias_table"):
            own[key] = table_to_official(value, w, e if ".overlap." in key else None)
        elif key == "enter.position":
            own[key] = value.flatten(1, 2)
    buffers = {
        "relative_position_index_SA": official_index(w),
        "relative_position_index_OCA": official_index(w, e),
    }
    return {**buffers, **rename(own, INVERSE)}


def _visible(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every keyword that keys and shapes show. `state` has our keys."""
    groups = 1 + max(int(m[1]) for key in state if (m := re.match(r"groups\.(\d+)\.", key)))
    depths = [
        1 + max(int(m[1]) for key in state if (m := re.match(rf"groups\.{g}\.blocks\.(\d+)\.", key)))
        for g in range(groups)
    ]
    window = (state["groups.0.blocks.0.mixer.bias_table"].shape[1] + 1) // 2
    width = state["tail.last.weight"].shape[1]
    ups = [state[key].shape[0] // width for key in state if re.fullmatch(r"tail\.up\.\d+\.weight", key)]
    position = state.get("enter.position")
    return dict(
        in_chans=state["stem.weight"].shape[1],
        scale=math.prod(math.isqrt(r) for r in ups),
        dim=state["stem.weight"].shape[0],
        depths=depths,
        num_heads=[state[f"groups.{g}.overlap.mixer.bias_table"].shape[0] for g in range(groups)],
        window_size=window,
        key_window_size=state["groups.0.overlap.mixer.bias_table"].shape[1] - window + 1,
        conv_dim=state["groups.0.blocks.0.conv.conv1.weight"].shape[0],
        gate_dim=state["groups.0.blocks.0.conv.fc1.weight"].shape[0],
        mlp_dim=state["groups.0.blocks.0.mlp.fc1.weight"].shape[0],
        tail_dim=width,
        qkv_bias="groups.0.blocks.0.mixer.qkv.bias" in state,
        patch_norm="enter.norm.weight" in state,
        group_conv="merge.conv.weight" in state,
        position_size=0 if position is None else position.shape[1],
    )


# The authors' keywords that are ours under another name, and those that `_translated` turns into ours.
ALIASES = {
    "embed_dim": "dim",
    "upscale": "scale",
    "num_feat": "tail_dim",
    "compress_ratio": "compress_ratio",
    "squeeze_factor": "squeeze_factor",
    "overlap_ratio": "overlap_ratio",
    "mlp_ratio": "mlp_ratio",
    "resi_connection": "resi_connection",
    "ape": "ape",
    "img_size": "img_size",
    "patch_size": "patch_size",
    "upsampler": "upsampler",
    "attn_drop_rate": "attn_drop_rate",
    "use_checkpoint": "use_checkpoint",
}
UNSEEN = ("conv_scale", "shift", "qk_scale", "img_range", "drop_rate", "drop_path_rate", "num_classes")


def _translated(name: str, value: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """One keyword of the authors' constructor as ours; `seen` gives the widths that their ratios refer to."""
    only = {
        "patch_size": 1,
        "upsampler": "pixelshuffle",
        "attn_drop_rate": 0,
        "use_checkpoint": False,
    }
    if name in only:
        if value != only[name]:
            raise ValueError(f"{name} must be {only[name]!r}, got {value!r}")
        return {}
    if name == "img_size":
        side = value if isinstance(value, int) else value[0]
        if side < seen["window_size"]:
            raise ValueError(f"img_size must be at least the window {seen['window_size']}, got {value}")
        table = {"position_size": side} if seen["position_size"] else {}
        # The authors' blocks do not shift where the nominal image is one window.
        return table | ({"shift": 0} if side == seen["window_size"] else {})
    if name == "ape":
        return {} if bool(value) == bool(seen["position_size"]) else {"position_size": 0 if not value else -1}
    if name == "resi_connection":
        if value not in ("1conv", "identity"):
            raise ValueError(f"resi_connection must be '1conv' or 'identity', got {value!r}")
        return {"group_conv": value == "1conv"}
    if name == "overlap_ratio":
        return {"key_window_size": seen["window_size"] + int(seen["window_size"] * value)}
    dim = seen["dim"]
    widths = {
        "compress_ratio": ("conv_dim", lambda: dim // value),
        "squeeze_factor": ("gate_dim", lambda: dim // value),
        "mlp_ratio": ("mlp_dim", lambda: int(dim * value)),
    }
    ours, width = widths[name]
    return {ours: width()}


def options(state: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
    """Keywords of `HAT` from keys and shapes; `given` (our names or the authors') where no shape shows them.

    Widths are kept instead of the authors' ratios, which the shapes do not determine. Not deducible, so by default as in every
    published weight: conv_scale 0.01, img_range 1, qk_scale None, shift half a window.

    Raises:
        ValueError: a given keyword contradicts the shapes, or has a value HAT cannot have.
    """
    seen = _visible(convert(state))
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        name = ALIASES.get(name, name)
        known = name in seen or name in UNSEEN
        if not known and name not in ALIASES:
            raise ValueError(f"no option {name!r}; have {', '.join([*seen, *UNSEEN, *ALIASES])}")
        for ours, wanted in ({name: value} if known else _translated(name, value, seen)).items():
            wanted = list(wanted) if isinstance(wanted, tuple) else wanted
            if ours in seen and wanted != seen[ours]:
                means = "" if ours == name else f" (that is {ours} {wanted})"
                raise ValueError(
                    f"{name}={value!r}{means} contradicts the weights, which have {ours} {seen[ours]}"
                )
            chosen[ours] = wanted
    if not chosen.get("qk_scale", True):
        chosen["qk_scale"] = None  # the authors write `qk_scale or head_dim ** -0.5`
    return seen | chosen
