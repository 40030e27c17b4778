"""LiT: DiT with linear attention of few heads beside a depthwise convolution, from scratch or by distillation from a trained DiT.

Source: arXiv:2501.12976, whose code is not published. Batches, rate and data are DiT's. Its rules: a 5x5 convolution of the values, few
heads, weights from a converged DiT except those of the attention, and its noise and variance to imitate with 0.5 and 0.05.
"""

from __future__ import annotations

from dataclasses import fields, replace

from visionhybrid.configs import dit
from visionhybrid.train.config import Generation, Generator, Graft, Phase

HEADS = {"s": 2, "b": 3, "xl": 4}
MIXER = {"linear": {"norm": "sana", "conv": 5}}


def lit_s2_in1k() -> Generation:
    """LiT-S/2 on ImageNet at 256 pixels from scratch, 400 thousand steps.

    visionhybrid train lit_s2_in1k data.root=/data/imagenet
    Published FID 63.21 (DiT-S/2: 68.40).
    """
    return _from_scratch("lit_s2_in1k", dit.dit_s2_in1k(), "s")


def lit_b2_in1k() -> Generation:
    """LiT-B/2 on ImageNet at 256 pixels from scratch, 400 thousand steps.

    visionhybrid train lit_b2_in1k data.root=/data/imagenet
    Published FID 40.86 (DiT-B/2: 43.47).
    """
    return _from_scratch("lit_b2_in1k", dit.dit_b2_in1k(), "b")


def lit_xl2_in1k() -> Generation:
    """LiT-XL/2 on ImageNet at 256 pixels from scratch, 400 thousand steps.

    visionhybrid train lit_xl2_in1k data.root=/data/imagenet loop.steps=400000
    Published FID 20.66.
    """
    return _from_scratch("lit_xl2_in1k", dit.dit_xl2_in1k(), "xl")


def lit_s2_distil_in1k() -> Graft:
    """LiT-S/2 from a trained DiT-S/2, 400 thousand steps.

    visionhybrid graft lit_s2_distil_in1k teacher=runs/dit_s2_in1k data.root=/data/imagenet
    Published FID 50.79, from a DiT of 800 thousand steps.
    """
    return _distilled("lit_s2_distil_in1k", dit.dit_s2_in1k(), "s", 400_000)


def lit_xl2_distil_in1k() -> Graft:
    """LiT-XL/2 from the published DiT-XL/2, 1.4 million steps.

    visionhybrid graft lit_xl2_distil_in1k teacher=DiT-XL-2-256x256.pt data.root=/data/imagenet
    Published FID with guidance 1.5 2.32 (DiT-XL/2 after 7 million steps: 2.27); without, after 100 thousand steps, 12.90.
    """
    return _distilled("lit_xl2_distil_in1k", dit.dit_xl2_in1k(), "xl", 1_400_000)


def _linear(size: str, mixer: bool) -> dict[str, object]:
    """What differs from DiT of this size: few heads of the same width together."""
    shape = dit.SIZES[size]
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    found: dict[str, object] = dict(num_attention_heads=HEADS[size], attention_head_dim=width // HEADS[size])
    return found | (dict(mixer="linear", mixer_options=MIXER) if mixer else {})


def _from_scratch(name: str, base: Generation, size: str) -> Generation:
    options = {**base.model.options, **_linear(size, True)}
    return replace(base, name=name, model=replace(base.model, options=options))


def _distilled(name: str, base: Generation, size: str, steps: int) -> Graft:
    shared = {field.name: getattr(base, field.name) for field in fields(base)}
    return Graft(
        **{**shared, "name": name, "model": Generator(name="hybrid_dit", options=_linear(size, False))},
        mixer="linear",
        mixer_options=MIXER["linear"],
        projections="fresh",
        train="all",
        alone=Phase(steps=0),
        whole=Phase(steps=steps, lr=1e-4),
        tune=Phase(steps=0),
        task_weight=1.0,
        output_weight=0.5,
        variance_weight=0.05,
        feature_weight=0.0,
    )
