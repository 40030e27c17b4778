"""Coarse to fine generation as a pipeline: Stable Diffusion 1.5, 2.1 or XL read as one that takes large sizes.

    from diffusers import DiffusionPipeline
    from visionhybrid.diffusion import highres

    pipe = DiffusionPipeline.from_pretrained(
        "stabilityai/stable-diffusion-xl-base-1.0", custom_pipeline=highres.__path__[0], trust_remote_code=True
    )
    image = pipe("a lighthouse at dusk", height=4096, width=4096).images[0]

`height` and `width` have to be given.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor

from visionhybrid.diffusion.highres import HighResolution


class HighResolutionPipeline(DiffusionPipeline):
    """The components of Stable Diffusion, or of SDXL where there is a second text encoder; see `HighResolution`."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components: ClassVar[list[str]] = [
        "text_encoder_2",
        "tokenizer_2",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["safety_checker"]

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            requires_safety_checker=requires_safety_checker,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def __call__(self, prompt: str | list[str] | None = None, **call: Any) -> Any:
        """The arguments of `HighResolution`; height and width are required."""
        parts = dict(self.components)
        if self.text_encoder_2 is None:
            del parts["text_encoder_2"], parts["tokenizer_2"]
            base = StableDiffusionPipeline(
                **parts, requires_safety_checker=self.config.requires_safety_checker
            )
        else:
            del parts["safety_checker"]
            base = StableDiffusionXLPipeline(
                **parts, force_zeros_for_empty_prompt=self.config.force_zeros_for_empty_prompt
            )
        base.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        output = HighResolution(base)(prompt, **call)
        self.maybe_free_model_hooks()
        return output
