"""Pictures larger than a model was trained for, coarse to fine, with any diffusers pipeline that has an image-to-image sibling.

    visionhybrid.attach(pipe, "linfusion", weights="Yuanshi/LinFusion-1-5")
    image = HighResolution(pipe)("a lighthouse at dusk", height=4096, width=2048).images[0]

The first picture has about the model's own area; each further stage enlarges it (bicubic, twice each side), adds noise and
denoises the whole picture again (SDEdit, arXiv:2108.01073), with less strength the larger it is. The ladder and its strengths
are those of LinFusion (arXiv:2409.02097, github.com/Huage001/LinFusion): 512x1024 to 16K with Stable Diffusion 1.5.
Differences: pictures are not rounded to 8 bits between stages, and any size that the pipeline takes can be the last.

    frugal.py    what bounds the memory of a stage
    pipeline.py  the same as a pipeline class, for `custom_pipeline=`
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.diffusion.highres.frugal import frugal

__all__ = ["STRENGTHS", "HighResolution", "Stage", "ladder"]

# LinFusion's, for 2K, 4K, 8K and 16K
STRENGTHS = (0.4, 0.3, 0.2, 0.1)
Preview = Callable[["Stage", list[Any]], None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One picture of the ladder, in pixels; `strength` 1 is made from noise alone, `steps` are calls of the denoiser."""

    number: int
    height: int
    width: int
    strength: float
    steps: int


def ladder(
    height: int,
    width: int,
    *,
    native: int,
    multiple: int = 8,
    steps: int = 50,
    strengths: Sequence[float] = STRENGTHS,
    stages: int | None = None,
) -> list[Stage]:
    """The pictures to make on the way to (height, width), smallest first, each side about half the next one's.

    Args:
        native: side of the squares that the model was trained for. The first picture has at most twice their area.
        multiple: what sides must be divisible by.
        steps: of the first picture; a later one has the share `strength` of them.
        strengths: of the second picture, the third, ...; the last one stands for all that follow.
        stages: how many pictures instead; 1 makes the last one at once.
    Raises:
        ValueError: sides that do not divide, no stages, a strength outside (0, 1] or one that leaves no step.
    """
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise ValueError(f"highres: sides must be multiples of {multiple}, got {height}x{width}")
    if stages is None:
        stages = 1 + max(0, math.ceil(math.log2(math.sqrt(height * width) / native) - 0.5))
    if stages < 1 or steps < 1:
        raise ValueError(f"highres: needs one stage and one step at least, got {stages} and {steps}")
    if not strengths or not all(0 < s <= 1 for s in strengths):
        raise ValueError(f"highres: strengths are shares of the steps in (0, 1], got {tuple(strengths)}")
    found = []
    for number in range(stages):
        part = 2 ** (stages - 1 - number)
        sides = [max(1, round(side / part / multiple)) * multiple for side in (height, width)]
        strength = strengths[min(number, len(strengths)) - 1] if number else 1.0
        # as diffusers' image-to-image pipelines count them
        own = int(steps * strength)
        if own < 1:
            raise ValueError(f"highres: {steps} steps of strength {strength} are none; give more steps")
        found.append(Stage(number=number, height=sides[0], width=sides[1], strength=strength, steps=own))
    return found


class HighResolution:
    """Coarse to fine generation with the components of `pipe`, mixers, LoRA and adapters among them; nothing is copied.

    Args:
        pipe: a text-to-image pipeline (Stable Diffusion 1.5, 2.1, XL, each with ControlNet too, SD3, Flux, ...).
    Raises:
        ValueError: diffusers has no image-to-image pipeline of this kind.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe: Any = pipe
        self.refiner: Any = AutoPipelineForImage2Image.from_pipe(pipe)
        self._draws = set(inspect.signature(self.pipe.__call__).parameters)
        self._refines = set(inspect.signature(self.refiner.__call__).parameters)

    def plan(
        self,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 50,
        strengths: Sequence[float] = STRENGTHS,
        stages: int | None = None,
    ) -> list[Stage]:
        """The stages that a call with these arguments runs; see `ladder`."""
        denoiser = self.pipe.components.get("unet") or self.pipe.components["transformer"]
        scale, side = self.pipe.vae_scale_factor, denoiser.config.get("sample_size")
        side = getattr(self.pipe, "default_sample_size", None) or side  # Flux's config has none
        if not isinstance(side, int):
            side = min(side)
        return ladder(
            height,
            width,
            native=side * scale,
            multiple=self.pipe.image_processor.config.vae_scale_factor,
            steps=num_inference_steps,
            strengths=strengths,
            stages=stages,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int,
        width: int,
        num_inference_steps: int = 50,
        strengths: Sequence[float] = STRENGTHS,
        stages: int | None = None,
        tile: int | None = 2048,
        chunk_guidance: bool = True,
        chunk_tokens: int | None = 65536,
        preview: Preview | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> Any:
        """Generate at (height, width) pixels.

        Args:
            num_inference_steps, strengths, stages: see `ladder`.
            tile: side of the squares in which the VAE works on pictures that are larger; None: as it is set.
            chunk_guidance: from the second stage on, run the denoiser for one picture and one prompt at a time.
            chunk_tokens: from the second stage on, feed-forward networks take so many tokens at a time; None: all.
            preview: called with each stage and its pictures (PIL) as soon as they are there, the last ones too.
            output_type: "pil", "np" or "pt".
            call: arguments of the pipeline: `guidance_scale`, `negative_prompt`, `generator`, `callback_on_step_end` (of every
                stage), ... Those that its image-to-image sibling has too apply to all stages, others to the first; with
                ControlNet `image` is the control of all.
        Returns: the pipeline's output; a picture that its safety checker flagged at any stage is flagged.
        Raises:
            ValueError: see `ladder`; an unknown output type.
            TypeError: an argument that the pipeline does not have.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"highres: output_type is pil, np or pt, got {output_type!r}")
        reserved = {"strength", "return_dict", "denoising_start", "denoising_end"} & set(call)
        unknown = (set(call) - self._draws) | reserved
        if unknown:
            raise TypeError(f"highres: {type(self.pipe).__name__} takes no {', '.join(sorted(unknown))} here")
        plan = self.plan(
            height, width, num_inference_steps=num_inference_steps, strengths=strengths, stages=stages
        )
        progress, output, flagged = _Progress(self.pipe, self.refiner, plan, call), None, None
        try:
            for stage in plan:
                arguments = dict(
                    prompt=prompt, num_inference_steps=num_inference_steps, output_type="pt", **call
                )
                arguments.update(progress.arguments(stage))
                first = stage.number == 0
                with frugal(
                    self.pipe,
                    tile=tile,
                    one_by_one=chunk_guidance and not first,
                    chunk=None if first else chunk_tokens,
                ):
                    if first:
                        output = self.pipe(**arguments, height=stage.height, width=stage.width)
                    else:
                        output = self.refiner(**self._refining(arguments, stage, output.images))
                flags = getattr(output, "nsfw_content_detected", None)
                if flags is not None:
                    flagged = [a or b for a, b in zip(flags, flagged or flags, strict=True)]
                    output.nsfw_content_detected = flagged
                if preview is not None:
                    preview(stage, self._as(output.images, "pil"))
        finally:
            progress.close()
        # The refiner shares offloaded components but not the hooks that send them back.
        self.pipe.maybe_free_model_hooks()
        output.images = self._as(output.images, output_type)
        return output

    def _refining(self, arguments: Mapping[str, Any], stage: Stage, images: Tensor) -> dict[str, Any]:
        """Arguments of the refiner, which starts from `images` (B, 3, H, W) of the stage before."""
        known = {key: value for key, value in arguments.items() if key in self._refines and key != "latents"}
        if "control_image" in self._refines and "image" in arguments:
            known["control_image"] = arguments["image"]
        if "height" in self._refines:
            known.update(height=stage.height, width=stage.width)
        large = F.interpolate(images.float(), (stage.height, stage.width), mode="bicubic").clamp(0, 1)
        return {**known, "image": large, "strength": stage.strength}

    def _as(self, images: Tensor, kind: str) -> Any:
        """(B, 3, H, W) in [0, 1] as the images of a pipeline's output."""
        return self.pipe.image_processor.postprocess(images, kind, do_denormalize=[False] * len(images))


class _Progress:
    """One bar over the steps of all stages, in the pipeline's settings, instead of a bar for each."""

    def __init__(self, pipe: Any, refiner: Any, plan: Sequence[Stage], call: Mapping[str, Any]) -> None:
        self.pipe, self.plan, self.call = pipe, plan, call
        self.settings = dict(getattr(pipe, "_progress_bar_config", {}))
        self.bar = pipe.progress_bar(total=sum(stage.steps for stage in plan))
        for each in (pipe, refiner):
            each.set_progress_bar_config(disable=True)

    def arguments(self, stage: Stage) -> dict[str, Any]:
        """The callback that moves the bar and calls the caller's own."""
        own = self.call.get("callback_on_step_end")
        done = sum(earlier.steps for earlier in self.plan[: stage.number])
        self.bar.set_description(f"{stage.width}x{stage.height}")

        def step(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            # A scheduler of order 2 has two times for each step.
            self.bar.update(done + min((index + 1) // pipe.scheduler.order, stage.steps) - self.bar.n)
            return own(pipe, index, time, tensors) if own else tensors

        arguments: dict[str, Any] = {"callback_on_step_end": step}
        if hasattr(own, "tensor_inputs"):
            arguments["callback_on_step_end_tensor_inputs"] = own.tensor_inputs
        return arguments

    def close(self) -> None:
        self.bar.close()
        self.pipe.set_progress_bar_config(**self.settings)
