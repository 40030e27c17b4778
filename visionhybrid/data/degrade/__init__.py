"""How good pictures are made bad, so that a network can learn the way back.

Three layers: operations on batches (`filter2d`, `unsharp_mask`, `add_gaussian_noise`, `add_poisson_noise`, `jpeg`, kernels),
plans that record which operations run with which parameters (`Step`, `apply`, `to_json`), and recipes that draw plans
from a seed (`Bicubic`, `Noise`, `Jpeg`, `SecondOrder`). `preview` draws a sheet.
"""

from visionhybrid.data.degrade.compression import jpeg, jpeg_codec
from visionhybrid.data.degrade.filters import filter2d, reflect_pad, unsharp_mask
from visionhybrid.data.degrade.kernels import BELLS, bell_kernel, make_kernel, sinc_kernel
from visionhybrid.data.degrade.noise import add_gaussian_noise, add_poisson_noise
from visionhybrid.data.degrade.plan import OPERATIONS, Plan, Step, apply, from_json, to_json, trace
from visionhybrid.data.degrade.recipes import (
    FIRST,
    SECOND,
    Bicubic,
    Degradation,
    Jpeg,
    Noise,
    SecondOrder,
    Stage,
)
from visionhybrid.data.degrade.sheet import preview

__all__ = [
    "BELLS",
    "FIRST",
    "OPERATIONS",
    "SECOND",
    "Bicubic",
    "Degradation",
    "Jpeg",
    "Noise",
    "Plan",
    "SecondOrder",
    "Stage",
    "Step",
    "add_gaussian_noise",
    "add_poisson_noise",
    "apply",
    "bell_kernel",
    "filter2d",
    "from_json",
    "jpeg",
    "jpeg_codec",
    "make_kernel",
    "preview",
    "reflect_pad",
    "sinc_kernel",
    "to_json",
    "trace",
    "unsharp_mask",
]
