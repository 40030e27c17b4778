"""How the denoisers of diffusers' text-to-image pipelines are called when they are trained: one small class for each family.

    family = family_of(pipe)
    row = family.encode(["a cat"])                                     # tensors, one row a caption; may be kept
    args, kwargs = family.inputs(x, times, {**row, "size": ..., "corner": ...})
    family.model(*args, **kwargs)[0]                                   # is to be family.target(target)

`x` (B, C, h, w) are noised, normalised latents; `times` (B,) run from 0 (clean) to 1000 (noise). A new family is a class here
and its pipelines' names in `FAMILIES`.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from visionhybrid.data.store import digest
from visionhybrid.diffusion.autoencoder import fingerprint

Row = dict[str, Tensor]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Family:
    """A pipeline and its ways. `denoiser` names the component that is trained, `call` what its `__call__` is given besides."""

    denoiser: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    call: ClassVar[dict[str, Any]] = {}
    patch: ClassVar[int] = 2  # sides of latents are multiples of it,
    least: ClassVar[int] = 1  # and those of images multiples of this, the pipeline says
    has_length: ClassVar[bool] = True  # whether `max_length` means something
    guidance = 1.0  # what a model with a distilled guidance is told; at 1 it asks for nothing

    def __init__(self, pipe: Any, max_length: int = 0) -> None:
        if max_length and not self.has_length:
            raise ValueError(f"text.max_length: {type(pipe).__name__} takes texts of one length only")
        self.pipe = pipe
        self.length: dict[str, Any] = {"max_sequence_length": max_length} if max_length else {}

    @property
    def model(self) -> Any:
        return getattr(self.pipe, self.denoiser)

    @property
    def factor(self) -> int:
        """Pixels to a latent's side."""
        return self.pipe.vae_scale_factor

    @property
    def unit(self) -> int:
        """What the sides of images are multiples of."""
        return math.lcm(self.factor * self.patch, self.least)

    @property
    def channels(self) -> int:
        """Of the latents that the denoiser takes."""
        return self.model.config.in_channels

    @property
    def text_encoders(self) -> list[Any]:
        return [net for name in self.encoders if (net := getattr(self.pipe, name)) is not None]

    def facts(self) -> dict[str, Any]:
        """What encoded captions depend on, JSON-able."""
        words = [getattr(self.pipe, name).get_vocab() for name in self.tokenizers if getattr(self.pipe, name)]
        return {
            "pipeline": type(self.pipe).__name__,
            "encoders": fingerprint(*self.text_encoders),
            "tokens": [digest(json.dumps(vocabulary, sort_keys=True).encode()) for vocabulary in words],
            **self.length,
        }

    def encode(self, captions: list[str]) -> Row:
        """Tensors with a row for each caption, computed where the text encoders are."""
        raise NotImplementedError

    def nothing(self) -> Row:
        """One row: what guidance compares with."""
        return self.encode([""])

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        """Arguments of the denoiser. given: `encode`'s tensors; of the images `size` before, and `corner` of the cut after they
        were resized, both (B, 2), height first.
        """
        raise NotImplementedError

    def target(self, x: Tensor) -> Tensor:
        """`x`, which the denoiser should give, in the layout it gives it in."""
        return x

    @property
    def _device(self) -> torch.device:
        return self.text_encoders[0].device


class StableDiffusion(Family):
    """SD 1.x and 2.x."""

    denoiser = "unet"
    patch, least = 1, 8
    has_length = False

    def __init__(self, pipe: Any, max_length: int = 0) -> None:
        super().__init__(pipe, max_length)
        if self.model.config.time_cond_proj_dim is not None:
            raise ValueError(
                "its UNet was distilled to take a guidance scale (LCM), and cannot be trained here"
            )

    def encode(self, captions: list[str]) -> Row:
        text, _ = self.pipe.encode_prompt(captions, self._device, 1, False)
        return {"text": text}

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        return (x, times, given["text"]), {"return_dict": False}


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, a pooled text, and the size and the cut of each image."""

    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def encode(self, captions: list[str]) -> Row:
        text, _, pooled, _ = self.pipe.encode_prompt(
            captions, device=self._device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def nothing(self) -> Row:
        row = self.encode([""])
        zero = self.pipe.config.force_zeros_for_empty_prompt
        return {name: torch.zeros_like(value) for name, value in row.items()} if zero else row

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        sides = torch.tensor(x.shape[2:], device=x.device).expand(len(x), 2) * self.factor
        # original size, corner of the cut, size of the picture (arXiv:2307.01952 section 2.2)
        ids = torch.cat([given["size"], given["corner"], sides], 1)
        added = {"text_embeds": given["pooled"], "time_ids": ids.to(x.dtype)}
        return (x, times, given["text"]), {"added_cond_kwargs": added, "return_dict": False}


class PixArt(Family):
    """PixArt-alpha and -sigma: T5's text with its mask."""

    least = 8
    call: ClassVar[dict[str, Any]] = {"use_resolution_binning": False, "clean_caption": False}

    def encode(self, captions: list[str]) -> Row:
        text, mask, _, _ = self.pipe.encode_prompt(captions, False, device=self._device, **self.length)
        return {"text": text, "mask": mask}

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        sides = torch.tensor(x.shape[2:], device=x.device, dtype=x.dtype).expand(len(x), 2) * self.factor
        # only PixArt-alpha at 1024 pixels is told the size
        told = self.model.use_additional_conditions
        added = {
            "resolution": sides if told else None,
            "aspect_ratio": sides[:, :1] / sides[:, 1:] if told else None,
        }
        kwargs = {
            "encoder_hidden_states": given["text"],
            "encoder_attention_mask": given["mask"],
            "timestep": times,
            "added_cond_kwargs": added,
        }
        return (x,), {**kwargs, "return_dict": False}


class Sana(Family):
    """SANA: captions go to its language model after an instruction; the empty one does not."""

    patch, least = 1, 32
    call: ClassVar[dict[str, Any]] = {"use_resolution_binning": False, "clean_caption": False}

    def encode(self, captions: list[str]) -> Row:
        return self._encode(captions, self._instruction)

    def nothing(self) -> Row:
        return self._encode([""], None)

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "instruction": self._instruction}

    @property
    def _instruction(self) -> Any:
        """What the pipeline tells its text encoder to do with a prompt, but not with a negative one."""
        return inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default

    def _encode(self, captions: list[str], instruction: Any) -> Row:
        text, mask, _, _ = self.pipe.encode_prompt(
            captions, False, device=self._device, complex_human_instruction=instruction, **self.length
        )
        return {"text": text, "mask": mask}

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        kwargs = {
            "encoder_hidden_states": given["text"],
            "encoder_attention_mask": given["mask"],
            "timestep": times * self.model.config.timestep_scale,
        }
        return (x,), {**kwargs, "return_dict": False}


class StableDiffusion3(Family):
    """SD 3 and 3.5: three text encoders, a pooled text."""

    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")

    def encode(self, captions: list[str]) -> Row:
        text, _, pooled, _ = self.pipe.encode_prompt(
            captions, None, None, device=self._device, do_classifier_free_guidance=False, **self.length
        )
        return {"text": text, "pooled": pooled}

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        kwargs = {
            "encoder_hidden_states": given["text"],
            "pooled_projections": given["pooled"],
            "timestep": times,
        }
        return (x,), {**kwargs, "return_dict": False}


class Flux(Family):
    """Flux.1: latents packed two by two, positions as arguments, a distilled guidance."""

    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    @property
    def channels(self) -> int:
        return self.model.config.in_channels // 4

    def encode(self, captions: list[str]) -> Row:
        text, pooled, _ = self.pipe.encode_prompt(captions, None, device=self._device, **self.length)
        return {"text": text, "pooled": pooled}

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        _, _, height, width = x.shape
        text = given["text"]
        places = torch.cartesian_prod(*(torch.arange(side // 2, device=x.device) for side in (height, width)))
        kwargs = {
            "encoder_hidden_states": text,
            "pooled_projections": given["pooled"],
            "timestep": times / 1000,
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "img_ids": torch.nn.functional.pad(places, (1, 0)).to(x.dtype),
            "guidance": torch.full_like(times, self.guidance) if self.model.config.guidance_embeds else None,
        }
        return (self.target(x),), {**kwargs, "return_dict": False}

    def target(self, x: Tensor) -> Tensor:
        """2x2 squares of latents as tokens (B, N, 4 C)."""
        return torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


class Wan(Family):
    """Wan 2.1 and 2.2: `x` is a video, (B, C, T, h, w)."""

    def encode(self, captions: list[str]) -> Row:
        # as long as the pipeline's own call makes them
        length = {"max_sequence_length": 512, **self.length}
        text, _ = self.pipe.encode_prompt(
            captions, do_classifier_free_guidance=False, device=self._device, **length
        )
        return {"text": text}

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        kwargs = {"encoder_hidden_states": given["text"], "timestep": times}
        return (x,), {**kwargs, "return_dict": False}


# By the names of pipelines, because importing them all takes seconds.
FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "SanaPipeline": Sana,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "WanPipeline": Wan,
}


def family_of(pipe: Any, max_length: int = 0) -> Family:
    """How to train the denoiser of `pipe`.

    Args: max_length: tokens of a T5-like encoder; 0: what the pipeline takes by itself.
    Raises: ValueError: not known for such a pipeline.
    """
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ValueError(f"{name} cannot be trained on captions here; have {', '.join(FAMILIES)}")
    return FAMILIES[name](pipe, max_length)


def open_any(path: str, *, dtype: torch.dtype | None = None, **components: Any) -> Any:
    """The pipeline at `path`, a folder or name on the hub, from safetensors only; `components` are not loaded.

    Args: dtype: of the weights; None: float32.
    Raises: ValueError: there is none, or it cannot be read.
    """
    if dtype is not None:
        # diffusers' word for it since 0.40, and before
        known = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40)
        components["dtype" if known else "torch_dtype"] = dtype
    try:
        return DiffusionPipeline.from_pretrained(path, use_safetensors=True, **components)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # the latter of an index that names a class of another diffusers, or is none
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: no diffusers pipeline can be read: {reason}") from None
