"""HybridDiT: images of ImageNet's classes from scratch, and of the digits on a CPU.

Sources: DiT arXiv:2212.09748, SiT arXiv:2401.08740, LiT arXiv:2501.12976.
"""

from __future__ import annotations

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
    """Handwritten digits of the ten classes by flow matching, in a few minutes on two cores.

    visionhybrid train hybrid_dit_digits
    """
    return Generation(
        name="hybrid_dit_digits",
        model=Generator(
            name="hybrid_dit",
            options=dict(patch_size=2, num_layers=6, num_attention_heads=4, attention_head_dim=32),
        ),
        optim=Optim(name="adamw", lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99), clip_norm=1.0),
        schedule=Schedule(name="cosine", warmup=100, min_lr=1e-5),
        loop=Loop(batch_size=128, steps=600, ema_decay=0.998, ema_warmup=True, workers=0, validate_every=300),
        data=Images(dataset="digits", num_classes=10, image_size=8, repeat=1),
        diffusion=Diffusion(predict="flow", times="logit_normal", drop_label=0.1),
        sampling=Sampling(steps=25, guidance=2.0, each=10),
        channels=1,
        flip=0.0,
    )


def hybrid_dit_digits_linfusion() -> Graft:
    """The digits' generator with LinFusion's mixer instead of softmax, in a minute on two cores.

    visionhybrid graft hybrid_dit_digits_linfusion teacher=runs/hybrid_dit_digits
    """
    return _digits_graft("linfusion")


def hybrid_dit_digits_sla() -> Graft:
    """The digits' generator with sparse-linear attention instead of softmax, in a minute on two cores.

    visionhybrid graft hybrid_dit_digits_sla teacher=runs/hybrid_dit_digits
    """
    return _digits_graft("sla", block_q=4, block_k=4, topk=0.25)


def _digits_graft(mixer: str, **options: Any) -> Graft:
    base = hybrid_dit_digits()
    shared = {name: getattr(base, name) for name in ("model", "optim", "data", "diffusion")}
    return Graft(
        **shared,
        name=f"{base.name}_{mixer}",
        schedule=Schedule(name="cosine", warmup=20, min_lr=1e-5),
        sampling=base.sampling,
        channels=base.channels,
        flip=base.flip,
        loop=Loop(batch_size=128, steps=1, ema_decay=0.99, ema_warmup=True, workers=0, validate_every=1000),
        teacher="runs/hybrid_dit_digits",
        mixer=mixer,
        mixer_options=options,
        alone=Phase(steps=150, lr=1e-3),
        whole=Phase(steps=150, lr=5e-4),
    )
