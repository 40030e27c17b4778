"""Linear attention in a vision transformer of timm that was trained with softmax attention.

No published recipe stands behind it: distances and phases are those of LinFusion's distillation (arXiv:2409.02097) and of grafting
(arXiv:2506.05340), data and augmentation DeiT's.
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.configs import imagenet
from visionhybrid.train.config import GraftClassifier, Loop, Model, Phase, Schedule


def vit_small_in1k_linear() -> GraftClassifier:
    """ReLU linear attention beside a 5x5 convolution in DeiT-S, ImageNet at 224 pixels: 5 thousand steps alone, 20 thousand of the whole.

    visionhybrid graft vit_small_in1k_linear model.options.pretrained=true data.root=/data/imagenet
    Other weights: `teacher=FILE`; other transformers of timm: `model.name=NAME`; a part of the layers: `layers=blocks.1?` or `budget=0.01`.
    """
    return GraftClassifier(
        name="vit_small_in1k_linear",
        model=Model(name="deit_small_patch16_224"),
        data=imagenet.IMAGES,
        augment=replace(imagenet.AUGMENT, mixup=0.0, cutmix=0.0),
        optim=replace(imagenet.OPTIM, clip_norm=1.0),
        schedule=Schedule(name="cosine", warmup=200, min_lr=1e-6),
        loop=Loop(
            batch_size=1024, steps=1, precision="bf16", ema_decay=None, workers=16, validate_every=5000
        ),
        mixer="linear",
        mixer_options={"conv": 5},
        alone=Phase(steps=5000, lr=1e-3),
        whole=Phase(steps=20_000, lr=5e-4),
        train="all",
    )
