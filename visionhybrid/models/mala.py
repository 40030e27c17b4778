"""MAViT: magnitude-aware linear attention (MALA) in two stages, softmax attention in two. arXiv:2507.00698.

Official code: qhfan/MALA@7114e63, classfication_release/model.py (no licence file). Written from equations, checked against its
numbers (`mala_*` golden cases). All but the mixer is shared with RAVLT, see gated/.

Ordinary linear attention is blind to the length of a query. With q, k after elu + 1, z_i = q_i . mean_j k_j / sqrt(d), the rotary
embedding R, and L_i ordinary linear attention of the rotated features, sum_j (R_i q_i . R_j k_j) v_j / (N sqrt(d) (z_i + 1e-6)),

    out_i = (1 + z_i + 1e-6) L_i - z_i mean_j v_j

which is the official (1 + 1 / (z_i + 1e-6)) q_i^T KV - z_i mean v: scores that grow sharper with z and may be negative.

Published top-1 at 224: tiny 82.9, small 84.7, base 85.7, large 86.0.
"""

# No `from __future__ import annotations`: TorchScript compiles `attend`.

from functools import partial

from timm.models import register_notrace_module
from torch import Tensor

from visionhybrid.kernels.linear_attention.plain import features
from visionhybrid.kernels.precision import widened
from visionhybrid.models import gated
from visionhybrid.models.gated import GatedBackbone, GatedMixer, normalised
from visionhybrid.models.gated import checkpoint_filter_fn as checkpoint_filter_fn  # timm looks for it here
from visionhybrid.models.registry import State, System, register


@register_notrace_module
class MagnitudeAwareMixer(GatedMixer):
    """MALA, in float32 throughout: L_i and the mean nearly cancel, and z_i, of order sqrt(d), magnifies what is left."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        kind, wide = v.dtype, widened(v)
        scale = self.head_dim**-0.5
        q, k, v = features(q.to(wide), "elu"), features(k.to(wide), "elu"), v.to(wide)
        out = normalised(q, k, v, position, 1e-6 / scale)
        z = scale * (q * k.mean(2, keepdim=True)).sum(-1, keepdim=True)  # (B, heads, N, 1)
        return (out * (1 + 1e-6) + z * (out - v.mean(2, keepdim=True))).to(kind)


class MAViT(GatedBackbone):
    """`GatedBackbone` with magnitude-aware linear attention in its first two stages."""

    linear_mixer = MagnitudeAwareMixer


VARIANTS = {
    "vh_mala_tiny": dict(
        depths=(2, 2, 6, 2),
        dims=(64, 128, 256, 512),
        num_heads=(1, 2, 4, 8),
        proj_dim=2048,
        drop_path_rate=0.1,
    ),
    "vh_mala_small": dict(
        depths=(3, 5, 9, 3),
        dims=(64, 128, 320, 512),
        num_heads=(1, 2, 5, 8),
        proj_dim=2048,
        drop_path_rate=0.15,
    ),
    "vh_mala_base": dict(
        depths=(4, 6, 12, 6),
        dims=(96, 192, 384, 512),
        num_heads=(1, 2, 6, 8),
        layer_scale=(1.0, 1.0, 1e-6, 1e-6),
        proj_dim=2048,
        drop_path_rate=0.4,
    ),
    "vh_mala_large": dict(
        depths=(4, 7, 19, 8),
        dims=(96, 192, 448, 640),
        num_heads=(1, 2, 7, 10),
        layer_scale=(1e-6,) * 4,
        proj_dim=2560,
        drop_path_rate=0.55,
    ),
}
# The authors' weights are at https://huggingface.co/aldjalkdf/MAViT; which file is which is written nowhere, so none is named here.
CFGS = {
    name: dict(gated.CFG, origin_url="https://github.com/qhfan/MALA", paper_ids="arXiv:2507.00698")
    for name in VARIANTS
}


def recognise(state: State) -> bool:
    """Whether this may be a MAViT: RAVLT has the same keys, but always a projection of width 1024."""
    return gated.proj_dim(state) not in (None, 1024)


register(
    System(
        name="mala",
        task="classification",
        build=MAViT,
        recognise=recognise,
        options=partial(gated.options, variants=VARIANTS),
        convert=gated.convert,
        paper="arXiv:2507.00698",
        source="qhfan/MALA@7114e63",
        license="none stated",
        purpose="MAViT: magnitude-aware linear attention with softmax in the late stages.",
    ),
    VARIANTS,
    CFGS,
    feature_cfg=gated.TAPS,
)
