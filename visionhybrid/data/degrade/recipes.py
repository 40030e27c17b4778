"""What to degrade an image with: distributions from which a plan is drawn.

`Bicubic`, `Noise` and `Jpeg` make the classical benchmarks; `SecondOrder` is the blind-restoration model of Real-ESRGAN
with the values of HAT's published real-world options. All are frozen, and `draw` is a pure function of its seed.

The published code draws some decisions once per batch (which resize, which noise, ...), because a batch must keep one
shape on the GPU, and then mixes batches through a pool of 180 earlier pairs. Such a pool is history: a run could not be
resumed exactly without storing it. Here a plan is drawn per image (batch = 1, in a data-loading worker), so every image of a
batch differs anyway, which is what the pool approximates. `draw(batch=B)` still gives the published grouping.

Source: arXiv:2107.10833; XPixelGroup/HAT@1638a9a options/train/train_Real_HAT_SRx4_mse_model.yml.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from visionhybrid.data.degrade.kernels import BELLS
from visionhybrid.data.degrade.plan import MODES, Plan, Step

Range = tuple[float, float]
KERNEL_SIZES = tuple(range(7, 22, 2))


class Degradation(Protocol):
    """Anything that can say what to do to a batch of images of one size."""

    @property
    def scale(self) -> int:
        """How many times smaller the result is, per side."""
        ...

    def draw(self, seed: int, *, size: tuple[int, int], batch: int = 1) -> Plan:
        """All decisions for `batch` images of `size` (H, W), multiples of `scale`."""
        ...


@dataclass(frozen=True)
class Bicubic:
    """MATLAB's antialiased bicubic by 1/scale: the low-resolution images of the super-resolution tables.

    `eight_bit` gives exactly the 8-bit image that MATLAB makes of an 8-bit one, as the published data sets hold it;
    otherwise the result is neither rounded nor clipped (as in HAT's ImageNet pre-training).
    """

    scale: int = 4
    eight_bit: bool = False
    # Low-quality pixels around a crop that its own depend on: the kernel reaches 2 from a pixel's centre.
    margin: ClassVar[int] = 2

    def draw(self, seed: int, *, size: tuple[int, int], batch: int = 1) -> Plan:
        return [Step("bicubic", {"scale": 1 / self.scale, "eight_bit": self.eight_bit})]


@dataclass(frozen=True)
class Noise:
    """White Gaussian noise, not clamped; `sigma` in 8-bit levels, a number or the range it is drawn from per image."""

    sigma: float | Range = 25.0
    scale: int = 1
    margin: ClassVar[int] = 0

    def draw(self, seed: int, *, size: tuple[int, int], batch: int = 1) -> Plan:
        rng = random.Random(seed)
        low, high = self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)
        sigma = [rng.uniform(low, high) for _ in range(batch)]
        return [Step("raw_noise", {"sigma": sigma, "seed": rng.getrandbits(63)})]


@dataclass(frozen=True)
class Jpeg:
    """A real JPEG file; `quality` is a number or the choices it is drawn from per image."""

    quality: int | tuple[int, ...] = (10, 20, 30, 40)
    scale: int = 1
    margin: ClassVar[int] = 0

    def draw(self, seed: int, *, size: tuple[int, int], batch: int = 1) -> Plan:
        rng = random.Random(seed)
        choices = self.quality if isinstance(self.quality, tuple) else (self.quality,)
        return [Step("jpeg_codec", {"quality": [rng.choice(choices) for _ in range(batch)]})]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the two rounds of `SecondOrder`. Probabilities in [0, 1]; sigma of blur in pixels, of noise in 8-bit levels."""

    blur_prob: float  # per batch
    blur_sigma: Range
    resize_prob: tuple[float, float, float]  # up, down, keep
    resize_factor: Range  # up: U[1, second], down: U[first, 1]
    noise_sigma: Range
    poisson_scale: Range
    sinc_prob: float = 0.1
    kernel_prob: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)  # of BELLS
    beta_generalized: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    gaussian_prob: float = 0.5  # else Poisson
    gray_prob: float = 0.4
    jpeg_quality: Range = (30.0, 95.0)


FIRST = Stage(
    blur_prob=1.0,
    blur_sigma=(0.2, 3.0),
    resize_prob=(0.2, 0.7, 0.1),
    resize_factor=(0.15, 1.5),
    noise_sigma=(1.0, 30.0),
    poisson_scale=(0.05, 3.0),
)
SECOND = Stage(
    blur_prob=0.8,
    blur_sigma=(0.2, 1.5),
    resize_prob=(0.3, 0.4, 0.3),
    resize_factor=(0.3, 1.2),
    noise_sigma=(1.0, 25.0),
    poisson_scale=(0.05, 2.5),
)


@dataclass(frozen=True, kw_only=True)
class SecondOrder:
    """Blur, resize, noise and JPEG, twice, with a final low-pass; the result is rounded to 8 bits.

    Per batch: which resize and its factor and mode, the noise family, whether the second blur happens, the final order.
    Per image: kernels, strengths, gray flags, JPEG qualities. `sharpen` starts from the unsharp-masked image, as all
    published runs do.
    """

    scale: int = 4
    first: Stage = FIRST
    second: Stage = SECOND
    final_sinc_prob: float = 0.8
    sharpen: bool = True

    def draw(self, seed: int, *, size: tuple[int, int], batch: int = 1) -> Plan:
        rng = random.Random(seed)
        plan = [Step("sharpen", {})] if self.sharpen else []
        plan += self._blur(rng, self.first, batch)
        # Named by factor: as published, the sampling grid of this resize uses the factor itself, not the rounded size.
        factor = max(_factor(rng, self.first), 1 / min(size))
        plan.append(Step("resize", {"factor": factor, "mode": rng.choice(MODES)}))
        plan += [_noise(rng, self.first, batch), _jpeg(rng, self.first, batch)]
        plan += self._blur(rng, self.second, batch)
        factor = _factor(rng, self.second)
        target = [max(1, int(side / self.scale * factor)) for side in size]
        plan.append(Step("resize", {"size": target, "mode": rng.choice(MODES)}))
        plan.append(_noise(rng, self.second, batch))
        compress = [_jpeg(rng, self.second, batch)]
        final = [max(1, side // self.scale) for side in size]
        shrink = [
            Step("resize", {"size": final, "mode": rng.choice(MODES)}),
            Step("blur", {"kernel": [self._final_kernel(rng) for _ in range(batch)]}),
        ]
        plan += shrink + compress if rng.random() < 0.5 else compress + shrink
        return [*plan, Step("round", {})]

    def _blur(self, rng: random.Random, stage: Stage, batch: int) -> Plan:
        kernel = [_kernel(rng, stage) for _ in range(batch)]
        return [Step("blur", {"kernel": kernel})] if rng.random() < stage.blur_prob else []

    def _final_kernel(self, rng: random.Random) -> dict[str, Any]:
        if rng.random() >= self.final_sinc_prob:
            return {"kind": "identity"}
        return {
            "kind": "sinc",
            "size": rng.choice(KERNEL_SIZES),
            "cutoff": rng.uniform(math.pi / 3, math.pi),
        }


def _kernel(rng: random.Random, stage: Stage) -> dict[str, Any]:
    size = rng.choice(KERNEL_SIZES)
    if rng.random() < stage.sinc_prob:
        lowest = math.pi / 3 if size < 13 else math.pi / 5
        return {"kind": "sinc", "size": size, "cutoff": rng.uniform(lowest, math.pi)}
    kind = rng.choices(BELLS, stage.kernel_prob)[0]
    spec = {"kind": kind, "size": size, "sigma_x": rng.uniform(*stage.blur_sigma)}
    if kind.endswith("aniso"):
        spec |= {"sigma_y": rng.uniform(*stage.blur_sigma), "theta": rng.uniform(-math.pi, math.pi)}
    if kind.startswith(("generalized", "plateau")):
        low, high = stage.beta_generalized if kind.startswith("generalized") else stage.beta_plateau
        # Half of the draws on either side of 1, whatever the range.
        spec["beta"] = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return spec


def _factor(rng: random.Random, stage: Stage) -> float:
    direction = rng.choices(("up", "down", "keep"), stage.resize_prob)[0]
    low, high = stage.resize_factor
    return {"up": rng.uniform(1, high), "down": rng.uniform(low, 1), "keep": 1.0}[direction]


def _noise(rng: random.Random, stage: Stage, batch: int) -> Step:
    gaussian = rng.random() < stage.gaussian_prob
    strength = stage.noise_sigma if gaussian else stage.poisson_scale
    values = [rng.uniform(*strength) for _ in range(batch)]
    params = {
        "sigma" if gaussian else "scale": values,
        "gray": [rng.random() < stage.gray_prob for _ in range(batch)],
        "seed": rng.getrandbits(63),
    }
    return Step("gaussian_noise" if gaussian else "poisson_noise", params)


def _jpeg(rng: random.Random, stage: Stage, batch: int) -> Step:
    return Step("jpeg", {"quality": [rng.uniform(*stage.jpeg_quality) for _ in range(batch)]})
