"""CLEAR: attention to a disc around each token, distilled into FLUX.

Sources: arXiv:2412.16112; Huage001/CLEAR@98e9fed `distill.py`. The authors train on 10 thousand images of 1024 pixels that FLUX.1-dev
itself drew (jackyhate/text-to-image-2M, data_1024_10K), with their prompts.
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.train.config import Diffusion, Graft, Images, Loop, Optim, Phase, Sampling, Schedule, Text

# The processors are numbered through both kinds of blocks, 19 double ones first; compared is every fourth, of the single ones.
_COMPARED = tuple(f"single_transformer_blocks.{i - 19}.attn" for i in range(20, 57, 4))


def clear_flux() -> Graft:
    """CLEAR with a radius of 16 tokens for FLUX.1-dev, at 1024 pixels: 10 thousand steps of 32 images.

    visionhybrid graft clear_flux model.pipeline=black-forest-labs/FLUX.1-dev data.root=/data/flux_10k
    Four 80 GB GPUs with sharded weights (FSDP). Radii 8 and 32: `mixer_options.radius=8`.
    """
    return Graft(
        name="clear_flux",
        data=Images(dataset="captions", num_classes=0, image_size=1024),
        diffusion=Diffusion(predict="pipeline", times="uniform", drop_label=0.0),
        text=Text(max_length=512, guidance=3.5),
        sampling=Sampling(steps=20, guidance=3.5, each=1, classes=4),
        flip=0.0,
        eval_batch=1,
        optim=Optim(
            name="prodigy", lr=1.0, betas=(0.9, 0.999), weight_decay=1e-4, decay_1d=True, clip_norm=1.0
        ),
        schedule=Schedule(name="constant"),
        loop=Loop(
            batch_size=32,
            steps=1,  # of a phase: see below
            micro_batch=2,
            precision="bf16",
            ema_decay=None,
            grad_checkpointing=True,
            validate_every=1000,
            checkpoint_every=1000,
        ),
        mixer="clear",
        mixer_options={"radius": 16},
        alone=Phase(steps=0),
        whole=Phase(steps=10_000, lr=1.0),  # Prodigy's factor
        tune=Phase(steps=0),
        task_weight=1.0,
        output_weight=0.5,
        feature_weight=0.5,
        features=_COMPARED,
        train="projections",
    )


def clear_flux_down4() -> Graft:
    """CLEAR with a radius of 8 tokens and all keys pooled by four, for FLUX.1-dev: as `clear_flux`.

    visionhybrid graft clear_flux_down4 model.pipeline=black-forest-labs/FLUX.1-dev data.root=/data/flux_10k
    """
    return replace(clear_flux(), name="clear_flux_down4", mixer_options={"radius": 8, "down": 4})
