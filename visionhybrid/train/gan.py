"""Training a restorer against a discriminator: the last stage of HAT's real-world models.

In every step the network first learns from pixel, perceptual and adversarial loss, with the discriminator held fixed, then
the discriminator learns from real pictures and from what the network had made of this batch before its update.

Source: XPixelGroup/HAT@1638a9a hat/models/realhatgan_model.py. Differences: real and made pictures go through the discriminator
in one pass (one step of its power iteration instead of two); sharpened truth is cut from a sharpened larger piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.func import functional_call

from visionhybrid.train import perceptual
from visionhybrid.train.config import Adversarial, ConfigError
from visionhybrid.train.discriminator import UNetDiscriminator
from visionhybrid.train.losses import PIXEL_LOSSES, fooled, mistaken
from visionhybrid.train.restore import Restore
from visionhybrid.train.sampler import Sample


class RestoreAdversarially(Restore):
    """See `task.Task`; data, metrics and sample pictures are those of `Restore`."""

    config: Adversarial

    def __init__(self, config: Adversarial) -> None:
        if config.sharp and (config.data.source, config.data.degradation) != ("folder", "second_order"):
            raise ConfigError(
                "sharp: sharpened truth needs data.source=folder and data.degradation=second_order"
            )
        if config.perceptual_weight and config.data.channels != 3:
            raise ConfigError("perceptual_weight: the perceptual loss needs data.channels=3")
        if config.data.patch * config.data.scale % 8:
            raise ConfigError(
                f"data.patch: the discriminator needs patch * scale to be a multiple of 8, "
                f"got {config.data.patch} * {config.data.scale}"
            )
        truth = "both" if config.sharp else "plain"
        super().__init__(replace(config, data=replace(config.data, truth=truth)))
        self.perceptual = perceptual.load(config.vgg) if config.perceptual_weight else None
        # (input, result) of this step's forward passes, for the discriminator.
        self._made: list[tuple[Tensor, Tensor]] = []
        self._judged = False

    def parts(self) -> dict[str, nn.Module]:
        discriminator = UNetDiscriminator(self.config.data.channels, self.config.width)
        return {**super().parts(), "discriminator": discriminator}

    def loss(
        self, part: str, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self._of_model(parts, batch) if part == "model" else self._of_discriminator(parts, batch)

    def _of_model(self, parts: Mapping[str, nn.Module], batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        output = parts["model"](batch["lq"]).float()
        self._remember(batch["lq"], output.detach())
        # Detached parameters: the gradient passes through the discriminator and leaves nothing in it.
        judge = extract_model_from_parallel(parts["discriminator"])
        frozen = {name: parameter.detach() for name, parameter in judge.named_parameters()}
        terms = {
            "pixel": config.pixel_weight * PIXEL_LOSSES[config.loss](output, self._truth("pixel", batch)),
            "adversarial": config.adversarial_weight * fooled(functional_call(judge, frozen, (output,))),
        }
        if self.perceptual is not None:
            self.perceptual.to(output.device)
            distance = self.perceptual(output, self._truth("perceptual", batch))
            terms["perceptual"] = config.perceptual_weight * distance
        return torch.stack([*terms.values()]).sum(), terms

    def _of_discriminator(
        self, parts: Mapping[str, nn.Module], batch: Sample
    ) -> tuple[Tensor, dict[str, Tensor]]:
        truth = self._truth("adversarial", batch)
        logits = parts["discriminator"](torch.cat([truth, self._recall(parts["model"], batch["lq"])]))
        real, fake = logits.float().chunk(2)
        return mistaken(real, fake), {"real": real.mean(), "fake": fake.mean()}

    def _truth(self, name: str, batch: Sample) -> Tensor:
        return batch["sharp" if name in self.config.sharp else "gt"]

    def _remember(self, lq: Tensor, output: Tensor) -> None:
        if self._judged:
            self._made.clear()
            self._judged = False
        self._made.append((lq, output))

    def _recall(self, model: nn.Module, lq: Tensor) -> Tensor:
        """What the model made of `lq` before its update; made anew if memory ran out and batches were cut smaller."""
        self._judged = True
        for given, output in self._made:
            if torch.equal(given, lq):
                return output
        with torch.no_grad():
            return model(lq).float()
