"""The `diffusion` suite: mixers in whole generators beside what diffusers does, for a denoising step and a training step.

Weights are random. Different mixers compute different things, so nothing is compared here but shapes; that each computes what it
should is what the golden cases are for. `--only unet` and `--only train` are the two halves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visionhybrid
from visionhybrid.bench.harness import Case, Runner, Target

PARTS = ("unet", "train")
# side of the image in pixels -> (fp32, bf16) share of diffusers' time: 1 / 1.7, 1 / 2.1; 1 / 4.1, 1 / 5
UNET_LIMITS = {512: None, 1024: (1 / 1.7, 1 / 2.1), 2048: (1 / 4.1, 1 / 5)}
# runner -> hidden width of LinFusion's two networks over that of the model: the default, as published for SD 1.5 and 2.1, and
# as published for SDXL
WIDTHS = {"linfusion": 1, "linfusion, SDXL's width": 1 / 16}
S2 = dict(num_layers=12, num_attention_heads=6, attention_head_dim=64, patch_size=2)  # DiT-S/2


def cases(*, quick: bool = False, only: str | None = None) -> list[Case]:
    """The suite; `quick` takes tiny models and two rounds, and judges nothing. `only`: "unet", "train", or "unet512" and so on."""
    names = (*PARTS, *(f"unet{side}" for side in UNET_LIMITS))
    if only is not None and only not in names:
        raise ValueError(f"bench diffusion: --only must be one of {', '.join(names)}, got {only!r}")
    return [
        case for case in [*_unets(quick), *_training(quick)] if only is None or case.name.startswith(only)
    ]


def _unets(quick: bool) -> list[Case]:
    found = []
    for side, limits in UNET_LIMITS.items():
        size = side // 8 if not quick else side // 64
        for dtype, limit in zip((torch.float32, torch.bfloat16), limits or (None, None), strict=True):
            kind = "fp32" if dtype == torch.float32 else "bf16"
            time = [Target(runner="linfusion", what="time", limit=limit)] if limit else []
            found.append(
                Case(
                    name=f"unet{side}_{kind}",
                    title=f"SD 1.5 UNet, one step at {side}x{side}, {kind}",
                    build=partial(_unet, size, dtype, quick),
                    targets=(*time, Target(runner="linfusion", what="memory", limit=1.0)),
                    rounds={512: 3, 1024: 2, 2048: 1}[side] if not quick else 2,
                    minutes=side > 1024,
                    judged=not quick,
                    family=f"unet {kind}",
                    length=size * size,
                )
            )
    return found


def _training(quick: bool) -> list[Case]:
    rounds = dict(rounds=2 if quick else 5, judged=not quick)
    few = {**rounds, "rounds": 2 if quick else 3}
    small, large = (8, 16) if quick else (32, 128)
    third = tuple(Target(runner=name, what="time", limit=1 / 3) for name in WIDTHS)
    found = [
        Case(
            name="train_s2_softmax",
            title=f"HybridDiT-S/2 beside DiTTransformer2DModel, 4 latents of {small}x{small}, training step",
            build=partial(_dit, small, 4, quick),
            targets=(Target(runner="HybridDiT", what="time", limit=1.0),),
            **rounds,
        ),
        Case(
            name="train_s2_distil",
            title=f"HybridDiT-S/2, distillation step beside its two networks, 4 latents of {small}x{small}",
            build=partial(_distillation, small, 4, quick),
            targets=(Target(runner="distillation", what="time", limit=1.1),),
            **rounds,
        ),
    ]
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16 autocast")):
        found.append(
            Case(
                name=f"train_s2_linfusion_{kind[:4]}",
                title=f"HybridDiT-S/2, linfusion beside softmax, {(large // 2) ** 2} tokens, training step, {kind}",
                build=partial(_mixed_dits, large, dtype, quick),
                targets=third,
                **few,
            )
        )
    return found


def _shape_only(x: Tensor) -> Callable[[], Tensor]:
    """Stands for an output where two sides differ by intention."""
    return lambda: torch.ones(x.shape)


def _unet(size: int, dtype: torch.dtype, quick: bool, device: torch.device) -> list[Runner]:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    widths: Any = dict(block_out_channels=(32, 32, 64, 64), norm_num_groups=8) if quick else {}
    plain = UNet2DConditionModel(cross_attention_dim=768, **widths).to(device, dtype).eval()
    # The same weights in both, but for the mixers' own.
    mixed = copy.deepcopy(plain, memo={id(p): p for p in plain.parameters()})
    visionhybrid.attach(mixed, "linfusion")
    x = torch.randn(1, 4, size, size, device=device, dtype=dtype)
    text = torch.randn(1, 77, 768, device=device, dtype=dtype)
    time = torch.tensor([500], device=device)

    @torch.inference_mode()
    def step(unet: nn.Module) -> Tensor:
        return unet(x, time, text, return_dict=False)[0]

    return [
        Runner(name=name, run=partial(step, unet), output=_shape_only(x), holds=(unet, x), dtype=dtype)
        for name, unet in (("diffusers", plain), ("linfusion", mixed))
    ]


def _options(quick: bool) -> dict[str, Any]:
    return {**S2, "num_layers": 2, "attention_head_dim": 8} if quick else S2


def _step(
    net: nn.Module, call: Callable[[], Tensor], optimiser: torch.optim.Optimizer
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        loss = call()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def _trainer(
    name: str, net: nn.Module, x: Tensor, noise: Tensor, dtype: torch.dtype = torch.float32
) -> Runner:
    """A step of AdamW; below float32 under autocast, with the weights in float32, as one trains."""
    time, label = torch.full((len(x),), 300.0), torch.zeros(len(x), dtype=torch.long)

    def loss() -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            out = net(x, timestep=time, class_labels=label, return_dict=False)[0]
        return F.mse_loss(out[:, : x.shape[1]].float(), noise)

    net.train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)
    return Runner(
        name=name,
        run=_step(net, loss, optimiser),
        output=_shape_only(x),
        holds=(net, optimiser, x),
        dtype=dtype,
    )


def _latents(size: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, batch, 4, size, size, generator=generator).unbind(0)
    return x, noise


def _hybrid(size: int, quick: bool, **options: Any) -> nn.Module:
    from visionhybrid.diffusion import HybridDiT

    torch.manual_seed(0)
    return HybridDiT(sample_size=size, out_channels=8, **_options(quick), **options)


def _dit(size: int, batch: int, quick: bool, device: torch.device) -> list[Runner]:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(sample_size=size, out_channels=8, **_options(quick))
    x, noise = _latents(size, batch)
    return [
        _trainer("DiTTransformer2DModel", theirs, x, noise),
        _trainer("HybridDiT", _hybrid(size, quick), x, noise),
    ]


def _mixed_dits(size: int, dtype: torch.dtype, quick: bool, device: torch.device) -> list[Runner]:
    x, noise = _latents(size, 1)
    dim = _options(quick)["num_attention_heads"] * _options(quick)["attention_head_dim"]
    nets = {"softmax": _hybrid(size, quick, mixer="softmax")}
    for name, width in WIDTHS.items():
        options = {"linfusion": {"mid_dim": max(1, int(dim * width))}}
        nets[name] = _hybrid(size, quick, mixer="linfusion", mixer_options=options)
    return [_trainer(name, net, x, noise, dtype) for name, net in nets.items()]


def _distillation(size: int, batch: int, quick: bool, device: torch.device) -> Sequence[Runner]:
    from visionhybrid.train.distill import imitate

    teacher, student = (_hybrid(size, quick, mixer=name) for name in ("softmax", "linfusion"))
    x, noise = _latents(size, batch)
    given = x, torch.full((batch,), 300.0), torch.zeros(batch, dtype=torch.long)
    names = [row.name for row in visionhybrid.describe(student).rows]
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def both() -> Tensor:
        with torch.no_grad():
            teacher(*given, return_dict=False)
        return F.mse_loss(student(*given, return_dict=False)[0][:, :4], noise)

    def distilled() -> Tensor:
        found = imitate(student, teacher, names, (given, {"return_dict": False}))
        return F.mse_loss(found.prediction[:, :4], noise) + 0.5 * found.output + 0.5 * found.features

    holds = (teacher, student, optimiser, x)
    return [
        Runner(name=name, run=_step(student, call, optimiser), output=_shape_only(x), holds=holds)
        for name, call in (("teacher and student", both), ("distillation", distilled))
    ]
