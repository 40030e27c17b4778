"""Grafting: half of the attention of a trained DiT replaced by another operator, with a fiftieth of what its training took.

Sources: arXiv:2506.05340; keshik6/grafting@cb23696 `configs/train_stage1`, `configs/train_stage2`. First each new operator alone learns
what the old one gives on 8 thousand images, by absolute errors; then the whole is trained on 128 thousand.

Different here: the rate is constant, where the authors halve it after each quarter of the first stage; both stages see the same images.
"""

from __future__ import annotations

from dataclasses import fields, replace

from visionhybrid.configs import dit
from visionhybrid.train.config import Generator, Graft, Phase


def grafting_dit_xl2_hyena_y() -> Graft:
    """Hyena-Y in every other block of DiT-XL/2, ImageNet at 256 pixels: 25 thousand steps alone, 50 thousand of the whole.

    visionhybrid graft grafting_dit_xl2_hyena_y teacher=DiT-XL-2-256x256.pt data.root=/data/imagenet_tenth
    `data.root` is a tenth of the images. Published FID with guidance 2.72 (the teacher's 2.27); Hyena-X (`mixer_options.inner=0
    mixer_options.short=4`) 2.74, Hyena-SE (`mixer_options.short=4`) 2.73.
    """
    base = dit.dit_xl2_in1k()
    shared = {field.name: getattr(base, field.name) for field in fields(base)}
    return Graft(
        **{name: value for name, value in shared.items() if name not in ("name", "model", "optim")},
        name="grafting_dit_xl2_hyena_y",
        model=Generator(name="hybrid_dit"),
        optim=replace(base.optim, clip_norm=10.0),
        mixer="hyena",
        mixer_options={"short": 0, "inner": 4},
        layers=tuple(f"blocks.{i}" for i in range(1, 28, 2)),
        regression="l1",
        alone=Phase(steps=25_000, lr=5e-4),
        whole=Phase(steps=0),
        tune=Phase(steps=50_000, lr=1e-4),
        train="all",
    )
