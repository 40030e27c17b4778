"""What the sections share: pictures as data URIs, times and counts in words."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

NAMES = {"softmax": "softmax", "linfusion": "LinFusion", "sla": "SLA"}
CC_BY = "https://creativecommons.org/licenses/by/2.0/"


def picture(pixels: Tensor, *, lossy: bool = False) -> str:
    """uint8 (3 or 4, H, W) as a data URI: PNG, or JPEG where every pixel need not be exact."""
    data = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(data, **({"format": "JPEG", "quality": 85} if lossy else {"format": "PNG", "optimize": True}))
    kind = "jpeg" if lossy else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def clock(seconds: float) -> str:
    """Minutes and seconds: 4:07."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def amount(parameters: int) -> str:
    """31763368 -> "31.76 million"."""
    return f"{parameters / 1e6:.2f} million" if parameters >= 1e6 else f"{parameters / 1e3:.0f} thousand"
