"""The names of HAT's variants and published weights; registers them."""

from __future__ import annotations

from typing import Any

from visionhybrid.models.hat.model import HAT
from visionhybrid.models.hat.official import ALIASES, convert, options, recognise
from visionhybrid.models.registry import System, Weights, register

_SIZES = {
    "small": dict(dim=144, conv_dim=6, gate_dim=6, mlp_dim=288),
    "": dict(),
    "large": dict(depths=[6] * 12, num_heads=[6] * 12),
}


def _name(size: str, scale: int) -> str:
    return "_".join(["vh_hat", *([size] if size else []), f"x{scale}"])


VARIANTS = {
    _name(size, scale): dict(scale=scale, **kw) for size, kw in _SIZES.items() for scale in (1, 2, 3, 4)
}
_CFG = dict(
    input_size=(3, 64, 64),
    pool_size=None,
    num_classes=0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    first_conv="stem",
    license="apache-2.0",
    origin_url="https://github.com/XPixelGroup/HAT",
    paper_ids="arXiv:2309.05239",
)
_WHERE = "https://github.com/XPixelGroup/HAT#how-to-test"  # links to Google Drive and Baidu: fetched by hand
_CLEAN = "x{} of clean images that were reduced by MATLAB's bicubic; not for noise, blur or JPEG artefacts"
_REAL = "x4 of real, degraded photographs{}; invents detail, so not for measuring fidelity"
# PSNR on Y, the README of the official repository.
_PSNR = {
    ("small", 4): {"Set5 PSNR on Y": 32.92, "Urban100 PSNR on Y": 27.87},
    ("", 4): {"Set5 PSNR on Y": 33.04, "Urban100 PSNR on Y": 27.97},
}


def _published() -> dict[str, Weights]:
    def weights(file: str, purpose: str, **kwargs: Any) -> Weights:
        return Weights(file=file, license="Apache-2.0", url=_WHERE, purpose=purpose, **kwargs)

    table = {}
    for scale in (2, 3, 4):
        for size, file in (("small", "HAT-S"), ("", "HAT")):
            table[f"{_name(size, scale)}.df2k"] = weights(
                f"{file}_SRx{scale}.pth", _CLEAN.format(scale), published=_PSNR.get((size, scale), {})
            )
        for size, file in (("", "HAT"), ("large", "HAT-L")):
            table[f"{_name(size, scale)}.in1k_df2k"] = weights(
                f"{file}_SRx{scale}_ImageNet-pretrain.pth", _CLEAN.format(scale)
            )
    table["vh_hat_x4.real_gan"] = weights("Real_HAT_GAN_SRx4.pth", _REAL.format(""))
    table["vh_hat_x4.real_gan_sharper"] = weights(
        "Real_HAT_GAN_SRx4_sharper.pth", _REAL.format(", sharper than real_gan")
    )
    return table


WEIGHTS = _published()
CFGS = {
    **{key: {**_CFG, "description": weights.purpose} for key, weights in WEIGHTS.items()},
    **{
        _name(size, 1): {**_CFG, "description": "same resolution: denoising, JPEG artefacts; none published"}
        for size in _SIZES
    },
}
SYSTEM = System(
    name="hat",
    task="restoration",
    build=HAT,
    recognise=recognise,
    options=options,
    convert=convert,
    paper="arXiv:2309.05239",
    source="XPixelGroup/HAT@1638a9a",
    license="Apache-2.0",
    aliases=ALIASES,
    purpose="HAT: super-resolution and restoration with window attention, channel attention and overlapping windows.",
)
# The last six groups at most: HAT and HAT-S have six, HAT-L twelve.
register(
    SYSTEM,
    VARIANTS,
    CFGS,
    feature_cfg=dict(feature_cls="getter", out_indices=(0, 1, 2, 3, 4, 5)),
    weights=WEIGHTS,
)
