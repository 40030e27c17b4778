"""HAT, a Hybrid Attention Transformer for image restoration. arXiv:2205.04437 (CVPR 2023), extended in 2309.05239.

Official code: XPixelGroup/HAT@1638a9a `hat/archs/hat_arch.py` (Apache-2.0). A trunk of groups; each group is a run of blocks
(window attention beside a convolution branch with channel attention, then an MLP), one block whose queries see larger,
overlapping key windows, a convolution and a skip. What the code does and the paper does not say, kept because every published
weight needs it:

- the overlapping attention pads with zeros after the projection: keys outside the image take part with logit `bias`;
- its bias index is key minus query with a constant that makes it negative, and wraps around as Python indices do;
- shifted windows shift and mask even where the map is one window high;
- stochastic depth spares the convolution branch, and the overlapping block altogether;
- channel attention averages over the whole padded image; the result is not clamped; the input is not added to it.

Different here: both bias tables are stored as (heads, rows, columns) of key minus query, the overlapping one rolled to its
plain order, so nothing gathers with negative indices; masks and index tables are no buffers; any input size works; attention
never holds more than a window's weights; the residual stream stays in float32 under 16-bit weights or autocast.
Published PSNR on Y, Urban100 x4: HAT-S 27.87, HAT 27.97, with ImageNet pre-training HAT 28.37, HAT-L 28.60.
"""

from visionhybrid.models.hat.conv import ChannelAttentionConv
from visionhybrid.models.hat.model import (
    HAT,
    RGB_MEAN,
    Group,
    HybridBlock,
    OverlapBlock,
    WindowAttention,
)
from visionhybrid.models.hat.names import CFGS, SYSTEM, VARIANTS, WEIGHTS
from visionhybrid.models.hat.official import (
    BLOCK_RULES,
    RULES,
    convert,
    export_official,
    official_index,
    options,
    recognise,
    table_from_official,
    table_to_official,
)

__all__ = [
    "BLOCK_RULES",
    "CFGS",
    "HAT",
    "RGB_MEAN",
    "RULES",
    "SYSTEM",
    "VARIANTS",
    "WEIGHTS",
    "ChannelAttentionConv",
    "Group",
    "HybridBlock",
    "OverlapBlock",
    "WindowAttention",
    "convert",
    "export_official",
    "official_index",
    "options",
    "recognise",
    "table_from_official",
    "table_to_official",
]
