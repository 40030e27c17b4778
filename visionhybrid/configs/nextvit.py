"""Next-ViT: the authors' ImageNet-1K recipes, and a small hybrid that learns the digits on a CPU.

Source: arXiv:2207.05501; bytedance/Next-ViT@922e771 classification/ (README command lines, defaults, training logs).

ImageNet-1K is a folder with `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`: `data.root=/data/imagenet`. The global batch of 2048 is
8 processes of 256; with fewer, `loop.micro_batch=256` accumulates to the same. The authors' tables quote the best epoch,
`checkpoints/` keeps that one besides the last. Times are computed from their logs (8 GPUs of 2022).
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.configs import digits, imagenet
from visionhybrid.train.config import Classification, Model, Schedule


def nextvit_small_in1k() -> Classification:
    """Next-ViT-S at 224, 300 epochs: 82.49 % top-1 (last epoch 82.47); 0.37 s a step, 19 hours, 20.5 GB a GPU.

    accelerate launch --num_processes 8 -m visionhybrid.train nextvit_small_in1k data.root=/data/imagenet
    """
    return _in1k("small")


def nextvit_base_in1k() -> Classification:
    """Next-ViT-B at 224, 300 epochs: 83.21 % top-1 (last epoch 83.15); 0.48 s a step, 25 hours, 24.6 GB a GPU.

    accelerate launch --num_processes 8 -m visionhybrid.train nextvit_base_in1k data.root=/data/imagenet
    """
    return _in1k("base")


def nextvit_large_in1k() -> Classification:
    """Next-ViT-L at 224, 300 epochs: 83.58 % top-1 (last epoch 83.47); 0.59 s a step, 31 hours, 28.7 GB a GPU.

    accelerate launch --num_processes 8 -m visionhybrid.train nextvit_large_in1k data.root=/data/imagenet
    """
    return _in1k("large")


def nextvit_small_in1k_384() -> Classification:
    """Next-ViT-S fine-tuned at 384, 30 epochs: 83.58 % top-1 (last epoch 83.49); the authors give no time.

    accelerate launch --num_processes 8 -m visionhybrid.train nextvit_small_in1k_384 data.root=/data/imagenet
    Starts from runs/nextvit_small_in1k; `model.start=FILE` takes other weights.
    """
    return _in1k_384("small")


def nextvit_base_in1k_384() -> Classification:
    """Next-ViT-B fine-tuned at 384, 30 epochs: 84.27 % top-1 (last epoch 84.13); the authors give no time.

    accelerate launch --num_processes 8 -m visionhybrid.train nextvit_base_in1k_384 data.root=/data/imagenet
    The README says a learning rate of 1e-5; base's log, from which the number comes, says 3e-6, as here.
    """
    config = _in1k_384("base")
    return replace(config, optim=replace(config.optim, lr=3e-6))


def nextvit_large_in1k_384() -> Classification:
    """Next-ViT-L fine-tuned at 384, 30 epochs: 84.68 % top-1 (last epoch 84.57); the authors give no time.

    accelerate launch --num_processes 8 -m visionhybrid.train nextvit_large_in1k_384 data.root=/data/imagenet
    """
    return _in1k_384("large")


def nextvit_digits() -> Classification:
    """A hybrid of Next-ViT's blocks with 0.3 M parameters on scikit-learn's digits: at least 97 % on held-out digits.

    visionhybrid train nextvit_digits
    Under two minutes on 2 CPU cores. No published number: the data come with scikit-learn, the split is fixed.
    """
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
        optim=digits.OPTIM,
        schedule=digits.SCHEDULE,
        loop=digits.LOOP,
        data=digits.IMAGES,
        augment=digits.AUGMENT,
    )


def _in1k(size: str) -> Classification:
    return Classification(
        name=f"nextvit_{size}_in1k",
        model=Model(name=f"vh_nextvit_{size}"),  # its drop path is the variant's, as in the official code
        # 5e-4 * batch / 512 at batch 2048; decay on tensors with more than one axis only
        optim=replace(imagenet.OPTIM, lr=2e-3, weight_decay=0.1, clip_norm=5.0),
        schedule=replace(imagenet.SCHEDULE, warmup=20),
        loop=replace(imagenet.LOOP, batch_size=2048, ema_decay=None, workers=8),
        data=imagenet.IMAGES,
        augment=imagenet.AUGMENT,
    )


def _in1k_384(size: str) -> Classification:
    base = _in1k(size)
    return replace(
        base,
        name=f"nextvit_{size}_in1k_384",
        model=replace(base.model, start=f"runs/nextvit_{size}_in1k"),
        optim=replace(base.optim, lr=1e-5, weight_decay=1e-8),
        schedule=Schedule(name="constant"),
        loop=replace(base.loop, batch_size=1024, epochs=30),
        data=replace(base.data, image_size=384),
    )
