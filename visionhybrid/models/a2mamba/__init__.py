"""A2Mamba: neighbourhood attention at two dilations whose weights also spread the states of a scan. arXiv:2507.16624.

Official code: LMMMEng/A2Mamba@a9ea14c (no licence stated). It needs CUDA, a scan compiled from source and NATTEN 0.17, and
raises for sides below 193; here every size runs, on every device. What the code does and a reader might not expect, kept
because every published weight needs it:

- the far branch attends over its own values plus the near branch's result; one table of relative positions serves both;
- its dilation follows the map: as far as the window spans it, at most the window's side, and apart for rows and columns;
- rotary frequencies include both ends, positions are pixels at any resolution;
- the last stage has attention of all pixels instead of the scan; its table of biases is resized as a picture;
- the residual scales of base and large multiply the branches, those of small the skips, and all have biases.

Different here: on maps too small for a window the window is the map (where the official code raises); the states and the mixing
of heads stay float32 under autocast, on every device; rotary tables are not stored.
Published top-1 at 224: nano 78.7, tiny 83.0, small 84.7, base 85.7, large 86.1.
"""

from __future__ import annotations

from functools import partial

from visionhybrid.models.a2mamba.keys import ALIASES, checkpoint_filter_fn, convert, recognise
from visionhybrid.models.a2mamba.keys import options as _options
from visionhybrid.models.a2mamba.mixer import A2SSM, GlobalMixer, StateSpaceMixer
from visionhybrid.models.a2mamba.model import A2Mamba, Block
from visionhybrid.models.registry import System, Weights, register

__all__ = [
    "A2SSM",
    "A2Mamba",
    "Block",
    "GlobalMixer",
    "StateSpaceMixer",
    "checkpoint_filter_fn",
    "convert",
    "options",
    "recognise",
]

_PLAIN, _LAYER = ("plain",) * 4, ("layer_scale",) * 4
_SKIP = ("plain", "plain", "residual_scale", "residual_scale")
# depths, dims, num_heads, mlp_ratios, residual, drop_path_rate (the authors' recipe), crop, top-1
_SIZES = {
    "nano": ((2, 2, 8, 2), (32, 64, 128, 192), (2, 2, 4, 8), (4, 4, 3, 3), _PLAIN, 0.0, 0.9, 78.7),
    "tiny": ((2, 2, 10, 2), (48, 96, 256, 448), (2, 4, 8, 16), (4, 4, 3, 3), _PLAIN, 0.1, 0.9, 83.0),
    "small": ((2, 4, 12, 4), (64, 128, 320, 512), (2, 4, 10, 16), (4, 4, 3, 3), _SKIP, 0.2, 0.9, 84.7),
    "base": ((4, 6, 12, 6), (96, 192, 384, 512), (4, 8, 12, 16), (4, 4, 3.75, 3.75), _LAYER, 0.4, 0.95, 85.7),
    "large": ((4, 6, 18, 6), (96, 192, 448, 672), (4, 8, 16, 24), (4, 4, 4, 4), _LAYER, 0.5, 0.975, 86.1),
}
_FIELDS = ("depths", "dims", "num_heads", "mlp_ratios", "residual", "drop_path_rate")
VARIANTS = {
    f"vh_a2mamba_{size}": {
        **dict(zip(_FIELDS, row, strict=False)),
        # Only the published residual scales start from 1 everywhere.
        "scale_init": (1.0, 1.0, 1e-6, 1e-6) if row[4] is _LAYER else (1.0,) * 4,
    }
    for size, row in _SIZES.items()
}
CFGS = {
    f"vh_a2mamba_{size}.in1k": dict(
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=row[6],
        interpolation="bicubic",
        first_conv="stem.0.conv",
        classifier="head.fc",
        origin_url="https://github.com/LMMMEng/A2Mamba",
        paper_ids="arXiv:2507.16624",
        description="ImageNet-1k, 300 epochs at 224",
    )
    for size, row in _SIZES.items()
}
WEIGHTS = {
    f"vh_a2mamba_{size}.in1k": Weights(
        file=f"a2mamba_pretrained_weights/a2mamba_{size}.pth",
        hub="LMMM2025/A2Mamba",
        license="none stated",
        purpose="classification: ImageNet-1k, 300 epochs at 224",
        published={"ImageNet-1K top-1 %": row[7]},
    )
    for size, row in _SIZES.items()
}
options = partial(_options, variants=VARIANTS)

register(
    System(
        name="a2mamba",
        task="classification",
        build=A2Mamba,
        recognise=recognise,
        options=options,
        convert=convert,
        adapt=checkpoint_filter_fn,
        paper="arXiv:2507.16624",
        source="LMMMEng/A2Mamba@a9ea14c",
        license="none stated",
        aliases=ALIASES,
        purpose="A2Mamba: attention to near and far neighbours whose weights also spread the states of a scan.",
    ),
    VARIANTS,
    CFGS,
    feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
    weights=WEIGHTS,
)
