"""Next-ViT: the authors' ImageNet-1K recipes, and a small hybrid that learns the digits on a CPU.

Source: arXiv:2207.05501; bytedance/Next-ViT@922e771 `classification/` (command lines of the README, defaults, logs).
"""

from __future__ import annotations

from visionhybrid.train.config import Augment, Classification, Images, Loop, Model, Optim, Schedule


def nextvit_digits() -> Classification:
    """Small."""
    return Classification(
        name="nextvit_digits",
        model=Model(
            name="vh_nextvit_small",
            options=dict(
                depths=[1, 1, 5, 1],
                stem_chs=[16, 16, 16],
                dims=[32, 32, 64, 64],
                ntb_dims=[64, 64, 128],
                strides=[1, 2, 1, 2],
                sr_ratios=[2, 1, 1, 1],
                head_dim=16,
                mix_block_ratio=0.5,
                drop_path_rate=0.05,
            ),
        ),
        optim=Optim(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=5.0),
        schedule=Schedule(name="cosine", warmup=60, warmup_lr=1e-5, min_lr=1e-5),
        loop=Loop(batch_size=64, epochs=16, workers=0, log_every=20, tensorboard=False),
        data=Images(dataset="digits", held_out="val", num_classes=10, image_size=32),
        augment=Augment(
            scale=(0.7, 1.0),
            ratio=(0.85, 1.18),
            flip=0.0,
            smoothing=0.1,
            crop=1.0,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        ),
    )
