"""Next-ViT: convolution blocks (NCB), each stage closed by one with attention (NTB). arXiv:2207.05501.

Official code: bytedance/Next-ViT@922e771 (Apache-2.0). Keys are timm's (`stages.{s}.blocks.{b}`, `mlp.fc1`, `head.fc`), so timm's
weights load as they are. What the code does and the paper does not say, kept because every published weight needs it:

- the keys and values of an NTB are means over runs of sr^2 *consecutive tokens in raster order*, which wrap over row ends, not
  over sr x sr windows; the last N mod sr^2 tokens are left out;
- a "patch embedding" stands in every block; it is the identity unless the block strides or changes the width;
- MHCA is a grouped 3x3 convolution, a norm, a ReLU and a pointwise mix, of an input that is not normed.

Different here: where a map has fewer than sr^2 tokens (the official code raises) their mean is the one key, so every image size
works; the segmentation backbone's fourth norm is the final `norm` (the official forward fails there).
Published top-1, 224 / 384: small 82.5 / 83.6, base 83.2 / 84.3, large 83.6 / 84.7; ssld_6m 84.8 / 85.8, 85.1 / 86.1, 85.4 / 86.4.
"""

from __future__ import annotations

from visionhybrid.models.nextvit.blocks import EMHSA, MHCA, NCB, NTB, Mlp, PatchEmbed, Stem, pool_tokens
from visionhybrid.models.nextvit.keys import (
    AUTHORS,
    PUBLISHED_DEPTHS,
    checkpoint_filter_fn,
    convert,
    options,
    recognise,
)
from visionhybrid.models.nextvit.model import NextViT
from visionhybrid.models.registry import System, Weights, register

__all__ = [
    "EMHSA",
    "MHCA",
    "NCB",
    "NTB",
    "Mlp",
    "NextViT",
    "PatchEmbed",
    "Stem",
    "checkpoint_filter_fn",
    "convert",
    "options",
    "pool_tokens",
    "recognise",
]

_DEPTHS = {"small": PUBLISHED_DEPTHS[0], "base": PUBLISHED_DEPTHS[1], "large": PUBLISHED_DEPTHS[2]}
_DROP_PATH = {"small": 0.1, "base": 0.2, "large": 0.2}
VARIANTS = {
    f"vh_nextvit_{size}": dict(depths=_DEPTHS[size], drop_path_rate=_DROP_PATH[size]) for size in _DEPTHS
}
DENSE = {
    **{f"{name}_det": {**kwargs, "final_norm": False} for name, kwargs in VARIANTS.items()},
    **{
        f"{name}_seg": {**kwargs, "extra_norm": True, "drop_path_rate": 0.2}
        for name, kwargs in VARIANTS.items()
    },
}

_CFG = dict(
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=0.95,
    interpolation="bicubic",
    first_conv="stem.0.conv",
    classifier="head.fc",
    license="apache-2.0",
    origin_url="https://github.com/bytedance/Next-ViT",
    paper_ids="arXiv:2207.05501",
)
_AT_384 = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)
_TAGS = {
    "bd_in1k": dict(description="ImageNet-1k, 300 epochs at 224"),
    "bd_in1k_384": dict(description="bd_in1k, fine-tuned 30 epochs at 384", **_AT_384),
    "bd_ssld_6m_in1k": dict(description="distilled (SSLD) on 6 million unlabelled images, then ImageNet-1k"),
    "bd_ssld_6m_in1k_384": dict(description="bd_ssld_6m_in1k, fine-tuned at 384", **_AT_384),
}
CFGS = {
    **{f"{name}.{tag}": {**_CFG, **cfg} for name in VARIANTS for tag, cfg in _TAGS.items()},
    **{name: {**_CFG, "num_classes": 0, "description": "backbone for dense prediction"} for name in DENSE},
}
# Top-1 as timm 1.0.31 measures it (crop 0.95 at 224, 1.0 at 384), in the order of _TAGS.
_TOP1 = {
    "vh_nextvit_small": (82.626, 84.036, 84.872, 85.966),
    "vh_nextvit_base": (83.498, 84.706, 85.186, 86.372),
    "vh_nextvit_large": (83.654, 84.930, 85.514, 86.544),
}
WEIGHTS = {
    f"{name}.{tag}": Weights(
        file="model.safetensors",
        hub=f"timm/{name.removeprefix('vh_')}.{tag}",
        license="Apache-2.0",
        purpose=f"classification: {cfg['description']}",
        published={"ImageNet-1K top-1 %": top1},
    )
    for name, row in _TOP1.items()
    for (tag, cfg), top1 in zip(_TAGS.items(), row, strict=True)
}

SYSTEM = System(
    name="nextvit",
    task="classification",
    build=NextViT,
    recognise=recognise,
    options=options,
    convert=convert,
    paper="arXiv:2207.05501",
    source="bytedance/Next-ViT@922e771",
    license="Apache-2.0",
    aliases=AUTHORS,
    purpose="Next-ViT: convolution blocks with attention at the end of each stage, made for fast deployment.",
)
_TAPS = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
register(
    SYSTEM,
    VARIANTS,
    {key: cfg for key, cfg in CFGS.items() if key.split(".")[0] in VARIANTS},
    feature_cfg=_TAPS,
    weights=WEIGHTS,
)
# The getter keeps the model whole, so that `frozen_stages` and `norm_eval` hold in the extractor.
register(
    SYSTEM,
    DENSE,
    {key: CFGS[key] for key in DENSE},
    feature_cfg=dict(feature_cls="getter", **_TAPS),
)
