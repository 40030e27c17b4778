"""LinFusion: linear attention distilled into the UNets of Stable Diffusion.

Sources: arXiv:2409.02097; Huage001/LinFusion@62ef289 `src/train/distill.py`, `distill_sdxl.py` and their launch lines. The authors train
on the 169 thousand images of LAION with an aesthetic score above 6.5, captioned by BLIP; any folder of images with captions will do.

Different here: images are cut to a square where the authors' script for SD 1.5 and 2.1 squeezes them; the student's projections
begin as the teacher's, and the mixer's networks as zero, where the authors draw both anew (`projections=fresh
mixer_options.zero_init=false`).
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.train.config import Diffusion, Graft, Images, Loop, Optim, Phase, Sampling, Schedule


def linfusion_sd15() -> Graft:
    """LinFusion for Stable Diffusion 1.5, at 512 pixels: 100 thousand steps of 96 images.

    visionhybrid graft linfusion_sd15 model.pipeline=stable-diffusion-v1-5/stable-diffusion-v1-5 data.root=/data/laion
    About a day on eight 48 GB GPUs; published FID on COCO 12.57 (the teacher's 12.86).
    """
    return Graft(
        name="linfusion_sd15",
        data=Images(dataset="captions", num_classes=0, image_size=512),
        diffusion=Diffusion(predict="pipeline", drop_label=0.0),
        sampling=Sampling(steps=25, guidance=7.5, each=1, classes=4),
        flip=0.0,
        eval_batch=8,
        optim=Optim(name="adamw", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        schedule=Schedule(name="constant"),
        loop=Loop(
            batch_size=96,
            steps=1,  # of a phase: see below
            micro_batch=6,
            precision="fp16",
            ema_decay=None,
            grad_checkpointing=True,
            validate_every=10_000,
        ),
        mixer="linfusion",
        alone=Phase(steps=0),
        whole=Phase(steps=100_000, lr=1e-4),
        tune=Phase(steps=0),
        task_weight=1.0,
        output_weight=0.5,
        feature_weight=0.5,
        train="mixed",
    )


def linfusion_sd21() -> Graft:
    """LinFusion for Stable Diffusion 2.1, at 768 pixels: 100 thousand steps of 96 images, velocity prediction.

    visionhybrid graft linfusion_sd21 model.pipeline=stabilityai/stable-diffusion-2-1 data.root=/data/laion
    """
    base = linfusion_sd15()
    return replace(
        base,
        name="linfusion_sd21",
        data=replace(base.data, image_size=768),
        loop=replace(base.loop, precision="bf16"),
    )


def linfusion_sdxl() -> Graft:
    """LinFusion for Stable Diffusion XL, at 1024 pixels: steps of 64 images, networks a sixteenth as wide as the attention.

    visionhybrid graft linfusion_sdxl model.pipeline=stabilityai/stable-diffusion-xl-base-1.0 data.root=/data/laion
    How long the authors trained is not published (LinFusion#12); the number of steps is SD 1.5's.
    """
    base = linfusion_sd15()
    return replace(
        base,
        name="linfusion_sdxl",
        data=replace(base.data, image_size=1024),
        loop=replace(base.loop, batch_size=64, micro_batch=2),
        eval_batch=2,
        by_layer={"dim == 640": {"mid_dim": 40}, "dim == 1280": {"mid_dim": 80}},
    )
