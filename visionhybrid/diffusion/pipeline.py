"""Pictures of classes from a trained `HybridDiT`, DiT or UNet: diffusers pipelines with diffusers' schedulers.

    pipe = HybridDiTPipeline.from_pretrained("runs/digits/pipeline")
    images = pipe(["seven", "two"], guidance_scale=2.0).images

Classes go by name or by number.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from visionhybrid.diffusion.autoencoder import decode
from visionhybrid.diffusion.hybrid_dit import HybridDiT


class ClassPipeline(DiffusionPipeline):
    """Class-conditional or unconditional generation; the subclasses say what their model is called."""

    _optional_components: ClassVar[list[str]] = ["vae"]

    part: ClassVar[str]

    def _keep(self, denoiser: Any, scheduler: Any, vae: Any, labels: list[str] | None) -> None:
        self.register_modules(**{self.part: denoiser}, scheduler=scheduler, vae=vae)
        self.register_to_config(labels=list(labels or ()))
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.part)

    def label_ids(self, names: Sequence[str | int]) -> list[int]:
        """Numbers of the classes that `names` are the names or numbers of.

        Raises: ValueError: an unknown class (suggests the nearest).
        """
        known, count = list(self.config.labels), self.num_classes
        ids = []
        for name in names:
            if isinstance(name, str):
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1, 0.0)
                    hint = f"; the nearest is {near[0]!r}" if near else "; this pipeline has no class names"
                    raise ValueError(f"no class {name!r}{hint}")
                name = known.index(name)
            if not 0 <= name < count:
                raise ValueError(f"no class {name}: this model has {count}")
            ids.append(name)
        return ids

    @property
    def num_classes(self) -> int:
        """Classes that can be asked for; 0: unconditional."""
        return num_classes(self.denoiser)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[str | int] | None = None,
        *,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image for each label.

        Args:
            class_labels: names or numbers; None for an unconditional model, which makes `num_images`.
            height, width: of the model's input (latents where there is a VAE); None: `sample_size`.
            guidance_scale: 1 leaves guidance and its second half of the batch out.
            num_inference_steps: calls of the model.
            generator: where the noise comes from; a list: one for each image. latents: the noise itself instead.
            output_type: "pil", "np", "pt" (in [0, 1]), or "latent" (what the model made).
        Returns: `.images`.
        Raises:
            ValueError: labels missing or unknown.
        """
        config, device, dtype = self.denoiser.config, self._execution_device, self.denoiser.dtype
        if (class_labels is None) != (self.num_classes == 0):
            raise ValueError(
                "class_labels: this model "
                + ("needs one for each image" if class_labels is None else "is unconditional")
            )
        labels = None
        if class_labels is not None:
            num_images = len(class_labels)
            labels = torch.tensor(self.label_ids(class_labels), device=device)
        shape = (
            num_images,
            config.in_channels,
            height or config.sample_size,
            width or config.sample_size,
        )
        x = latents if latents is not None else randn_tensor(shape, generator, device, dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        scales = hasattr(self.scheduler, "scale_model_input")  # flow matching's schedulers need not
        x = x.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        # torch.compiler.disable, which diffusers has around progress_bar, is typed as any of its own results
        for time in self.progress_bar(self.scheduler.timesteps):  # pyright: ignore[reportGeneralTypeIssues]
            scaled = self.scheduler.scale_model_input(x, time) if scales else x
            x = self.scheduler.step(self._predict(scaled, time, labels, guidance_scale), time, x).prev_sample
        self.maybe_free_model_hooks()
        if output_type == "latent":
            return ImagePipelineOutput(images=x) if return_dict else (x,)
        if self.vae is not None:
            x = decode(self.vae, x)
        images = self.image_processor.postprocess(x.float(), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: Tensor, time: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """The model's mean (a predicted variance is not used), pushed away from what it makes without a class."""
        channels, model, time = x.shape[1], self.denoiser, time.expand(len(x))
        if labels is None or guidance == 1:
            return model(x, time, labels).sample[:, :channels]
        both = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        found = model(x.repeat(2, 1, 1, 1), time.repeat(2), both).sample
        with_class, without = found[:, :channels].chunk(2)
        return torch.lerp(without, with_class, guidance)


class HybridDiTPipeline(ClassPipeline):
    """Images of classes from a transformer.

    Args:
        transformer: the model, ours or diffusers' DiT. scheduler: one of diffusers that agrees with what the model predicts.
        vae: decodes latents; None for a model of pixels in [-1, 1].
        labels: names of the classes, in their order.
    """

    part = "transformer"
    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: HybridDiT | DiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        self._keep(transformer, scheduler, vae, labels)


class UNetPipeline(ClassPipeline):
    """As `HybridDiTPipeline`, for a UNet; where it knows classes its last one means "any"."""

    part = "unet"
    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | AutoencoderDC | None = None,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        self._keep(unet, scheduler, vae, labels)


def num_classes(model: Any) -> int:
    """Classes that a denoiser knows, besides the one that means any."""
    config = model.config
    if isinstance(model, DiTTransformer2DModel):
        return config.num_embeds_ada_norm
    if isinstance(model, UNet2DModel):
        return (config.num_class_embeds or 1) - 1
    return config.num_classes
