"""HAT: every stage the authors published, and a small one that learns super-resolution from photographs on a CPU.

Source: arXiv:2205.04437, arXiv:2309.05239; XPixelGroup/HAT@1638a9a options/train/*.yml.

All: Adam (0.9, 0.99), L1, no warm-up, clipping or decay, float32, EMA 0.999 from the first step, low-resolution patches of 64,
32 of them a step (8 GPUs x 4, about 20 GB each; the authors give no times). The numbers are PSNR on Y in dB on Set5 / Set14 /
BSD100 / Urban100 / Manga109. Data, by default below `datasets/` (any other place: `data.high=...`):

    DF2K/HR_sub            480x480 crops of DIV2K + Flickr2K with step 240; `visionhybrid.data.subimages` cuts them
    DF2K/LR_bicubic_X4_sub their partners (480 / scale), made by MATLAB's bicubic
    imagenet/train         the ImageNet-1K training images, in any folders
    DF2K_OST               whole pictures for blind restoration
    Set5/GTmod12, Set5/LRbicx4      validation

A milestone m of the paper is the first step (counted from 0) at the lower rate.
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.train.config import Adversarial, Loop, Model, Optim, Pictures, Restoration, Schedule


def hat_x2() -> Restoration:
    """HAT x2 from scratch on DF2K: 38.63 / 34.86 / 32.62 / 34.45 / 40.26.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x2
    """
    return _scratch("hat", 2)


def hat_x3() -> Restoration:
    """HAT x3 from scratch on DF2K: 35.07 / 31.08 / 29.54 / 30.23 / 35.53.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x3
    """
    return _scratch("hat", 3)


def hat_x4() -> Restoration:
    """HAT x4 on DF2K, started from the x2 weights: 33.04 / 29.23 / 28.00 / 27.97 / 32.48.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x4
    Starts from runs/hat_x2; `model.start=FILE` takes other weights. The up-sampler's tensors are new.
    """
    return _x4_from_x2("hat")


def hat_small_x2() -> Restoration:
    """HAT-S x2 from scratch on DF2K: 38.58 / 34.70 / 32.59 / 34.31 / 40.14.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_small_x2
    """
    return _scratch("hat_small", 2)


def hat_small_x3() -> Restoration:
    """HAT-S x3 from scratch on DF2K: 35.01 / 31.05 / 29.50 / 30.15 / 35.40.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_small_x3
    """
    return _scratch("hat_small", 3)


def hat_small_x4() -> Restoration:
    """HAT-S x4 on DF2K, started from the x2 weights: 32.92 / 29.15 / 27.97 / 27.87 / 32.35.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_small_x4
    """
    return _x4_from_x2("hat_small")


def hat_x2_imagenet() -> Restoration:
    """HAT x2, pre-training on ImageNet with the same task; `hat_x2_finetune` continues.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x2_imagenet
    """
    return _imagenet("hat", 2)


def hat_x3_imagenet() -> Restoration:
    """HAT x3, pre-training on ImageNet with the same task; `hat_x3_finetune` continues.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x3_imagenet
    """
    return _imagenet("hat", 3)


def hat_x4_imagenet() -> Restoration:
    """HAT x4, pre-training on ImageNet with the same task; `hat_x4_finetune` continues.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x4_imagenet
    """
    return _imagenet("hat", 4)


def hat_large_x2_imagenet() -> Restoration:
    """HAT-L x2, pre-training on ImageNet with the same task; `hat_large_x2_finetune` continues.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_large_x2_imagenet
    """
    return _imagenet("hat_large", 2)


def hat_large_x3_imagenet() -> Restoration:
    """HAT-L x3, pre-training on ImageNet with the same task; `hat_large_x3_finetune` continues.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_large_x3_imagenet
    """
    return _imagenet("hat_large", 3)


def hat_large_x4_imagenet() -> Restoration:
    """HAT-L x4, pre-training on ImageNet with the same task; `hat_large_x4_finetune` continues.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_large_x4_imagenet
    """
    return _imagenet("hat_large", 4)


def hat_x2_finetune() -> Restoration:
    """HAT x2 on DF2K after ImageNet: 38.73 / 35.13 / 32.69 / 34.81 / 40.71.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x2_finetune
    """
    return _finetune("hat", 2)


def hat_x3_finetune() -> Restoration:
    """HAT x3 on DF2K after ImageNet: 35.16 / 31.33 / 29.59 / 30.70 / 35.84.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x3_finetune
    """
    return _finetune("hat", 3)


def hat_x4_finetune() -> Restoration:
    """HAT x4 on DF2K after ImageNet: 33.18 / 29.38 / 28.05 / 28.37 / 32.87.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_x4_finetune
    """
    return _finetune("hat", 4)


def hat_large_x2_finetune() -> Restoration:
    """HAT-L x2 on DF2K after ImageNet: 38.91 / 35.29 / 32.74 / 35.09 / 41.01.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_large_x2_finetune
    """
    return _finetune("hat_large", 2)


def hat_large_x3_finetune() -> Restoration:
    """HAT-L x3 on DF2K after ImageNet: 35.28 / 31.47 / 29.63 / 30.92 / 36.02.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_large_x3_finetune
    """
    return _finetune("hat_large", 3)


def hat_large_x4_finetune() -> Restoration:
    """HAT-L x4 on DF2K after ImageNet: 33.30 / 29.47 / 28.09 / 28.60 / 33.09.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_large_x4_finetune
    """
    return _finetune("hat_large", 4)


def hat_real_x4() -> Restoration:
    """HAT x4 for real pictures, first stage (called MSE by the authors, its loss is L1): no published number.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_real_x4
    DF2K + OST, second-order degradation towards unsharp-masked pictures. Validation as by the authors: none.
    """
    base = _scratch("hat", 4)
    return replace(
        base,
        name="hat_real_x4",
        optim=replace(base.optim, lr=1e-4),
        schedule=Schedule(name="constant"),  # the published milestone is the last step
        loop=replace(base.loop, steps=1_000_000, validate_every=10_000),
        data=Pictures(
            source="folder",
            high="datasets/DF2K_OST",
            degradation="second_order",
            truth="sharp",
            scale=4,
            orient="flip",
        ),
    )


def hat_real_x4_gan() -> Adversarial:
    """HAT x4 for real pictures, second stage (published weights: Real_HAT_GAN_SRx4): no published number.

    accelerate launch --num_processes 8 -m visionhybrid.train hat_real_x4_gan vgg=FILE
    Starts from runs/hat_real_x4. `vgg` is torchvision's VGG19 (vgg19-dcbb9e9d.pth), by default the one in torch's hub cache.
    """
    base = hat_real_x4()
    return Adversarial(
        name="hat_real_x4_gan",
        model=replace(base.model, start="runs/hat_real_x4"),
        optim=base.optim,
        schedule=base.schedule,  # the published milestone is the last step
        loop=replace(base.loop, steps=400_000),
        data=replace(base.data, truth="plain"),
        pixel_weight=1.0,
        perceptual_weight=1.0,
        adversarial_weight=0.1,
        width=64,
    )


def hat_real_x4_gan_sharper() -> Adversarial:
    """As `hat_real_x4_gan`, towards unsharp-masked pictures (published weights: Real_HAT_GAN_SRx4_sharper).

    accelerate launch --num_processes 8 -m visionhybrid.train hat_real_x4_gan_sharper vgg=FILE
    """
    return replace(hat_real_x4_gan(), name="hat_real_x4_gan_sharper", sharp=("pixel", "perceptual"))


def hat_samples_x2() -> Restoration:
    """A HAT x2 of 0.15 M parameters on the photographs in scikit-image's and scikit-learn's wheels, on a CPU.

    visionhybrid train hat_samples_x2
    About 2.5 minutes on 2 CPU cores; beats bicubic by 0.7 dB on Y on the four held-out photographs. No published number.
    """
    return Restoration(
        name="hat_samples_x2",
        model=Model(
            name="vh_hat_small_x2",
            options=dict(
                dim=32,
                depths=[2, 2],
                num_heads=[2, 2],
                window_size=8,
                key_window_size=12,
                conv_dim=8,
                gate_dim=4,
                mlp_dim=64,
                tail_dim=32,
                drop_path_rate=0.0,
            ),
        ),
        # HAT has no path from input to output: from random weights it must first learn to copy. Muon did so fastest of what was
        # tried in 300 steps (the AdamW settings tried ended below bicubic). Vectors (biases, norms) go by AdamW at 0.3 of the rate.
        optim=Optim(name="muon", lr=0.04, clip_norm=1.0, options=dict(fallback_lr_scale=0.3)),
        schedule=Schedule(name="cosine", warmup=20, warmup_lr=1e-3, min_lr=4e-4),
        loop=Loop(
            batch_size=8,
            steps=1000,
            ema_decay=0.99,
            ema_warmup=True,
            workers=0,
            log_every=20,
            validate_every=100,
            tensorboard=False,
        ),
        data=Pictures(source="samples", scale=2, patch=24, repeat=50, held_out_crop=96),
    )


def _scratch(model: str, scale: int) -> Restoration:
    return Restoration(
        name=f"{model}_x{scale}",
        model=Model(name=f"vh_{model}_x{scale}"),
        optim=Optim(name="adam", lr=2e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, clip_norm=None),
        schedule=Schedule(
            name="multistep", milestones=(250_000, 400_000, 450_000, 475_000), gamma=0.5, warmup=0
        ),
        loop=Loop(
            batch_size=32,
            steps=500_000,
            ema_decay=0.999,
            seed=0,
            workers=6,
            validate_every=20_000 if model == "hat_small" else 5_000,
            precision="no",
        ),
        data=Pictures(
            source="pairs",
            high="datasets/DF2K/HR_sub",
            low=f"datasets/DF2K/LR_bicubic_X{scale}_sub",
            held_out_high="datasets/Set5/GTmod12",
            held_out_low=f"datasets/Set5/LRbicx{scale}",
            scale=scale,
            patch=64,
            orient="all",
        ),
        loss="l1",
    )


def _x4_from_x2(model: str) -> Restoration:
    base = _scratch(model, 4)
    # the published option of HAT asks for a strict start here and fails (XPixelGroup/HAT#90)
    return replace(
        base,
        model=replace(base.model, start=f"runs/{model}_x2", start_strict=False),
        optim=replace(base.optim, lr=1e-4),
        schedule=replace(base.schedule, milestones=(125_000, 200_000, 225_000, 240_000)),
        loop=replace(base.loop, steps=250_000),
    )


def _imagenet(model: str, scale: int) -> Restoration:
    base = _scratch(model, scale)
    return replace(
        base,
        name=f"{model}_x{scale}_imagenet",
        schedule=replace(base.schedule, milestones=(300_000, 500_000, 650_000, 700_000, 750_000)),
        loop=replace(base.loop, steps=800_000, validate_every=10_000),
        # pairs made on the fly: small pictures stretched, low resolution neither rounded nor clipped
        data=replace(base.data, source="folder", high="datasets/imagenet/train", low="", enlarge=True),
    )


def _finetune(model: str, scale: int) -> Restoration:
    base = _scratch(model, scale)
    return replace(
        base,
        name=f"{model}_x{scale}_finetune",
        model=replace(base.model, start=f"runs/{model}_x{scale}_imagenet"),
        optim=replace(base.optim, lr=1e-5),
        schedule=replace(base.schedule, milestones=(125_000, 200_000, 225_000, 240_000)),
        loop=replace(base.loop, steps=250_000),
    )
