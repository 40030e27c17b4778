"""What the task `generation` trains: a new model on classes, or the denoiser of a pipeline on captions.

Each kind says what it is trained on, how a model is made, opened and called, and how pictures are drawn with it;
`generate.Generate` does the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionhybrid.diffusion import lora
from visionhybrid.diffusion.autoencoder import Autoencoder, open_autoencoder
from visionhybrid.diffusion.denoisers import Inputs, family_of, open_any
from visionhybrid.diffusion.new import MODELS, create, open_model
from visionhybrid.train.config import ConfigError, Generation, Sampling
from visionhybrid.train.material import Material, of_captions, of_classes, of_encoded

RELEASED = "pipeline"  # a diffusers folder in the run directory


def open_generator(config: Generation) -> NewModel | OfPipeline | OfEncoded:
    """Raises: ConfigError: the config names no model, or parts that do not fit each other."""
    name, pipeline = config.model.name, config.model.pipeline
    if (name == "pipeline") != bool(pipeline):
        raise ConfigError("model: name=pipeline and pipeline=FOLDER belong together")
    if name != "pipeline" and name not in MODELS:
        raise ConfigError(
            f"model.name: a generator is 'pipeline', {', '.join(map(repr, MODELS))}, got {name!r}"
        )
    captioned = {"captions": OfPipeline, "encoded": OfEncoded}.get(config.data.dataset)
    if bool(captioned) != bool(pipeline):
        raise ConfigError(
            "data.dataset: 'captions' or 'encoded' is what model.pipeline is trained on, and nothing else is"
        )
    if captioned is None:
        return NewModel(config)
    if config.data.num_classes:
        raise ConfigError("data.num_classes: captions are no classes, set it to 0")
    return captioned(config)


class NewModel:
    """A model by its name and options, in pixels or latents, of classes or without."""

    scheduler: Any = None  # the noise is the config's business
    draws = True  # pictures

    def __init__(self, config: Generation) -> None:
        if config.model.lora:
            raise ConfigError("model.lora: is for model.pipeline; a new model is trained as a whole")
        if config.text.prompts:
            raise ConfigError("text.prompts: are for model.pipeline; a new model draws classes")
        self.config = config
        self.kind, self.pipeline_kind = MODELS[config.model.name]
        self.vae = _checked(config, Autoencoder(_vae(config)), 1) if config.latent.vae else None
        channels, factor = (self.vae.channels, self.vae.factor) if self.vae else (config.channels, 1)
        self.shape = channels, config.data.image_size // factor, config.data.image_size // factor
        with torch.device("meta"):  # what cannot be made is said before images are encoded for it
            self._create()

    def material(self, notes: list[str]) -> Material:
        return of_classes(self.config, self.vae, notes)

    def build(self) -> nn.Module:
        """A new model, or that at `model.start`."""
        net, model = self._create(), self.config.model
        if model.start:
            try:
                net.load_state_dict(self.open(model.start).state_dict(), strict=model.start_strict)
            except RuntimeError as error:
                raise ConfigError(f"model.start: {' '.join(str(error).split())[:300]}") from None
        return net

    def _create(self) -> nn.Module:
        (channels, side, _), model = self.shape, self.config.model
        learned = self.config.diffusion.variance == "learned"
        given = {
            "side": side,
            "channels": channels,
            "classes": self.config.data.num_classes,
            "variance": learned,
        }
        try:
            return create(model.name, **given, **model.options)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ConfigError(f"model.options: {error}") from None

    def open(self, path: str | Path) -> nn.Module:
        """The model of a run directory, of a pipeline's folder, or by itself."""
        path, part = Path(path), self.pipeline_kind.part
        for folder in (path / RELEASED / part, path / part, path):
            if (folder / "config.json").is_file() and not (folder / RELEASED).is_dir():
                return open_model(self.config.model.name, folder).eval()
        raise ConfigError(
            f"{path}: no {self.kind.__name__}; give a run directory, its {RELEASED} folder, or a diffusers folder"
        )

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        label = given["label"] if self.config.data.num_classes else None
        return (x, times, label), {"return_dict": False}

    def target(self, x: Tensor) -> Tensor:
        return x

    def saved(self, model: nn.Module, scheduler: Any, names: Sequence[str], path: Path) -> None:
        """A diffusers folder."""
        self._pipeline(model, scheduler, names).save_pretrained(path)

    def _pipeline(self, model: nn.Module, scheduler: Any, names: Sequence[str] = ()) -> Any:
        pipe = self.pipeline_kind(
            model, scheduler, vae=self.vae.net if self.vae else None, labels=list(names)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(
        self,
        model: nn.Module,
        scheduler: Any,
        wanted: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] on the CPU of the classes `wanted`, each from the noise of its own seed."""
        device = next(model.parameters()).device
        noise = torch.stack([noise_of(self.shape, seed) for seed in seeds])
        found = self._pipeline(model, scheduler).to(device)(
            list(wanted) if self.config.data.num_classes else None,
            num_images=len(noise),
            guidance_scale=sampling.guidance,
            num_inference_steps=sampling.steps,
            latents=noise.to(device),
            output_type="pt",
        )
        return found.images.cpu()


class Denoiser:
    """The denoiser of a text-to-image or text-to-video pipeline of diffusers: what both kinds of data have in common.

    Args:
        components: of the pipeline, instead of its own.
    """

    def __init__(self, config: Generation, **components: Any) -> None:
        if config.latent.vae or config.model.options:
            raise ConfigError("latent.vae and model.options: a pipeline brings its own autoencoder and model")
        if not config.model.start_strict:
            raise ConfigError("model.start_strict: the denoiser of a pipeline is taken as a whole")
        self.config = config
        try:
            self.pipe = open_any(config.model.pipeline, **components)
            self.family = family_of(self.pipe, config.text.max_length)
        except ValueError as error:
            raise ConfigError(f"model.pipeline: {error}") from None

    def build(self) -> nn.Module:
        """A copy of the pipeline's denoiser, with the mixers it has, or that at `model.start`."""
        model = self.config.model
        net = self.open(model.start) if model.start else copy.deepcopy(self.family.model)
        if model.lora:
            try:
                lora.add(net, model.lora)
            except ValueError as error:
                raise ConfigError(f"model.lora: {error}") from None
        return net

    def open(self, path: str | Path) -> nn.Module:
        """The denoiser of a run directory or of a diffusers folder of such a pipeline."""
        found = next(
            (f for f in (Path(path) / RELEASED, Path(path)) if (f / "model_index.json").is_file()), None
        )
        if found is None:
            raise ConfigError(f"{path}: no pipeline; give a run directory or a diffusers folder")
        others = {name: part for name, part in self.pipe.components.items() if name != self.family.denoiser}
        return getattr(open_any(str(found), **others), self.family.denoiser).eval()

    def inputs(self, x: Tensor, times: Tensor, given: Mapping[str, Tensor]) -> Inputs:
        return self.family.inputs(x, times, given)

    def target(self, x: Tensor) -> Tensor:
        return self.family.target(x)

    def saved(self, model: nn.Module, scheduler: Any, names: Sequence[str], path: Path) -> None:
        """The pipeline with `model` in it, as a diffusers folder; low-rank updates are added up, and also in its folder lora."""
        trained = lora.merged(model) if self.config.model.lora else model
        with self._holding(trained):
            self.pipe.save_pretrained(path)
        if self.config.model.lora:
            lora.save(self.pipe, self.family.denoiser, model, path / "lora")

    @contextmanager
    def _holding(self, model: nn.Module) -> Iterator[None]:
        own = self.family.model
        self.pipe.register_modules(**{self.family.denoiser: model})
        try:
            yield
        finally:
            self.pipe.register_modules(**{self.family.denoiser: own})


class OfPipeline(Denoiser):
    """Trained on images and captions, which the pipeline's other parts encode; it draws pictures of prompts."""

    draws = True

    def __init__(self, config: Generation) -> None:
        super().__init__(config)
        self.family.guidance = config.text.guidance
        self.vae = _checked(config, Autoencoder(self.pipe.vae), self.family.unit)
        channels, side = self.vae.channels, config.data.image_size // self.vae.factor
        if self.family.channels != channels:
            raise ConfigError(
                f"model.pipeline: the denoiser takes {self.family.channels} channels, latents have {channels}; "
                "pipelines for inpainting, depth or editing cannot be trained here"
            )
        self.shape = channels, side, side
        self.scheduler: Any = self.pipe.scheduler

    def material(self, notes: list[str]) -> Material:
        return of_captions(self.config, self.vae, self.family, notes)

    def draw(
        self,
        model: nn.Module,
        scheduler: Any,
        wanted: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
    ) -> Tensor:
        """Images (B, C, H, W) in [0, 1] on the CPU of the prompts `wanted`, each from the noise of its own seed."""
        device, size = next(model.parameters()).device, self.config.data.image_size
        others = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        with self._holding(model):
            self.pipe.set_progress_bar_config(disable=True)
            try:
                found = self.pipe.to(device)(
                    prompt=list(wanted),
                    height=size,
                    width=size,
                    guidance_scale=sampling.guidance,
                    num_inference_steps=sampling.steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="pt",
                    **self.family.call,
                    **self.family.length,
                )
            finally:
                for part in others:  # the memory is the training's
                    part.to("cpu")
        return found.images.cpu()


class OfEncoded(Denoiser):
    """Trained on what comes encoded. The noise is the config's business, and no pictures are drawn."""

    draws = False
    scheduler: Any = None

    def __init__(self, config: Generation) -> None:
        if config.diffusion.drop_label:
            raise ConfigError("diffusion.drop_label: encoded captions cannot be dropped, set it to 0")
        # what is large, and whose work is done
        super().__init__(config, vae=None, text_encoder=None, tokenizer=None)

    def material(self, notes: list[str]) -> Material:
        return of_encoded(self.config, self.family.channels)


def _vae(config: Generation) -> Any:
    try:
        return open_autoencoder(config.latent.vae)
    except ValueError as error:
        raise ConfigError(f"latent.vae: {error}") from None


def _checked(config: Generation, vae: Autoencoder, unit: int) -> Autoencoder:
    size, unit = config.data.image_size, math.lcm(vae.factor, unit)
    if size % unit:
        raise ConfigError(f"data.image_size: the model takes multiples of {unit}, got {size}")
    if vae.colours != config.channels:
        raise ConfigError(f"channels: the autoencoder takes images of {vae.colours}, got {config.channels}")
    return vae


def noise_of(shape: Sequence[int], seed: int) -> Tensor:
    """Normal noise on the CPU: the same for the same seed, whatever else is drawn."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
