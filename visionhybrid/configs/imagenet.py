"""What recipes on ImageNet-1K share. The folder has `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`: `data.root=/data/imagenet`."""

from __future__ import annotations

from visionhybrid.train.config import Augment, Images

IMAGES = Images(dataset="", root="imagenet", train="train", held_out="val", num_classes=1000, image_size=224)
# DeiT's augmentation, arXiv:2012.12877, which the authors of most backbones here took over.
AUGMENT = Augment(
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    flip=0.5,
    color_jitter=0.4,  # without effect beside RandAugment, here as there
    policy="rand-m9-mstd0.5-inc1",
    erase=0.25,
    erase_mode="pixel",
    erase_count=1,
    mixup=0.8,
    cutmix=1.0,
    mix_prob=1.0,
    mix_switch=0.5,
    mix_mode="batch",
    smoothing=0.1,
    interpolation="bicubic",
    crop=224 / 256,
)
