"""The variational bound of a diffusion model that predicts, beside the noise, how certain each step is.

Nichol and Dhariwal, arXiv:2102.09672 eq. 15 and 16: the second half of the output says where the logarithm of the variance of a step
lies between that of the posterior and that of the forward process. The bound teaches it, and only it: the mean is held still.
DiT (arXiv:2212.09748; facebookresearch/DiT@ed81ce2 `diffusion/gaussian_diffusion.py`) adds it to the squared error with weight one.
Different here: the normal distribution's own integral, where DiT takes an approximation by tanh.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

BIN = 1 / 255  # half the step between two values of an image in [-1, 1]


class Bound:
    """
    Args:
        kept: (T,) share of the image's power at each time, diffusers' `alphas_cumprod`.
    """

    def __init__(self, kept: Tensor) -> None:
        kept = kept.double()
        before = torch.cat([kept.new_ones(1), kept[:-1]])
        beta = 1 - kept / before
        posterior = beta * (1 - before) / (1 - kept)
        posterior[0] = posterior[1]  # at time 0 it is zero
        columns = (
            kept.rsqrt(),
            (1 / kept - 1).sqrt(),
            beta * before.sqrt() / (1 - kept),
            (1 - before) * (kept / before).sqrt() / (1 - kept),
            posterior.log(),
            beta.log(),
        )
        self.table = torch.stack(columns, 1).float()  # (T, 6)

    def __call__(self, output: Tensor, image: Tensor, noised: Tensor, times: Tensor) -> Tensor:
        """(B,): bits for each number, of the step from `times` (whole) on.

        Args:
            output: (B, 2 C, ...), noise and the place of the log variance, -1 the posterior's and 1 the forward process's.
            image, noised: (B, C, ...).
        """
        noise, place = output.float().chunk(2, 1)
        row = self.table.to(image.device)[times.long()]
        scale, share, of_image, of_noised, low, high = (
            value.view(-1, *[1] * (image.ndim - 1)) for value in row.unbind(1)
        )
        mean = of_image * (scale * noised - share * noise.detach()) + of_noised * noised
        log_variance = torch.lerp(low, high, (place + 1) / 2)
        wanted = of_image * image + of_noised * noised
        apart = (log_variance - low) - 1 + (low - log_variance).exp()
        divergence = 0.5 * (apart + (wanted - mean).square() * (-log_variance).exp())
        bits = torch.where(
            times.view(share.shape) == 0, -_log_likelihood(image, mean, log_variance), divergence
        )
        return bits.flatten(1).mean(1) / log(2)


def _log_likelihood(image: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of 8-bit values in [-1, 1] under a normal distribution; the outermost take what lies beyond."""
    apart, inverse = image - mean, (-0.5 * log_variance).exp()
    above, below = (torch.special.ndtr(inverse * (apart + side)) for side in (BIN, -BIN))
    above = torch.where(image > 0.999, 1.0, above)
    below = torch.where(image < -0.999, 0.0, below)
    return (above - below).clamp_min(1e-12).log()
