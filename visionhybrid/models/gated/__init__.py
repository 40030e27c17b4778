"""What RAVLT and MALA share: blocks of a gated token mixer and a convolutional MLP, linear in the first two stages.

A system that follows this plan brings its linear mixer (a subclass of `GatedMixer`) and subclasses `GatedBackbone`; `convert` and
`options` read the checkpoints of all.

Different here: rotary angles are made for each map in float32, not stored (`layers.N.RoPE.angle` is dropped on loading), and the
scales of the residuals are vectors, which timm's optimisers therefore do not decay.
"""

from visionhybrid.models.gated.keys import checkpoint_filter_fn, convert, options, proj_dim
from visionhybrid.models.gated.model import GatedBackbone, GatedBlock, GatedMixer, SoftmaxMixer, normalised

__all__ = [
    "CFG",
    "TAPS",
    "GatedBackbone",
    "GatedBlock",
    "GatedMixer",
    "SoftmaxMixer",
    "checkpoint_filter_fn",
    "convert",
    "normalised",
    "options",
    "proj_dim",
]

# timm's description of a classifier of this family, and how features are tapped.
CFG = dict(
    input_size=(3, 224, 224),
    pool_size=(7, 7),
    crop_pct=224 / 256,
    interpolation="bicubic",
    first_conv="stem.0.conv",
    classifier="head.fc",
)
TAPS = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
