"""Blur kernels of the Real-ESRGAN degradation: six bell-shaped families and the circular low-pass ("sinc").

With m = (x, y) S^-1 (x, y)^T on a grid centred at 0 (x = column, y = row) and S = R(theta) diag(sigma_x^2, sigma_y^2)
R(theta)^T: Gaussian exp(-m/2), generalised exp(-m^beta / 2), plateau 1 / (1 + m^beta). All kernels sum to 1, float64.

Source: arXiv:2107.10833 section 3.2; XPixelGroup/BasicSR@8d56e3a `basicsr/data/degradations.py` for the conventions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BELLS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


def bell_kernel(
    kind: str, size: int, sigma_x: float, sigma_y: float | None = None, theta: float = 0.0, beta: float = 1.0
) -> Tensor:
    """A blur kernel (size, size) of one of the families in `BELLS`, float64, sum 1.

    Args:
        size: side in pixels, odd.
        sigma_x, sigma_y: widths in pixels along the rotated axes; the "_iso" kinds and "iso" use only `sigma_x`.
        theta: rotation in radians, ignored by the isotropic kinds.
        beta: exponent of the generalised and plateau kinds, ignored by "iso" and "aniso".
    Raises: ValueError: unknown kind, even size, a width or exponent that is not positive.
    """
    if kind not in BELLS:
        raise ValueError(f"bell_kernel: no kind {kind!r}; have {', '.join(BELLS)}")
    if kind.endswith("aniso"):
        sigma_y = sigma_x if sigma_y is None else sigma_y
    else:
        sigma_y, theta = sigma_x, 0.0
    if min(sigma_x, sigma_y, beta) <= 0:
        raise ValueError(f"bell_kernel: sigmas and beta must be positive, got {sigma_x}, {sigma_y}, {beta}")
    x, y = _grid("bell_kernel", size)
    # Coordinates along the kernel's own axes: R(theta)^T (x, y).
    along = math.cos(theta) * x + math.sin(theta) * y
    across = -math.sin(theta) * x + math.cos(theta) * y
    m = (along / sigma_x) ** 2 + (across / sigma_y) ** 2
    if kind.startswith("plateau"):
        kernel = 1 / (1 + m**beta)
    else:
        kernel = torch.exp(-0.5 * (m**beta if kind.startswith("generalized") else m))
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float, size: int, *, pad_to: int = 0) -> Tensor:
    """Ideal circular low-pass c J1(c r) / (2 pi r), (size, size) or zero-padded to (pad_to, pad_to), float64, sum 1.

    Args:
        cutoff: angular frequency in (0, pi], radians per pixel.
        size: side in pixels, odd; so is `pad_to` unless 0.
    """
    if not 0 < cutoff <= math.pi:
        raise ValueError(f"sinc_kernel: cutoff must be in (0, pi], got {cutoff}")
    x, y = _grid("sinc_kernel", size)
    r = torch.hypot(x, y)
    centre = size // 2
    # Any finite value will do at r = 0: it is replaced by the limit.
    r[centre, centre] = 1
    kernel = cutoff * _bessel_j1(cutoff * r) / (2 * math.pi * r)
    kernel[centre, centre] = cutoff**2 / (4 * math.pi)
    return centre_pad(kernel / kernel.sum(), max(size, pad_to))


def identity_kernel() -> Tensor:
    """The 1x1 kernel that leaves an image as it is, float64."""
    return torch.ones(1, 1, dtype=torch.float64)


def make_kernel(spec: dict[str, Any]) -> Tensor:
    """The kernel that a JSON-able description names: {"kind": ..., and the arguments of its function}.

    Kinds: those of `BELLS`, "sinc" and "identity".
    """
    rest = {name: value for name, value in spec.items() if name != "kind"}
    kind = spec["kind"]
    if kind == "sinc":
        return sinc_kernel(**rest)
    if kind == "identity":
        return identity_kernel(**rest)
    return bell_kernel(kind, **rest)


def centre_pad(kernel: Tensor, size: int) -> Tensor:
    """`kernel` in the middle of zeros, (size, size)."""
    margin, odd = divmod(size - kernel.shape[-1], 2)
    if margin < 0 or odd:
        raise ValueError(f"centre_pad: cannot centre a kernel of side {kernel.shape[-1]} in {size}")
    return F.pad(kernel, (margin,) * 4)


def _bessel_j1(x: Tensor) -> Tensor:
    """J1(x), the mean of cos(t - x sin t) over a period, which equidistant t give exactly once there are more than |x|.

    `torch.special.bessel_j1` is off by 5e-7 just above 5 (torch 2.15).
    """
    points = 64 + 2 * math.ceil(x.abs().max().item())
    t = torch.arange(points, dtype=x.dtype) * (2 * math.pi / points)
    return torch.cos(t - x.unsqueeze(-1) * t.sin()).mean(-1)


def _grid(who: str, size: int) -> tuple[Tensor, Tensor]:
    """Column and row offsets from the centre, each (size, size)."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{who}: size must be odd and positive, got {size}")
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    return x, y
