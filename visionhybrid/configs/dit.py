"""DiT and SiT: plain transformers on latents of ImageNet's 256-pixel images, class-conditional, from scratch.

Sources: DiT arXiv:2212.09748, facebookresearch/DiT@ed81ce2 `train.py`; SiT arXiv:2401.08740, willisma/SiT@947f95b `train.py`. Both train
with AdamW at a constant 1e-4, batches of 256, no weight decay, an average of 0.9999, horizontal flips and labels dropped for
one image in ten, on latents of Stable Diffusion's autoencoder.

DiT also learns the variance of each step (arXiv:2102.09672); its authors sample with it in 250 steps, here DDIM leaves it aside.
"""

from __future__ import annotations

from visionhybrid.train.config import (
    Diffusion,
    Generation,
    Generator,
    Images,
    Latent,
    Loop,
    Optim,
    Sampling,
    Schedule,
)

SIZES = {
    "s": dict(num_layers=12, num_attention_heads=6, attention_head_dim=64),
    "b": dict(num_layers=12, num_attention_heads=12, attention_head_dim=64),
    "xl": dict(num_layers=28, num_attention_heads=16, attention_head_dim=72),
}
EPSILON = Diffusion(
    predict="epsilon", betas="linear", beta_range=(1e-4, 0.02), variance="learned", drop_label=0.1
)
FLOW = Diffusion(predict="flow", times="uniform", drop_label=0.1)


def dit_s2_in1k() -> Generation:
    """DiT-S/2 on ImageNet at 256 pixels, noise prediction, 400 thousand steps.

    visionhybrid train dit_s2_in1k data.root=/data/imagenet
    Published FID (50 thousand samples, no guidance) 68.4.
    """
    return _recipe("dit_s2_in1k", "s", EPSILON)


def dit_b2_in1k() -> Generation:
    """DiT-B/2 on ImageNet at 256 pixels, noise prediction, 400 thousand steps.

    visionhybrid train dit_b2_in1k data.root=/data/imagenet
    Published FID (no guidance) 43.47.
    """
    return _recipe("dit_b2_in1k", "b", EPSILON)


def dit_xl2_in1k() -> Generation:
    """DiT-XL/2 on ImageNet at 256 pixels, noise prediction, 7 million steps.

    visionhybrid train dit_xl2_in1k data.root=/data/imagenet
    Published FID without guidance 19.47 after 400 thousand steps, with guidance 1.5 2.27 after all.
    """
    return _recipe("dit_xl2_in1k", "xl", EPSILON, steps=7_000_000)


def sit_s2_in1k() -> Generation:
    """SiT-S/2 on ImageNet at 256 pixels, flow matching, 400 thousand steps.

    visionhybrid train sit_s2_in1k data.root=/data/imagenet
    """
    return _recipe("sit_s2_in1k", "s", FLOW)


def sit_b2_in1k() -> Generation:
    """SiT-B/2 on ImageNet at 256 pixels, flow matching, 400 thousand steps.

    visionhybrid train sit_b2_in1k data.root=/data/imagenet
    """
    return _recipe("sit_b2_in1k", "b", FLOW)


def sit_xl2_in1k() -> Generation:
    """SiT-XL/2 on ImageNet at 256 pixels, flow matching, 7 million steps.

    visionhybrid train sit_xl2_in1k data.root=/data/imagenet
    Published FID with guidance 2.06.
    """
    return _recipe("sit_xl2_in1k", "xl", FLOW, steps=7_000_000)


def _recipe(name: str, size: str, diffusion: Diffusion, steps: int = 400_000) -> Generation:
    return Generation(
        name=name,
        model=Generator(name="hybrid_dit", options=dict(patch_size=2, mixer="softmax", **SIZES[size])),
        data=Images(root="imagenet", train="train", held_out="val", num_classes=1000, image_size=256),
        latent=Latent(vae="stabilityai/sd-vae-ft-ema"),
        diffusion=diffusion,
        sampling=Sampling(steps=250, guidance=4.0, each=4, classes=8),
        flip=0.5,
        optim=Optim(name="adamw", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
        schedule=Schedule(name="constant"),
        loop=Loop(
            batch_size=256,
            steps=steps,
            precision="no",
            ema_decay=0.9999,
            validate_every=50_000,
            checkpoint_every=50_000,
        ),
    )
