"""Fine-tuning of text-to-image pipelines on a folder of images with captions.

Rates, batches and steps for SD and SDXL are those of the READMEs in huggingface/diffusers@0356e18 examples/text_to_image. Ours: bf16
where they take fp16, SD 1.5's average of weights and share of empty captions, and AdamW's other numbers. They are a start: what is
best depends on the images.
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.train.config import (
    Diffusion,
    Generation,
    Generator,
    Images,
    Loop,
    Optim,
    Sampling,
    Schedule,
    Text,
)


def sd15_captions() -> Generation:
    """Stable Diffusion 1.5 at 512 pixels, all weights: 15 thousand steps of 4 images.

    visionhybrid train sd15_captions model.pipeline=stable-diffusion-v1-5/stable-diffusion-v1-5 data.root=/data/cats
    A 24 GB GPU. SD 2.1 likewise: its scheduler says what it predicts; data.image_size=768.
    """
    return Generation(
        name="sd15_captions",
        model=Generator(),
        data=Images(dataset="captions", num_classes=0, image_size=512),
        text=Text(),
        diffusion=Diffusion(predict="pipeline", drop_label=0.1),
        sampling=Sampling(steps=25, guidance=7.5, each=2, classes=4),
        optim=Optim(
            name="adamw",
            lr=1e-5,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.01,
            decay_1d=True,
            clip_norm=1.0,
        ),
        schedule=Schedule(name="constant"),
        loop=Loop(
            batch_size=4,
            steps=15_000,
            micro_batch=1,
            precision="bf16",
            ema_decay=0.9999,
            ema_warmup=True,
            grad_checkpointing=True,
            validate_every=1000,
        ),
        eval_batch=4,
        flip=0.5,
    )


def sdxl_captions() -> Generation:
    """Stable Diffusion XL at 1024 pixels, all weights: 10 thousand steps of 4 images.

    visionhybrid train sdxl_captions model.pipeline=stabilityai/stable-diffusion-xl-base-1.0 data.root=/data/cats
    An 80 GB GPU. The example trains at 512 pixels (data.image_size=512).
    """
    base = sd15_captions()
    return replace(
        base,
        name="sdxl_captions",
        data=replace(base.data, image_size=1024),
        diffusion=replace(base.diffusion, drop_label=0.2),
        optim=replace(base.optim, lr=1e-6),
        loop=replace(base.loop, steps=10_000, ema_decay=None),
        eval_batch=2,
    )


def sdxl_captions_lora() -> Generation:
    """Stable Diffusion XL at 1024 pixels, updates of rank 4 of the attention: two passes over the images.

    visionhybrid train sdxl_captions_lora model.pipeline=stabilityai/stable-diffusion-xl-base-1.0 data.root=/data/cats
    """
    base = sdxl_captions()
    return replace(
        base,
        name="sdxl_captions_lora",
        model=Generator(lora=4),
        diffusion=replace(base.diffusion, drop_label=0.0),
        optim=replace(base.optim, lr=1e-4),
        loop=replace(base.loop, batch_size=1, steps=None, epochs=2, validate_every=0),
    )


def flow_captions_lora() -> Generation:
    """A flow-matching pipeline (SD 3, Flux, SANA) at 1024 pixels, updates of rank 16 of the attention: 2000 steps of 4 images.

    visionhybrid train flow_captions_lora model.pipeline=black-forest-labs/FLUX.1-dev data.root=/data/cats
    Times as SD 3 was trained (arXiv:2403.03206 section 5.3); the other numbers have no published source.
    """
    base = sdxl_captions_lora()
    return replace(
        base,
        name="flow_captions_lora",
        model=Generator(lora=16),
        diffusion=Diffusion(predict="pipeline", times="logit_normal", drop_label=0.0),
        sampling=replace(base.sampling, guidance=3.5),
        loop=replace(base.loop, batch_size=4, steps=2000, epochs=None, validate_every=500),
    )
