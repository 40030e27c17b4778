"""SLA: sparse-linear attention fine-tuned into Wan 2.1, by imitation of the teacher or by the task alone.

Sources: arXiv:2509.24006; thu-ml/SLA@d973e55; thu-ml/TurboDiffusion@aaecff5 (imitation, which its authors recommend: it asks less of the
data). Data are latents and text embeddings of clips, `data.dataset=encoded`; `visionhybrid.train.encoded.encode_clips` makes them from
frames. The authors' 250 thousand clips of 81 frames at 480x832 were drawn by Wan 2.1 14B.
"""

from __future__ import annotations

from dataclasses import replace

from visionhybrid.train.config import Diffusion, Graft, Images, Loop, Optim, Phase, Schedule


def sla_wan_1_3b() -> Graft:
    """SLA for Wan 2.1 1.3B by imitation of its velocities: a tenth of the blocks attended to, 4000 steps of 16 clips.

    visionhybrid graft sla_wan_1_3b model.pipeline=Wan-AI/Wan2.1-T2V-1.3B-Diffusers data.root=/data/wan_encoded
    Four 80 GB GPUs with sharded weights (FSDP). How many steps the authors took is not published; users report 3000 to 4000.
    """
    return Graft(
        name="sla_wan_1_3b",
        data=Images(dataset="encoded", num_classes=0),
        # t = s / (1 + s), ln s normal with mean 1.5 and deviation 1.6
        diffusion=Diffusion(
            predict="flow", times="logit_normal", logit_mean=1.5, logit_std=1.6, drop_label=0.0
        ),
        flip=0.0,
        eval_batch=1,
        optim=Optim(
            name="adamw",
            lr=1e-5,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.01,
            decay_1d=True,
            clip_norm=None,
        ),
        schedule=Schedule(name="constant", warmup=100, warmup_lr=1e-11),
        loop=Loop(
            batch_size=16,
            steps=1,  # of a phase: see below
            micro_batch=4,
            precision="bf16",
            # the authors average by a power of the step, at a rate of 0.1; this too begins short and grows
            ema_decay=0.999,
            ema_warmup=True,
            grad_checkpointing=True,
            validate_every=500,
            checkpoint_every=500,
        ),
        mixer="sla",
        mixer_options={"topk": 0.1, "block_q": 64, "block_k": 64},
        alone=Phase(steps=0),
        whole=Phase(steps=4000, lr=1e-5),
        tune=Phase(steps=0),
        task_weight=0.0,
        output_weight=1.0,
        feature_weight=0.0,
        train="all",
    )


def sla_wan_1_3b_finetune() -> Graft:
    """SLA for Wan 2.1 1.3B as its paper trains it: the task alone, a twentieth of the blocks, 2000 steps of 64 clips.

    visionhybrid graft sla_wan_1_3b_finetune model.pipeline=Wan-AI/Wan2.1-T2V-1.3B-Diffusers data.root=/data/wan_encoded
    The published VBench figures are those of full attention within its noise, at 2.74 T instead of 52.75 T operations. The rate is not
    published; it is that of the imitation.
    """
    base = sla_wan_1_3b()
    return replace(
        base,
        name="sla_wan_1_3b_finetune",
        loop=replace(base.loop, batch_size=64),
        mixer_options={"version": "paper", "topk": 0.05, "negligible": 0.1, "block_q": 64, "block_k": 64},
        whole=Phase(steps=0),
        tune=Phase(steps=2000, lr=1e-5),
    )
