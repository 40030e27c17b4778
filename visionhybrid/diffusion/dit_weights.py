"""Weights of DiT as published, and of DiTs with grafted operators, as a `HybridDiT`.

    teacher = read_dit("DiT-XL-2-256x256.pt")

Layouts of facebookresearch/DiT@ed81ce2 `models.py` and keshik6/grafting@6ace8b5 `src/graft.py`, where `attn` or `mlp` of some
blocks is another operator; grafted checkpoints hold the averaged weights under "ema".
SiT has the same layout, but counts times from noise to image, in [0, 1], so its weights mean something else here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionhybrid.diffusion.hybrid_dit import HybridDiT
from visionhybrid.models.checkpoint import rename
from visionhybrid.models.checkpoint.foreign import read_state

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # width -> heads, of DiT-S, -B, -L, -XL
RULES = (
    (r"x_embedder\.proj\.(\w+)", r"patch.\1"),
    (r"pos_embed", "positions"),
    (r"t_embedder\.mlp\.0\.(\w+)", r"time_embed.linear_1.\1"),
    (r"t_embedder\.mlp\.2\.(\w+)", r"time_embed.linear_2.\1"),
    (r"y_embedder\.embedding_table\.(\w+)", r"class_embed.\1"),
    (r"blocks\.(\d+)\.attn\.(?:qkv|in_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.(?:out_)?proj\.(\w+)", r"blocks.\1.attn.to_out.\2"),
    (r"blocks\.(\d+)\.attn\.(\w+_filter\.\w+)", r"blocks.\1.attn.mixer.\2"),
    (r"blocks\.(\d+)\.mlp\.(.+)", r"blocks.\1.mlp.\2"),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.(\w+)", r"blocks.\1.modulation.\2"),
    (r"final_layer\.linear\.(\w+)", r"head.\1"),
    (r"final_layer\.adaLN_modulation\.1\.(\w+)", r"modulation.\1"),
)


def read_dit(
    source: str | Path | Mapping[str, Tensor], *, num_attention_heads: int | None = None
) -> HybridDiT:
    """The generator in a checkpoint of DiT, in eval mode.

    Args:
        source: file (opened safely), or a state dict.
        num_attention_heads: known for DiT's own widths; a file does not say it.
    Raises: ValueError: not a DiT, NaN or infinity in it, a width whose heads are not known, or positions that are not DiT's table.
    """
    state = read_state(source)
    try:
        renamed = rename(state, RULES)
        options = _options(renamed, num_attention_heads)
    except KeyError as error:
        raise ValueError(f"read_dit: not a checkpoint of DiT: {error.args[0]}") from None
    positions = renamed.pop("positions")
    model = HybridDiT(**options)
    if not torch.allclose(positions.float(), model.positions, atol=1e-4):
        raise ValueError("read_dit: the positions are not DiT's sine-cosine table")
    model.load_state_dict(_split(renamed), strict=True)
    return model.eval()


def _options(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """Keywords of `HybridDiT`, from the shapes."""
    dim, channels, patch, _ = state["patch.weight"].shape
    heads = heads or HEADS.get(dim)
    if heads is None or dim % heads:
        raise ValueError(f"read_dit: how many heads make up a width of {dim}? give num_attention_heads=")
    layers = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    mixers, mixer_options, networks, ratios = [], {}, [], []
    for i in range(layers):
        taps = {
            name: state[key].shape[2]
            if (key := f"blocks.{i}.attn.mixer.{name}_filter.weight") in state
            else 0
            for name in ("short", "inner")
        }
        mixers.append("hyena" if any(taps.values()) else "softmax")
        if any(taps.values()):
            mixer_options[str(i)] = taps
        plain = f"blocks.{i}.mlp.fc2.weight" in state
        networks.append("mlp" if plain else "hyena")
        ratios.append(state[f"blocks.{i}.mlp.{'fc2' if plain else 'out_proj'}.weight"].shape[1] / dim)
    return dict(
        sample_size=isqrt(state["positions"].shape[1]) * patch,
        in_channels=channels,
        out_channels=state["head.weight"].shape[0] // patch**2,
        patch_size=patch,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=dim // heads,
        num_classes=state["class_embed.weight"].shape[0] - 1,
        mixer=mixers,
        mixer_options=mixer_options or None,
        feed_forward=networks,
        mlp_ratio=ratios,
    )


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One projection for queries, keys and values made three."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {key.replace(".qkv.", f".to_{name}."): part for name, part in parts}
        else:
            found[key] = value
    return found
