"""What a generative model is trained to predict: how images are noised, which target, and how much each time counts.

Flow matching (arXiv:2210.02747, in SD3's words arXiv:2403.03206) mixes x_s = (1 - s) x + s n and predicts n - x. Diffusion
(arXiv:2006.11239) mixes x_t = sqrt(a_t) x + sqrt(1 - a_t) n and predicts n, or v = sqrt(a_t) n - sqrt(1 - a_t) x
(arXiv:2202.00512). Times that a model sees run from 0 (clean) to 1000 (noise), as diffusers' schedulers count them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from visionhybrid.train.config import ConfigError, Diffusion
from visionhybrid.train.variance import Bound

TIMES = 1000


class Noising(Protocol):
    """x and noise: (B, ...); times: float32 (B,). `bound`: what teaches a variance, if the model gives one."""

    @property
    def bound(self) -> Bound | None: ...

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Times of training."""
        ...

    def spread(self, count: int) -> Tensor:
        """`count` times evenly over the range, for a validation without chance."""
        ...

    def noised(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...

    def target(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...

    def weight(self, times: Tensor) -> Tensor:
        """(B,), of the squared error."""
        ...

    def scheduler(self) -> Any:
        """diffusers' scheduler that samples from a model trained so."""
        ...


def noising(config: Diffusion, scheduler: Any = None) -> Noising:
    """What `config` says; with predict="pipeline" what the scheduler of a pipeline says.

    Raises: ConfigError: settings that contradict each other, or a scheduler that stands for another kind of noise.
    """
    if (config.predict == "pipeline") != (scheduler is not None):
        raise ConfigError("diffusion.predict: 'pipeline' is for model.pipeline, and nothing else is")
    if scheduler is not None:
        return _of_scheduler(config, scheduler)
    return Flow(config) if config.predict == "flow" else Markov(config)


# What diffusers' schedulers of diffusion say about the noise that a model was trained with.
_BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)


def _of_scheduler(config: Diffusion, scheduler: Any) -> Noising:
    facts, name = scheduler.config, type(scheduler).__name__
    if config.shift != 1:
        raise ConfigError("diffusion.shift: with a pipeline its scheduler says it")
    if name.startswith("FlowMatch") or facts.get("use_flow_sigmas"):
        # a shift that depends on the size of the image is the sampler's
        shift = 1.0 if facts.get("use_dynamic_shifting") else facts.get("shift", facts.get("flow_shift", 1.0))
        return Flow(replace(config, predict="flow", shift=float(shift)))
    kinds: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
    predict = kinds.get(facts.get("prediction_type", ""))
    if predict is None or not hasattr(scheduler, "alphas_cumprod"):
        raise ConfigError(f"model.pipeline: {name} is no scheduler of noise, v or flow prediction known here")
    from diffusers import DDIMScheduler

    given = {name: facts[name] for name in _BETAS if facts.get(name) is not None}
    return Markov(replace(config, predict=predict), DDIMScheduler(**given))


class Flow:
    """Flow matching: x_t = (1 - t) x + t noise; the velocity, noise - x, is predicted."""

    bound = None

    def __init__(self, config: Diffusion) -> None:
        if config.variance != "fixed":
            raise ConfigError("diffusion.variance: flow has none to learn")
        if config.min_snr is not None:
            raise ConfigError("diffusion.min_snr: belongs to predict=epsilon or v, not to flow")
        if config.shift <= 0:
            raise ConfigError(f"diffusion.shift: expected more than 0, got {config.shift}")
        self.config = config

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        c = self.config
        if c.times == "uniform":
            s = torch.rand(count, generator=generator)
        else:
            s = torch.sigmoid(c.logit_mean + c.logit_std * torch.randn(count, generator=generator))
        return self._shifted(s) * TIMES

    def _shifted(self, s: Tensor) -> Tensor:
        return self.config.shift * s / (1 + (self.config.shift - 1) * s)

    def spread(self, count: int) -> Tensor:
        return (torch.arange(count) + 0.5) / count * TIMES

    def noised(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return torch.lerp(x, noise, _like(times / TIMES, x))

    def target(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - x

    def weight(self, times: Tensor) -> Tensor:
        return torch.ones_like(times)

    def scheduler(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=self.config.shift)


class Markov:
    """Whole times from 0 to 999. `ddim` has the betas, those of the config by default."""

    def __init__(self, config: Diffusion, ddim: Any = None) -> None:
        if config.times != "uniform" or config.shift != 1:
            raise ConfigError(f"diffusion: times and shift belong to predict=flow, not to {config.predict}")
        if config.variance == "learned" and config.predict != "epsilon":
            raise ConfigError("diffusion.variance: 'learned' belongs to predict=epsilon")
        from diffusers import DDIMScheduler

        self.config = config
        self.ddim: Any = ddim or DDIMScheduler(
            num_train_timesteps=TIMES,
            beta_schedule=config.betas,
            beta_start=config.beta_range[0],
            beta_end=config.beta_range[1],
            prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[config.predict],
            clip_sample=False,
            set_alpha_to_one=False,
        )
        self.bound = Bound(self.ddim.alphas_cumprod) if config.variance == "learned" else None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.ddim.config.num_train_timesteps, (count,), generator=generator).float()

    def spread(self, count: int) -> Tensor:
        return ((torch.arange(count) + 0.5) / count * self.ddim.config.num_train_timesteps).floor()

    def noised(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.ddim.add_noise(x, noise, times.long())

    def target(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise if self.config.predict == "epsilon" else self.ddim.get_velocity(x, noise, times.long())

    def weight(self, times: Tensor) -> Tensor:
        """min(SNR, gamma) / SNR for noise, / (SNR + 1) for v (arXiv:2303.09556 eq. 6 and its appendix)."""
        if self.config.min_snr is None:
            return torch.ones_like(times)
        kept = self.ddim.alphas_cumprod.to(times.device)[times.long()]
        snr = kept / (1 - kept)
        return snr.clamp(max=self.config.min_snr) / (snr + (self.config.predict == "v"))

    def scheduler(self) -> Any:
        return type(self.ddim).from_config(self.ddim.config)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The mean of `squared_errors` over the batch."""
    return squared_errors(prediction, target, weight).mean()


def squared_errors(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """(B,): weight * mean squared error of each image, in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1) * weight
