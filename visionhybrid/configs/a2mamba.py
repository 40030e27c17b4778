"""A2Mamba: the authors' ImageNet-1K recipes, and a small hybrid that learns the digits on a CPU.

Source: arXiv:2507.16624; LMMMEng/A2Mamba@a9ea14c (training script and README command lines).

ImageNet-1K is a folder with `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`: `data.root=/data/imagenet`. The global batch of 2048 is
8 processes of 256; with fewer, `loop.micro_batch=256` accumulates to the same.

From epoch 75 on all but nano also learn what the average of their own weights says (MESA, arXiv:2205.14083); batch norms see all
processes, which needs GPUs: `sync_batch_norm=false` elsewhere.

Different here: tables of relative positions, A, D and residual scales are not decayed (theirs are, against what their code marks).
Checkpointing covers every block, not the first four of a stage. Their average counts a mixer's table twice.
The published numbers are the authors'; nobody has trained these recipes with this package, and the authors give no times.
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.configs import digits, imagenet
from visionhybrid.train.config import Classification, Model


def a2mamba_nano_in1k() -> Classification:
    """A2Mamba-N at 224, 300 epochs: 78.7 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train a2mamba_nano_in1k data.root=/data/imagenet
    """
    config = _in1k("nano", lr=4e-3, ema_decay=None)
    return replace(config, augment=replace(config.augment, mixup=0.1, color_jitter=0.0))


def a2mamba_tiny_in1k() -> Classification:
    """A2Mamba-T at 224, 300 epochs: 83.0 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train a2mamba_tiny_in1k data.root=/data/imagenet
    """
    return _in1k("tiny", mesa=1.0, ema_decay=0.99984)


def a2mamba_small_in1k() -> Classification:
    """A2Mamba-S at 224, 300 epochs: 84.7 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train a2mamba_small_in1k data.root=/data/imagenet
    """
    return _in1k("small", mesa=1.0)


def a2mamba_base_in1k() -> Classification:
    """A2Mamba-B at 224, 300 epochs: 85.7 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train a2mamba_base_in1k data.root=/data/imagenet
    """
    return _in1k("base", mesa=1.5, warmup=20, crop=0.95, grad_checkpointing=True)


def a2mamba_large_in1k() -> Classification:
    """A2Mamba-L at 224, 300 epochs: 86.1 % top-1.

    accelerate launch --num_processes 8 -m visionhybrid.train a2mamba_large_in1k data.root=/data/imagenet
    """
    return _in1k("large", mesa=2.0, warmup=20, crop=0.975, grad_checkpointing=True)


def a2mamba_digits() -> Classification:
    """A hybrid of A2Mamba's blocks with 0.3 M parameters on scikit-learn's digits: at least 97 % on held-out digits.

    visionhybrid train a2mamba_digits
    99.2 % in a minute and a half on one CPU core. No published number: the data come with scikit-learn, the split is fixed.
    """
    return Classification(
        name="a2mamba_digits",
        model=Model(
            name="vh_a2mamba_nano",
            options=dict(
                img_size=32,
                depths=[1, 1, 2, 1],
                dims=[32, 48, 64, 96],
                num_heads=[2, 2, 4, 4],
                kernel_sizes=[3, 3, 3, 3],
                mlp_ratios=[2.0, 2.0, 2.0, 2.0],
                proj_dim=128,
                drop_path_rate=0.05,
            ),
        ),
        optim=digits.OPTIM,
        schedule=digits.SCHEDULE,
        loop=digits.LOOP,
        data=digits.IMAGES,
        augment=digits.AUGMENT,
    )


def _in1k(
    size: str,
    *,
    lr: float = 2e-3,  # but for nano 1e-3 * batch / 1024
    mesa: float = 0.0,
    warmup: int = 5,
    ema_decay: float | None = 0.9999,
    crop: float = 0.9,
    grad_checkpointing: bool = False,
) -> Classification:
    return Classification(
        name=f"a2mamba_{size}_in1k",
        model=Model(name=f"vh_a2mamba_{size}"),  # its drop path is the variant's, as in the authors' script
        optim=replace(imagenet.OPTIM, lr=lr, clip_norm=5.0),
        schedule=replace(imagenet.SCHEDULE, warmup=warmup, cooldown=10),
        loop=replace(
            imagenet.LOOP,
            batch_size=2048,
            epochs=310,
            ema_decay=ema_decay,
            grad_checkpointing=grad_checkpointing,
            seed=42,
            workers=8,
        ),
        data=imagenet.IMAGES,
        augment=replace(imagenet.AUGMENT, interpolation="random", crop=crop),
        mesa=mesa,
        mesa_start=75 if mesa else 0,
        sync_batch_norm=True,
    )
