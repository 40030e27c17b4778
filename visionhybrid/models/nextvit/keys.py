"""Checkpoints of Next-ViT: the authors' keys to ours, and what keys and shapes tell of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import make_divisible
from torch import Tensor, nn

from visionhybrid.models.checkpoint import rename

# The authors' names of arguments.
AUTHORS = {
    "path_dropout": "drop_path_rate",
    "attn_drop": "attn_drop_rate",
    "drop": "proj_drop_rate",
    "with_extra_norm": "extra_norm",
}
PUBLISHED_DEPTHS = ((3, 4, 10, 3), (3, 4, 20, 3), (3, 4, 30, 3))


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' keys (classification; detection and segmentation under `backbone.`) or timm's -> ours, which are timm's.

    Of a whole detector or segmenter the neck and the heads are left out.
    """
    if any(key.startswith("backbone.") for key in state):
        state = {key[9:]: value for key, value in state.items() if key.startswith("backbone.")}
    if "features.0.mhca.group_conv3x3.weight" not in state:
        return dict(state)
    place = _places(state)
    if "norm.weight" in state and "extra_norm_list.3.weight" in state:
        # Two norms for the last stage: the one that was never trained goes.
        loser = "norm." if _untrained(state, "norm.") else "extra_norm_list.3."
        state = {key: value for key, value in state.items() if not key.startswith(loser)}
    return rename(
        state,
        (
            (r"(stem|norm)\.(.+)", r"\1.\2"),
            (r"features\.(\d+)\.mlp\.conv([12])\.(.+)", lambda m: f"{place[int(m[1])]}.mlp.fc{m[2]}.{m[3]}"),
            (r"features\.(\d+)\.(.+)", lambda m: f"{place[int(m[1])]}.{m[2]}"),
            (r"extra_norm_list\.([012])\.(.+)", r"stages.\1.norm.\2"),
            (r"extra_norm_list\.3\.(.+)", r"norm.\1"),
            (r"proj_head\.0\.(.+)", r"head.fc.\1"),
        ),
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`convert` under the name and signature that timm expects."""
    return convert(state_dict)


def _places(state: Mapping[str, Tensor]) -> list[str]:
    """Our prefix of each of the authors' blocks, which they number through: the attention blocks show where stages end."""
    n = 1 + max(int(m[1]) for key in state if (m := re.match(r"features\.(\d+)\.", key)))
    ends = [j for j in range(n) if f"features.{j}.e_mhsa.q.weight" in state]
    if len(ends) < 3 or ends[-1] != n - 1:
        raise ValueError(f"blocks with attention must close three stages or more, got them at {ends} of {n}")
    # Stage 0 has no attention; stage 1 begins with the first block that strides or changes the width.
    embeds = (j for j in range(1, ends[0]) if f"features.{j}.patch_embed.conv.weight" in state)
    second = next(embeds, ends[0])
    starts = (0, second, ends[0] + 1, ends[-2] + 1)
    places = []
    for j in range(n):
        stage = max(i for i, start in enumerate(starts) if start <= j)
        places.append(f"stages.{stage}.blocks.{j - starts[stage]}")
    return places


def _untrained(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the batch norm under `prefix` still has its initial weights."""
    return bool((state[prefix + "weight"] == 1).all() and (state[prefix + "bias"] == 0).all())


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(f"the checkpoint lacks {key}")
    return tuple(state[key].shape)


def recognise(state: Mapping[str, Tensor]) -> bool:
    """Whether these are keys of a Next-ViT: the authors', timm's or ours, deployed or not, alone or inside a detector."""
    keys = {key.removeprefix("backbone.") for key in state}
    first = {"features.0.mhca.group_conv3x3.weight", "stages.0.blocks.0.mhca.group_conv3x3.weight"}
    return "stem.0.conv.weight" in keys and not first.isdisjoint(keys)


def options(state: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
    """Keywords of `NextViT`, read from keys and shapes; `given` adds what shows in none, under our names or the authors'.

    No shape shows `strides` (the default is right for every published model), nor how many tokens are pooled (`sr_ratios`), which
    the published depths decide. If `depths` is given, both have the constructor's defaults.

    Raises:
        ValueError: `given` contradicts a shape, or the sr ratios must be given and are not.
    """
    state = convert(state)
    given = {AUTHORS.get(name, name): value for name, value in given.items()}
    seen = _visible(state)
    # Those two stand for widths that are rounded: other values fit as well, and wrong ones fail when the weights load.
    for name in (seen.keys() & given.keys()) - {"mix_block_ratio", "mlp_ratios"}:
        if _plain(given[name]) != _plain(seen[name]):
            raise ValueError(f"{name} is {_plain(seen[name])} in this checkpoint, got {_plain(given[name])}")
    deployed = "stem.0.conv.bias" in state
    pooled = [
        f"stages.{i}.blocks.{depth - 1}.e_mhsa.norm.weight" in state for i, depth in enumerate(seen["depths"])
    ]
    if not {"sr_ratios"} & given.keys():
        if deployed or any(pooled):
            # Published depths, or depths given as to the constructor, which then has its own default for the rest.
            known = tuple(seen["depths"]) in PUBLISHED_DEPTHS or "depths" in given
            if not (known and (deployed or pooled == [False, True, True, False])):
                raise ValueError(
                    "how many tokens the attention pools shows in no shape; pass sr_ratios=, such as (8, 4, 2, 1)"
                )
        else:
            seen["sr_ratios"] = [1, 1, 1, 1]
    return {**seen, **given, **({"deployed": True} if deployed else {})}


def _visible(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options that keys and shapes of a converted checkpoint show."""
    places = {
        (int(m[1]), int(m[2])) for key in state if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", key))
    }
    depths = [sum(stage == i for stage, _ in places) for i in range(4)]

    def width(stage: int, block: int) -> int:
        return _shape(state, f"stages.{stage}.blocks.{block}.mlp.fc2.weight")[0]

    def ratio(stage: int, block: int) -> float:
        out, hidden = _shape(state, f"stages.{stage}.blocks.{block}.mlp.fc2.weight")[:2]
        return hidden / out

    ntb_dims = [width(i, depths[i] - 1) for i in (1, 2, 3)]
    attn_dims = [_shape(state, f"stages.{i}.blocks.{depths[i] - 1}.e_mhsa.q.weight")[0] for i in (1, 2, 3)]
    # A stage of one block has no NCB: its entry is not used.
    dims = [width(0, 0), *(width(i, 0) if depths[i] > 1 else attn_dims[i - 1] for i in (1, 2, 3))]
    classes = state["head.fc.weight"].shape[0] if "head.fc.weight" in state else 0
    return dict(
        in_chans=_shape(state, "stem.0.conv.weight")[1],
        num_classes=classes,
        depths=depths,
        stem_chs=[_shape(state, f"stem.{i}.conv.weight")[0] for i in range(3)],
        dims=dims,
        ntb_dims=ntb_dims,
        head_dim=_shape(state, "stages.0.blocks.0.mhca.group_conv3x3.weight")[1],
        mix_block_ratio=_mix(ntb_dims, attn_dims),
        mlp_ratios=[ratio(0, 0), ratio(1, depths[1] - 1)],
        extra_norm="stages.0.norm.weight" in state,
        final_norm="norm.weight" in state,
    )


def _mix(dims: Sequence[int], attn_dims: Sequence[int]) -> float:
    """The share that gives these attention widths; the widths are rounded, so several do: the plainest."""
    for mix in (0.75, 0.5, 0.25, *(i / 10 for i in range(1, 10)), *(i / 100 for i in range(1, 100))):
        if [make_divisible(int(dim * mix), 32) for dim in dims] == list(attn_dims):
            return mix
    raise ValueError(f"no mix_block_ratio gives attention widths {list(attn_dims)} of {list(dims)}")


def _plain(value: Any) -> Any:
    return [float(v) for v in value] if isinstance(value, (list, tuple)) else value
