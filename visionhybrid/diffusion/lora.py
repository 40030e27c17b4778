"""Low-rank updates (LoRA, arXiv:2106.09685) of a denoiser's attention, by way of peft as diffusers has it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def add(model: Any, rank: int) -> None:
    """Freeze `model` and give every attention's projections an update of `rank`, which starts as nothing and is trained.

    Raises: ValueError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError("LoRA needs peft: pip install 'visionhybrid[lora]'") from None
    model.requires_grad_(False)
    # scale alpha / rank = 1: files without an alpha are read so
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS))


def merged(model: Any) -> Any:
    """A copy with the updates added to its weights, as if it had been trained so."""
    found = copy.deepcopy(model)
    found.fuse_lora()
    found.unload_lora()
    return found


def save(pipe: Any, denoiser: str, model: Any, folder: Path) -> None:
    """The updates by themselves, for `pipe.load_lora_weights(folder)`; nothing where the pipeline cannot load such files."""
    from peft.utils import get_peft_model_state_dict

    if hasattr(pipe, "save_lora_weights"):
        pipe.save_lora_weights(folder, **{f"{denoiser}_lora_layers": get_peft_model_state_dict(model)})
