"""JPEG compression, twice: batched on tensors for synthetic training pairs, and through a real codec.

The tensor version is the lossy part of the standard (colour transform, 4:2:0, block DCT, quantisation) without entropy
coding. It reproduces a quirk of the published training code: both quantisation tables are the *transposes* of the
standard's, so horizontal and vertical frequencies are exchanged. Use `jpeg_codec` for what a file really looks like.

Source: ITU-T T.81 annexes A and K; XPixelGroup/BasicSR@8d56e3a `basicsr/utils/diffjpeg.py` for the quirk.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from visionhybrid.data.degrade.noise import PerImage

# T.81 table K.1, row = vertical frequency.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
# T.81 table K.2: this corner, 99 elsewhere.
CHROMINANCE_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def jpeg(x: Tensor, quality: PerImage) -> Tensor:
    """Compress and decompress (B, 3, H, W) in [0, 1]; same shape and dtype, in [0, 1].

    Args:
        quality: in (0, 100), a real number per image or one for all. Tables are multiplied by 50 / q below 50 and by
            2 - q / 50 from there, neither rounded nor clipped.
    Raises: ValueError: not three channels, or quality out of range.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"jpeg: expected (B, 3, H, W), got {tuple(x.shape)}")
    q = torch.as_tensor(quality, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
    if len(q) not in (1, len(x)) or not ((q > 0) & (q < 100)).all():
        raise ValueError(f"jpeg: quality must be one or {len(x)} numbers in (0, 100), got {quality}")
    factor = torch.where(q < 50, 50 / q, 2 - q / 50)
    height, width = x.shape[-2:]
    x = F.pad(x, (0, -width % 16, 0, -height % 16))
    luma, blue, red = torch.einsum("bchw,dc->dbhw", x * 255, torch.tensor(TO_YCBCR).to(x)).unsqueeze(2)
    tables = _tables(x.dtype, x.device)
    luma = _quantise(luma - 128, tables[0] * factor) + 128
    # Chroma is centred on 0 by the transform above, as the DCT wants it.
    blue, red = (
        F.interpolate(_quantise(F.avg_pool2d(c, 2), tables[1] * factor), scale_factor=2, mode="nearest")
        for c in (blue, red)
    )
    ycc = torch.cat([luma, blue, red], 1)
    rgb = torch.einsum("bchw,dc->bdhw", ycc, torch.tensor(TO_RGB).to(x))
    return (rgb.clamp(0, 255) / 255)[..., :height, :width]


def jpeg_codec(x: Tensor, quality: int) -> Tensor:
    """Round trip of one image (1 or 3, H, W) in [0, 1] through a JPEG file in memory (libjpeg by Pillow, 4:2:0).

    The classical artefact-removal tasks (quality 10, 20, 30, 40) are defined by such files.
    """
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"jpeg_codec: expected (1 or 3, H, W), got {tuple(x.shape)}")
    if not 1 <= quality <= 100 or quality != int(quality):
        raise ValueError(f"jpeg_codec: quality must be a whole number in 1..100, got {quality}")
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    decoded = torch.from_numpy(np.array(Image.open(file)))
    decoded = decoded[None] if decoded.ndim == 2 else decoded.permute(2, 0, 1)
    return decoded.to(x) / 255


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept for calls that autograd records
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    chrominance = torch.full((8, 8), 99.0)
    chrominance[:4, :4] = torch.tensor(CHROMINANCE_CORNER, dtype=torch.float32)
    # Transposed on purpose, see the module's docstring. (K.2 is symmetric.)
    luminance = torch.tensor(LUMINANCE).mT
    return luminance.to(device, dtype), chrominance.to(device, dtype)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept for calls that autograd records
def _dct(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal DCT-II, (frequency, position)."""
    k = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def _quantise(x: Tensor, table: Tensor) -> Tensor:
    """Round the 8x8 block DCT of (B, 1, H, W) to multiples of `table` ((B or 1), 1, 8, 8)."""
    batch, _, height, width = x.shape
    matrix = _dct(x.dtype, x.device)
    blocks = x.view(batch, height // 8, 8, width // 8, 8).transpose(2, 3)  # (B, rows, columns, 8, 8)
    table = table.unsqueeze(1)
    coefficients = (matrix @ blocks @ matrix.T / table).round() * table
    blocks = matrix.T @ coefficients @ matrix
    return blocks.transpose(2, 3).reshape(x.shape)
