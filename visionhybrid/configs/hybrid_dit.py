"""HybridDiT: images of ImageNet's classes from scratch, and of the digits on a CPU.

Sources: DiT arXiv:2212.09748, SiT arXiv:2401.08740, LiT arXiv:2501.12976.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visionhybrid.train.config import (
    Diffusion,
    Generation,
    Generator,
    Graft,
    Images,
    Loop,
    Optim,
    Phase,
    Sampling,
    Schedule,
)


def hybrid_dit_digits() -> Generation:
    """Handwritten digits of the ten classes by flow matching, in a minute on two cores.

    visionhybrid train hybrid_dit_digits
    No published number. With `sampling.judge=RUN sampling.judged=10`, RUN being that of `nextvit_digits`, it also says which
    share of its samples is recognised.
    """
    return Generation(
        name="hybrid_dit_digits",
        model=Generator(
            name="hybrid_dit",
            options=dict(patch_size=2, num_layers=4, num_attention_heads=3, attention_head_dim=32),
        ),
        # A high rate and a short memory of the second moments, for few steps from scratch; at 3e-3 it learned a little less.
        optim=Optim(name="adamw", lr=6e-3, weight_decay=0.0, betas=(0.9, 0.95), clip_norm=1.0),
        schedule=Schedule(name="cosine", warmup=50, min_lr=1e-5),
        loop=Loop(
            batch_size=64,
            steps=500,
            ema_decay=0.99,
            ema_warmup=True,
            workers=0,
            log_every=10,
            validate_every=50,
            tensorboard=False,
        ),
        data=Images(dataset="digits", num_classes=10, image_size=8),
        diffusion=Diffusion(predict="flow", times="logit_normal", drop_label=0.1),
        sampling=Sampling(steps=16, guidance=1.5, each=10),
        channels=1,
        flip=0.0,
    )


def hybrid_dit_digits_linfusion() -> Graft:
    """The digits' generator with LinFusion's mixer instead of softmax, in half a minute on two cores.

    visionhybrid graft hybrid_dit_digits_linfusion teacher=runs/hybrid_dit_digits
    """
    return _digits_graft("linfusion")


def hybrid_dit_digits_sla() -> Graft:
    """The digits' generator with sparse-linear attention instead of softmax, in half a minute on two cores.

    visionhybrid graft hybrid_dit_digits_sla teacher=runs/hybrid_dit_digits
    """
    return _digits_graft("sla", block_q=4, block_k=4, topk=0.25)


def _digits_graft(mixer: str, **options: Any) -> Graft:
    base = hybrid_dit_digits()
    shared = {
        name: getattr(base, name) for name in ("optim", "data", "diffusion", "sampling", "channels", "flip")
    }
    return Graft(
        **shared,
        name=f"{base.name}_{mixer}",
        model=Generator(name="hybrid_dit"),
        schedule=replace(base.schedule, warmup=10),
        loop=replace(base.loop, steps=1, ema_decay=0.98, validate_every=25),
        teacher="runs/hybrid_dit_digits",
        mixer=mixer,
        mixer_options=options,
        alone=Phase(steps=100, lr=4e-3),
        whole=Phase(steps=100, lr=2e-3),
    )
