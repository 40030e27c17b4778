"""Linear filtering with mirrored borders, and the unsharp mask."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def filter2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each image with its kernel: (B, C, H, W), (k, k) or (B, k, k), k odd -> (B, C, H, W).

    Borders are mirrored without repeating the edge pixel (OpenCV's reflect 101), as often as needed, so images may be
    smaller than the kernel. All channels share the kernel, which is converted to the dtype of `x`.
    """
    k = kernel.shape[-1]
    if kernel.ndim not in (2, 3) or kernel.shape[-2] != k or k % 2 == 0:
        raise ValueError(f"filter2d: kernels must be square with an odd side, got {tuple(kernel.shape)}")
    if x.ndim != 4 or (kernel.ndim == 3 and len(kernel) != len(x)):
        raise ValueError(
            f"filter2d: expected (B, C, H, W) and (k, k) or (B, k, k), got {tuple(x.shape)}, {tuple(kernel.shape)}"
        )
    batch = len(x)
    padded = reflect_pad(reflect_pad(x, k // 2, k // 2, -2), k // 2, k // 2, -1)
    # Channels become the batch and images the groups: (C, B, H, W), one kernel per group.
    weight = kernel.to(x).expand(batch, k, k).unsqueeze(1)
    return F.conv2d(padded.transpose(0, 1), weight, groups=batch).transpose(0, 1)


def unsharp_mask(x: Tensor, *, amount: float = 0.5, radius: int = 50, threshold: float = 10) -> Tensor:
    """Sharpen (B, C, H, W) in [0, 1] where it differs from its own blur by more than `threshold` 8-bit levels.

    The blur is a Gaussian of odd side radius + 1 (radius 50: 51, sigma 8) and also softens the mask. The defaults are
    those of Real-ESRGAN, whose ground truth is sharpened this way before it is degraded.
    """
    weight = _gaussian(radius + 1 - radius % 2).to(x)
    residual = x - _separable(x, weight)
    mask = _separable((residual.abs() * 255 > threshold).to(x.dtype), weight)
    sharp = (x + amount * residual).clamp(0, 1)
    return mask * sharp + (1 - mask) * x


def reflect_pad(x: Tensor, before: int, after: int, axis: int) -> Tensor:
    """Mirror `axis` without repeating the edge, as often as needed (a side of 1 is repeated)."""
    n = x.shape[axis]
    index = torch.arange(-before, n + after, device=x.device)
    if n == 1:
        index = torch.zeros_like(index)
    else:
        index = index.remainder(2 * (n - 1))
        index = torch.minimum(index, 2 * (n - 1) - index)
    return x.index_select(axis, index)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept for calls that autograd records
def _gaussian(size: int) -> Tensor:
    # OpenCV's rule for the sigma that belongs to a kernel size (getGaussianKernel).
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    offset = torch.arange(size, dtype=torch.float64) - size // 2
    weight = torch.exp(-(offset**2) / (2 * sigma**2))
    return weight / weight.sum()


def _separable(x: Tensor, weight: Tensor) -> Tensor:
    """Correlate both axes of (B, C, H, W) with one odd (k,) kernel."""
    k = len(weight)
    flat = x.flatten(0, 1).unsqueeze(1)  # (B*C, 1, H, W)
    flat = F.conv2d(reflect_pad(flat, k // 2, k // 2, -2), weight.view(1, 1, k, 1))
    flat = F.conv2d(reflect_pad(flat, k // 2, k // 2, -1), weight.view(1, 1, 1, k))
    return flat.view_as(x)
