"""The `models` suite: HAT-S beside spandrel's, Next-ViT small beside timm's, at use and in a training step; A2Mamba tiny.

Both sides run on the same weights: the peer is built from a seed, its state dict is handed to `visionhybrid.load`.
The targets are those of the project's first milestone, stated before anything was measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visionhybrid
from visionhybrid.bench import a2mamba
from visionhybrid.bench.harness import Case, Runner, Series, Target, peer

SYSTEMS = ("hat", "nextvit", "a2mamba")
# Eight bits of mantissa through a whole network, against float32.
BF16_TOLERANCE = 5e-2
# A training step is compared by the gradient at the input. In float64 the two sides agree to 1e-14; in float32 batch norms
# over few values and ReLUs near zero amplify rounding.
GRADIENT_TOLERANCE = 1e-2


def cases(*, quick: bool = False, only: str | None = None) -> list[Case]:
    """The suite; `quick` takes small inputs and two rounds, and judges nothing."""
    if only is not None and only not in SYSTEMS:
        raise ValueError(f"bench models: --only must be one of {', '.join(SYSTEMS)}, got {only!r}")
    side, patch = (32, 16) if quick else (128, 64)
    # Not 1: the gradient at the input would vanish in the last batch norm.
    batch, size = (2, 96) if quick else (8, 224)
    common: dict[str, Any] = {"judged": not quick}
    ours, ours_bf16 = "visionhybrid", "visionhybrid bf16"
    suite = {
        "hat": [
            Case(
                name="hat_small_x4",
                title=f"vh_hat_small_x4, 1x3x{side}x{side}, inference",
                build=partial(_hat, side),
                targets=(
                    Target(runner=ours, what="time", limit=1 / 3),
                    Target(runner=ours, what="memory", limit=1 / 2),
                    Target(runner=ours_bf16, what="time", limit=1 / 6),
                ),
                rounds=2 if quick else 5,
                **common,
            ),
            Case(
                name="hat_small_x4_train",
                title=f"vh_hat_small_x4, 1x3x{patch}x{patch}, training step (L1, Adam)",
                build=partial(_hat_train, patch),
                targets=_no_worse(ours),
                rounds=2 if quick else 5,
                **common,
            ),
        ],
        "nextvit": [
            Case(
                name="nextvit_small",
                title=f"vh_nextvit_small deployed, {batch}x3x{size}x{size}, inference",
                build=partial(_nextvit, batch, size),
                targets=(
                    Target(runner=ours, what="time", limit=0.72),
                    Target(runner=ours_bf16, what="time", limit=0.35),
                ),
                rounds=2 if quick else 21,
                **common,
            ),
            Case(
                name="nextvit_small_train",
                title=f"vh_nextvit_small, {batch}x3x{size}x{size}, training step (cross entropy, AdamW)",
                build=partial(_nextvit_train, batch, size),
                targets=_no_worse(ours),
                rounds=2 if quick else 9,
                **common,
            ),
        ],
        "a2mamba": a2mamba.cases(batch, size, judged=not quick, rounds=2 if quick else 7),
    }
    return [replace(case, apart=True) for name in SYSTEMS if only in (None, name) for case in suite[name]]


def series(*, quick: bool = False, only: str | None = None) -> list[Series]:
    """What is measured on a CPU besides the cases."""
    if only not in (None, "a2mamba"):
        return []
    return [a2mamba.over_sizes((64, 96), 1) if quick else a2mamba.over_sizes()]


def _no_worse(runner: str) -> tuple[Target, ...]:
    return tuple(Target(runner=runner, what=what, limit=1.0) for what in ("time", "memory"))


def inference(name: str, model: nn.Module, x: Tensor, *, autocast: bool = False) -> Runner:
    """A forward pass without gradients, in the dtype of `x`; with `autocast` in bfloat16 where PyTorch thinks it safe."""

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
            return model(x)

    dtype = torch.bfloat16 if autocast else x.dtype
    tolerance = 1e-4 if dtype == torch.float32 else BF16_TOLERANCE
    return Runner(name=name, run=run, holds=(model, x), tolerance=tolerance, dtype=dtype)


def training(
    name: str, model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], optimiser: torch.optim.Optimizer
) -> Runner:
    """Forward, backward, update. Compared by the gradient that the loss sends to the input."""

    def run() -> Tensor:
        value = loss(model(x))
        value.backward()
        optimiser.step()
        # After the step, so that no gradient is alive before the next one.
        optimiser.zero_grad(set_to_none=True)
        return value.detach()

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(leaf)), leaf)
        return grad

    return Runner(
        name=name, run=run, output=gradient, holds=(model, optimiser, x), tolerance=GRADIENT_TOLERANCE
    )


def _hat_pair(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """spandrel's HAT-S x4 from a seed, and ours with its weights."""
    spandrel_hat = peer("spandrel.architectures.HAT")
    torch.manual_seed(0)
    # Constructor values of the published HAT-S; stochastic depth off, so that training steps can be compared.
    theirs = spandrel_hat.HAT(
        embed_dim=144,
        depths=(6,) * 6,
        num_heads=(6,) * 6,
        window_size=16,
        compress_ratio=24,
        squeeze_factor=24,
        mlp_ratio=2,
        upscale=4,
        drop_path_rate=0.0,
    )
    return theirs.to(device).eval(), _ours(theirs.state_dict()).to(device)


def _hat(side: int, device: torch.device) -> list[Runner]:
    theirs, ours = _hat_pair(device)
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    return [
        inference("spandrel", theirs, x),
        inference("visionhybrid", ours, x),
        inference("spandrel bf16", theirs, x, autocast=True),
        inference("visionhybrid bf16", ours, x, autocast=True),
    ]


def _hat_train(patch: int, device: torch.device) -> list[Runner]:
    theirs, ours = _hat_pair(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(1, 3, patch, patch, generator=generator).to(device)
    truth = torch.rand(1, 3, 4 * patch, 4 * patch, generator=generator).to(device)
    loss = partial(F.l1_loss, target=truth)
    return [
        training(
            name, model.train(), x, loss, torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
        )
        for name, model in (("spandrel", theirs), ("visionhybrid", ours))
    ]


def _nextvit_pair(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """timm's nextvit_small as created, from a seed, and ours with its weights; both in eval mode."""
    torch.manual_seed(0)
    theirs = _without_stochastic_depth(timm.create_model("nextvit_small").eval())
    # Fresh norms are identities, which would hide a wrong fold.
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return theirs.to(device), _ours(theirs.state_dict()).to(device)


def _nextvit(batch: int, size: int, device: torch.device) -> list[Runner]:
    theirs, ours = _nextvit_pair(device)
    torch.manual_seed(0)
    tuned = timm.create_model("nextvit_small").eval().to(device)
    tuned.load_state_dict(theirs.state_dict())
    tuned = timm.utils.reparameterize_model(tuned, inplace=True).to(memory_format=torch.channels_last)
    ours.deploy()
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    half = torch.bfloat16
    return [
        inference("timm", theirs, x),
        inference("timm folded, channels_last", tuned, x.to(memory_format=torch.channels_last)),
        inference("visionhybrid", ours, x),
        inference("timm bf16", copy.deepcopy(theirs).to(half), x.to(half)),
        inference("visionhybrid bf16", copy.deepcopy(ours).to(half), x.to(half)),
    ]


def _nextvit_train(batch: int, size: int, device: torch.device) -> list[Runner]:
    theirs, ours = _nextvit_pair(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=generator).to(device)
    labels = torch.randint(1000, (batch,), generator=generator).to(device)
    loss = partial(F.cross_entropy, target=labels)
    return [
        training(
            name, model.train(), x, loss, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
        )
        for name, model in (("timm", theirs), ("visionhybrid", ours))
    ]


def _ours(state: dict[str, Tensor]) -> nn.Module:
    return _without_stochastic_depth(visionhybrid.load(state))


def _without_stochastic_depth(model: nn.Module) -> nn.Module:
    """So that two training steps can be compared; both sides then do the same work."""
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model
