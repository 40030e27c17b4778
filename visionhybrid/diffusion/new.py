"""New generators of classes by name: `HybridDiT`, and diffusers' DiT and UNet with what they need to be trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel

from visionhybrid.diffusion.hybrid_dit import HybridDiT
from visionhybrid.diffusion.pipeline import HybridDiTPipeline, UNetPipeline
from visionhybrid.hosts.diffusers import models

# name -> model, and the pipeline that draws with it
MODELS: dict[str, tuple[type[Any], type[Any]]] = {
    "hybrid_dit": (HybridDiT, HybridDiTPipeline),
    "dit": (DiTTransformer2DModel, HybridDiTPipeline),
    "unet": (UNet2DModel, UNetPipeline),
}


def open_model(name: str, folder: Path) -> Any:
    """The model saved in `folder`, with the mixers it has; safetensors only."""
    kind = MODELS[name][0]
    if "visionhybrid" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        kind = getattr(models, kind.__name__)  # diffusers' own class would lose the mixers
    return kind.from_pretrained(folder, use_safetensors=True)


def create(
    name: str, *, side: int, channels: int, classes: int, variance: bool = False, **options: Any
) -> Any:
    """An untrained model.

    Args:
        side, channels: of what it is trained on. classes: 0: unconditional. variance: it gives one besides, in
            as many channels again. options: further keywords of its class.
    Raises: ValueError, TypeError: options that make no model, or one for other data.
    """
    made = channels * (1 + variance)
    given: dict[str, Any] = {"sample_size": side, "in_channels": channels, "out_channels": made}
    if name == "unet":
        given |= {"num_class_embeds": classes + 1 if classes else None}
    elif name == "dit":
        if not classes:
            raise ValueError("'dit' needs classes (data.num_classes)")
        given |= {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": classes}
    else:
        given |= {"num_classes": classes}
    model = MODELS[name][0](**{**given, **options})
    has = model.config
    if (has.in_channels, has.out_channels or has.in_channels) != (channels, made):
        raise ValueError(
            f"in_channels and out_channels are those of the data, {channels} and {made}, got {has.in_channels} and "
            f"{has.out_channels} (diffusion.variance=learned doubles the second)"
        )
    if isinstance(model, DiTTransformer2DModel):
        for module in model.modules():  # classes are dropped with the image, not in the model
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
    return model
