"""A degradation as data: a list of named steps with recorded parameters, which can be stored, read and replayed.

    plan = SecondOrder(scale=4).draw(seed=7, size=(400, 400))   # decide everything
    low = apply(high, plan)                                      # (1, 3, 400, 400) -> (1, 3, 100, 100)
    text = to_json(plan); apply(high, from_json(text))           # the same bits again

Parameters are numbers, texts and lists of them. Values with one entry per image of the batch are lists as long as the
batch. Noise is recorded by the seed of its generator, so a replay is exact on the same kind of device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionhybrid.data.degrade import compression, filters, kernels, noise
from visionhybrid.data.resize import imresize

MODES = ("area", "bilinear", "bicubic")


class Step(NamedTuple):
    """One operation of `OPERATIONS` and its keyword arguments."""

    name: str
    params: dict[str, Any]


Plan = list[Step]


def apply(x: Tensor, plan: Sequence[Step]) -> Tensor:
    """Run every step of `plan` on (B, C, H, W) in [0, 1]; B is the batch that the plan was drawn for."""
    after = x
    for _, after in trace(x, plan):  # noqa: B007 - the last one counts
        pass
    return after


def trace(x: Tensor, plan: Sequence[Step]) -> Iterator[tuple[Step, Tensor]]:
    """Each step of `plan` with the images after it."""
    if x.ndim != 4:
        raise ValueError(f"apply: expected (B, C, H, W), got {tuple(x.shape)}")
    for step in plan:
        if step.name not in OPERATIONS:
            raise ValueError(f"apply: no operation {step.name!r}; have {', '.join(OPERATIONS)}")
        x = OPERATIONS[step.name](x, **step.params)
        yield step, x


def to_json(plan: Sequence[Step]) -> str:
    """`plan` as JSON text, one step a line."""
    return "[" + ",\n ".join(json.dumps(step._asdict()) for step in plan) + "]\n"


def from_json(text: str) -> Plan:
    """The plan that `to_json` wrote. Raises: ValueError: not such a text."""
    try:
        return [Step(entry["name"], dict(entry["params"])) for entry in json.loads(text)]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"from_json: not a degradation plan: {error}") from error


# ---- the operations: images and JSON-able parameters in, images out ------------------------------------------------


def sharpen(x: Tensor, amount: float = 0.5, radius: int = 50, threshold: float = 10) -> Tensor:
    return filters.unsharp_mask(x, amount=amount, radius=radius, threshold=threshold)


def blur(x: Tensor, kernel: list[dict[str, Any]]) -> Tensor:
    """`kernel`: one description per image, see `kernels.make_kernel`."""
    made = [kernels.make_kernel(spec) for spec in kernel]
    side = max(len(k) for k in made)
    if side == 1:
        return x
    return filters.filter2d(x, torch.stack([kernels.centre_pad(k, side) for k in made]))


def resize(x: Tensor, mode: str, factor: float | None = None, size: list[int] | None = None) -> Tensor:
    """PyTorch's `interpolate` without antialiasing, to `size` (H, W) or by `factor`, which then also sets the sampling."""
    if mode not in MODES:
        raise ValueError(f"resize: no mode {mode!r}; have {', '.join(MODES)}")
    return F.interpolate(x, size=None if size is None else tuple(size), scale_factor=factor, mode=mode)


def bicubic(x: Tensor, scale: float, eight_bit: bool = False) -> Tensor:
    """MATLAB's antialiased bicubic of the image as it is, or of its 8-bit version (rounding after each axis)."""
    if not eight_bit:
        return imresize(x, scale)
    levels = (x * 255).round().clamp(0, 255).to(torch.uint8)
    return imresize(levels, scale).to(x) / 255


def gaussian_noise(x: Tensor, sigma: list[float], seed: int, gray: list[bool] | bool = False) -> Tensor:
    return noise.add_gaussian_noise(x, sigma, gray=gray, generator=_generator(x, seed))


def poisson_noise(x: Tensor, scale: list[float], seed: int, gray: list[bool] | bool = False) -> Tensor:
    return noise.add_poisson_noise(x, scale, gray=gray, generator=_generator(x, seed))


def raw_noise(x: Tensor, sigma: list[float], seed: int) -> Tensor:
    """Gaussian noise that is not clamped, as the denoising benchmarks define it; `sigma` in 8-bit levels."""
    field = torch.randn(x.shape, generator=_generator(x, seed), dtype=x.dtype, device=x.device)
    return x + field * torch.tensor(sigma).to(x).view(-1, 1, 1, 1) / 255


def jpeg_tensor(x: Tensor, quality: list[float]) -> Tensor:
    return compression.jpeg(x.clamp(0, 1), quality)


def jpeg_codec(x: Tensor, quality: list[int]) -> Tensor:
    return torch.stack([compression.jpeg_codec(image, q) for image, q in zip(x, quality, strict=True)])


def round_to_8_bits(x: Tensor) -> Tensor:
    return (x * 255).round().clamp(0, 255) / 255


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "sharpen": sharpen,
    "blur": blur,
    "resize": resize,
    "bicubic": bicubic,
    "gaussian_noise": gaussian_noise,
    "poisson_noise": poisson_noise,
    "raw_noise": raw_noise,
    "jpeg": jpeg_tensor,
    "jpeg_codec": jpeg_codec,
    "round": round_to_8_bits,
}


def _generator(x: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(seed)
