"""diffusers' autoencoders of images, seen alike: what a generator in latent space needs of them."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn

from visionhybrid.data.latents import Affine

KINDS = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}


def open_autoencoder(path: str) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder in a folder or repository of the hub, or that of the pipeline there; safetensors only, in float32.

    Raises: ValueError: there is none, or it is of another kind.
    """
    why = "it has no config.json"
    for subfolder in ("", "vae"):
        if Path(path).is_dir() and not (Path(path) / subfolder / "config.json").is_file():
            continue
        try:
            config: Any = AutoencoderKL.load_config(path, subfolder=subfolder or None)
        except OSError as error:
            why = str(error).strip().splitlines()[0]
            continue
        name = config.get("_class_name")
        if name not in KINDS:
            raise ValueError(f"{path}: {name} is no autoencoder known here; have {', '.join(KINDS)}")
        return KINDS[name].from_pretrained(path, subfolder=subfolder or None, use_safetensors=True)
    raise ValueError(f"{path}: no autoencoder, neither a folder of diffusers nor a name on the hub: {why}")


class Autoencoder:
    """A frozen autoencoder. `factor`: pixels to a latent's side; `channels`: of a latent; `colours`: of an image."""

    def __init__(self, net: Any) -> None:
        if type(net).__name__ not in KINDS:
            raise ValueError(f"{type(net).__name__} is no autoencoder known here; have {', '.join(KINDS)}")
        self.net: Any = net.float().eval().requires_grad_(False)
        config = net.config
        self.stochastic = isinstance(net, AutoencoderKL)
        self.channels, self.colours = config.latent_channels, config.in_channels
        sides = config.block_out_channels if self.stochastic else config.encoder_block_out_channels
        self.factor = 2 ** (len(sides) - 1)
        self.affine = affine_of(config)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """(B, colours, H, W) in [-1, 1] -> mean and log variance (B, 2 channels, h, w), or where there is none the latent."""
        found = self.net.encode(images)
        return found.latent_dist.parameters if self.stochastic else found.latent

    @cached_property
    def fingerprint(self) -> str:
        """A hash of weights and config, which are not trained."""
        return fingerprint(self.net)


def affine_of(config: Any) -> Affine:
    """How the latents of an autoencoder with this config are normalised, as diffusers' pipelines do it."""
    channels = config.latent_channels

    def values(name: str, default: float) -> Tensor:
        given = config.get(name)
        return torch.tensor(given if given is not None else [default] * channels).float().view(-1, 1, 1)

    shift = values("latents_mean", 0.0) + (config.get("shift_factor") or 0.0)
    return Affine(shift, config.get("scaling_factor", 1.0) / values("latents_std", 1.0))


def decode(net: Any, latents: Tensor) -> Tensor:
    """Normalised latents (B, C, h, w) -> images in about [-1, 1]."""
    affine = affine_of(net.config)
    shift, scale = (value.to(latents) for value in (affine.shift, affine.scale))
    return net.decode((latents / scale + shift).to(net.dtype)).sample


def fingerprint(*nets: nn.Module) -> str:
    """A hash of the nets' weights and configs: the same for the same numbers, wherever they were loaded from."""
    found = hashlib.sha256()
    for net in nets:
        config: Any = net.config
        facts = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        # where it came from, and by which version of which library it was written
        kept = {k: v for k, v in facts.items() if not k.startswith("_") and k not in _PROVENANCE}
        found.update(json.dumps(kept, sort_keys=True, default=str).encode())
        for name, value in net.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


_PROVENANCE = ("transformers_version", "torch_dtype", "dtype", "architectures")
