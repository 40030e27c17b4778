"""Vision transformers whose softmax attention is a mixer (`visionhybrid.mixers`): timm's ViT, and `visionhybrid.attach`.

Papers: ViT, arXiv:2010.11929, in DeiT's sizes (arXiv:2012.12877); each mixer's own file names its paper. Code:
huggingface/pytorch-image-models@v1.0.31, whose class is used as it is. Differences: images of any size (positions are resampled,
sides that are no multiple of the patch are padded), and a state dict that says how it is built. No weights are published; to start
from timm's, attach:

    model = timm.create_model("vit_small_patch16_224", pretrained=True, dynamic_img_size=True)
    visionhybrid.attach(model, "linfusion")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from visionhybrid.hosts.timm import mount
from visionhybrid.hosts.timm.modules import (
    MixedAttention,
    MixedVisionTransformer,
    as_bytes,
    chosen,
    from_bytes,
)
from visionhybrid.models.registry import State, System, register

_FACTS = "_extra_state"  # PyTorch's name of what `get_extra_state` returns


class HybridViT(MixedVisionTransformer):
    """timm's `VisionTransformer` with mixers, for images of any size.

    Args:
        mixer: as for `visionhybrid.attach`: a name for every block, or {selector: name or (name, options)}; empty for none.
        mixer_options: of a single mixer.
        img_size: that the table of positions is made for, one side or (height, width); other sizes resample it.
        reg_tokens: register tokens beside the class token.
        fc_norm: norm after pooling instead of before; by default where `global_pool` is "avg", "avgmax" or "max".
    Raises:
        ValueError: no such mixer, option or layer.
    """

    def __init__(
        self,
        mixer: str | Mapping[str, Any],
        *,
        mixer_options: Mapping[str, Any] | None = None,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        reg_tokens: int = 0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        fc_norm: bool | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape: dict[str, Any] = dict(
            patch_size=patch_size,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qk_norm=qk_norm,
            reg_tokens=reg_tokens,
        )
        rest: dict[str, Any] = dict(global_pool=global_pool, fc_norm=fc_norm, device=device, dtype=dtype)
        super().__init__(
            **shape,
            **rest,
            img_size=(img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1]),
            depth=depth,
            in_chans=in_chans,
            num_classes=num_classes,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
            dynamic_img_pad=True,
        )
        self._shape = shape
        if mixer:
            mount(self, mixer, None, None, mixer_options or {})

    def options(self) -> dict[str, Any]:
        """Keywords that build this model as it is now, but for those that keys and shapes show, and training's rates."""
        height, width = self.patch_embed.img_size
        size = height if height == width else [height, width]
        found = dict(self._shape, depth=len(self.blocks), img_size=size, global_pool=self.global_pool)
        return {**found, **self._mixers()}

    def _mixers(self) -> dict[str, Any]:
        """`mixer` and `mixer_options`, in the shortest words."""
        attentions: list[Any] = [block.attn for block in self.blocks]
        kinds = [
            [module.mixer.about.name, chosen(module.mixer)] if isinstance(module, MixedAttention) else None
            for module in attentions
        ]
        first = kinds[0] if kinds else None
        if first is not None and all(kind == first for kind in kinds):
            return {"mixer": first[0], **({"mixer_options": first[1]} if first[1] else {})}
        return {"mixer": {f"blocks.{i}.attn": kind for i, kind in enumerate(kinds) if kind}}

    @property
    def _visionhybrid(self) -> dict[str, Any]:
        """What `registry.remember` noted, as it is now: `attach`, pruning, or another pooling may have changed it since."""
        rates = {k: v for k, v in self._noted["options"].items() if k != "mixer_options"}
        return {**self._noted, "options": {**rates, **self.options()}}

    @_visionhybrid.setter
    def _visionhybrid(self, noted: dict[str, Any]) -> None:
        self._noted = noted

    def get_extra_state(self) -> Tensor:
        return as_bytes({"system": "vit", **self.options()})

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to set: keys, shapes, and each attention's own description decide whether weights fit."""


def recognise(state: State) -> bool:
    """Whether these are weights of a `HybridViT`, which say so."""
    if _FACTS not in state or "patch_embed.proj.weight" not in state:
        return False
    try:
        return from_bytes(state[_FACTS]).get("system") == "vit"
    except ValueError:
        return False


def options(state: State, **given: Any) -> dict[str, Any]:
    """Keywords of `HybridViT`, as the weights themselves say; `given` adds rates or repeats some.

    Raises:
        ValueError: `given` contradicts the weights.
    """
    seen = {key: value for key, value in from_bytes(state[_FACTS]).items() if key != "system"}
    seen["in_chans"] = state["patch_embed.proj.weight"].shape[1]
    seen["num_classes"] = state["head.weight"].shape[0] if "head.weight" in state else 0
    seen["fc_norm"] = "fc_norm.weight" in state
    repeated = {name: value for name, value in given.items() if value is not None}
    own = {name: value for name, value in seen.items() if name != "mixer_options" or "mixer" not in repeated}
    with torch.device("meta"):  # mixers and sizes can be said in several words
        wanted = HybridViT(**{**own, **repeated}).options()
    for name in ("mixer", *wanted):
        if wanted.get(name) != seen.get(name):
            raise ValueError(f"{name} must be {seen.get(name)} for these weights, got {wanted.get(name)}")
    return {**{name: value for name, value in repeated.items() if name != "mixer_options"}, **seen}


def checkpoint_filter_fn(state_dict: State, model: Any) -> dict[str, Tensor]:
    """The weights with the table of positions of the model's `img_size`, resampled as timm does."""
    state, made_with = dict(state_dict), from_bytes(state_dict[_FACTS])
    size, patch = made_with["img_size"], made_with["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"],
        new_size=list(model.patch_embed.grid_size),
        old_size=[height // patch, width // patch],
        num_prefix_tokens=model.num_prefix_tokens,
    )
    return state


SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}
# With options for the 14 x 14 tokens of an image of 224 x 224.
MIXERS: dict[str, dict[str, Any]] = {
    "clear": dict(mixer="clear", mixer_options=dict(radius=4)),
    "linear": dict(mixer="linear", mixer_options=dict(conv=5)),
    "linfusion": dict(mixer="linfusion"),
    "neighborhood": dict(mixer="neighborhood", mixer_options=dict(kernel_size=7)),
    "sla": dict(mixer="sla", mixer_options=dict(topk=0.25, block_q=16, block_k=16)),
}
VARIANTS = {
    f"vh_vit_{size}_patch16_{name}": {**SIZES[size], **MIXERS[name]} for size, name in product(SIZES, MIXERS)
}
CFGS = {
    name: dict(
        input_size=(3, 224, 224),
        crop_pct=0.9,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        num_classes=1000,
        first_conv="patch_embed.proj",
        classifier="head",
        origin_url="https://github.com/huggingface/pytorch-image-models",
        paper_ids="arXiv:2010.11929",
    )
    for name in VARIANTS
}

register(
    System(
        name="vit",
        task="classification",
        build=HybridViT,
        recognise=recognise,
        options=options,
        convert=dict,
        adapt=checkpoint_filter_fn,
        paper="arXiv:2010.11929",
        source="huggingface/pytorch-image-models@v1.0.31",
        license="Apache-2.0",
        purpose="Plain vision transformer with a mixer in the place of softmax attention.",
    ),
    VARIANTS,
    CFGS,
    feature_cfg=dict(feature_cls="getter", out_indices=3),
)
