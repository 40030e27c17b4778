"""Which numbers a field takes. A field that a task does not have is not looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from visionhybrid.train.config.common import Config, ConfigError
from visionhybrid.train.config.words import flat

_POSITIVE = """
loop.batch_size loop.epochs loop.steps loop.micro_batch loop.log_every loop.keep
optim.clip_norm optim.layer_decay guard.in_a_row eval_batch tile width
data.image_size data.repeat data.scale data.patch data.held_out_crop
augment.crop augment.erase_count diffusion.shift diffusion.logit_std sampling.steps cache.batch budget
"""
_NOT_NEGATIVE = """
loop.workers loop.validate_every loop.checkpoint_every optim.lr optim.weight_decay optim.eps optim.momentum
schedule.lag schedule.warmup schedule.warmup_lr schedule.min_lr schedule.cooldown schedule.gamma schedule.every
guard.spike guard.warm guard.rollbacks guard.corrupt data.num_classes data.cache_mb model.lora
augment.color_jitter augment.mixup augment.cutmix mesa mesa_start
pixel_weight perceptual_weight adversarial_weight diffusion.min_snr
sampling.guidance sampling.each sampling.classes sampling.judged text.hold_out text.max_length text.guidance
alone.steps alone.lr whole.steps whole.lr tune.steps tune.lr task_weight output_weight variance_weight feature_weight
"""
_SHARES = """
augment.flip augment.erase augment.mix_prob augment.mix_switch augment.smoothing flip diffusion.drop_label
"""
_RANGES = "augment.scale augment.ratio diffusion.beta_range"

# A NaN is in none of these.
_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (_POSITIVE, "more than 0", lambda value: value > 0),
    (_NOT_NEGATIVE, "0 or more", lambda value: value >= 0),
    (_SHARES, "a share in [0, 1]", lambda value: 0 <= value <= 1),
    (
        _RANGES,
        "two numbers above 0, the smaller first",
        lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1],
    ),
    ("loop.ema_decay", "a number in [0, 1)", lambda value: 0 <= value < 1),
    ("optim.betas", "two or three numbers in [0, 1)", lambda betas: len(betas) in (2, 3) and _shares(betas)),
)


def _shares(values: tuple[float, ...]) -> bool:
    return all(0 <= value < 1 for value in values)


def check_bounds(config: Config) -> None:
    """Raises: ConfigError naming the first field whose number cannot be meant."""
    values = flat(config)
    for names, expected, fits in _RULES:
        for name in names.split():
            value = values.get(name)
            if value is not None and not fits(value):
                raise ConfigError(f"{name}: expected {expected}, got {value}")
