"""What recipes on ImageNet-1K share. The folder has `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`: `data.root=/data/imagenet`."""

from __future__ import annotations

from visionhybrid.train.config import Augment, Images, Loop, Optim, Schedule

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
# For batches of 1024; other batches and lengths replace a field.
OPTIM = Optim(name="adamw", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
# The official scripts set the rate after each epoch from that epoch's own number, so it lags by one.
SCHEDULE = Schedule(name="cosine", unit="epoch", lag=1, warmup=5, warmup_lr=1e-6, min_lr=1e-5)
LOOP = Loop(
    batch_size=1024,
    epochs=300,
    precision="fp16",
    ema_decay=0.99996**2,  # to the power of batch / 512
    seed=0,
    workers=16,
)
