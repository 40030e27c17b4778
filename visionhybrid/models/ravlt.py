"""RAVLT: linear attention whose keys are weighted by a global query (RALA) in two stages, softmax in two. arXiv:2411.07635.

Official code: qhfan/RALA@a86314f, classfication/RALA.py (no licence file; the weights' model card says MIT). Written from
equations, checked against its numbers (`ravlt_*` golden cases). All but the mixer is shared with MALA, see gated/.

With q, k after elu + 1, all sums over the N tokens j: g = mean q, a_j = N softmax_j(g . k_j / sqrt(d)), and

    out_i = (R_i q_i)^T sum_j (R_j a_j k_j) v_j^T / (q_i . sum_j a_j k_j + 1e-6 N)

where R is the rotary embedding, which the normaliser, as in the official code, does without.

Published top-1 at 224: tiny 82.8, small 84.4, base 85.5, large 85.8.
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
from visionhybrid.models.registry import State, System, Weights, register


@register_notrace_module
class RankAugmentedMixer(GatedMixer):
    """RALA: keys that the mean query attends to count more, which raises the rank of what linear attention keeps."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        q, k = features(q, "elu"), features(k, "elu")
        kind = widened(q)
        # Products and sums, not matmul: autocast leaves them in float32.
        logits = (k.to(kind) * q.to(kind).mean(2, keepdim=True)).sum(-1, keepdim=True)
        weights = k.shape[2] * (self.head_dim**-0.5 * logits).softmax(2)  # (B, heads, N, 1), mean 1
        return normalised(q, (k * weights).to(q.dtype), v, position, 1e-6)


class RAVLT(GatedBackbone):
    """`GatedBackbone` with rank-augmented linear attention in its first two stages."""

    linear_mixer = RankAugmentedMixer


VARIANTS = {
    "vh_ravlt_tiny": dict(
        depths=(2, 2, 6, 2), dims=(64, 128, 256, 512), num_heads=(1, 2, 4, 8), drop_path_rate=0.1
    ),
    "vh_ravlt_small": dict(
        depths=(3, 5, 9, 3), dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8), drop_path_rate=0.15
    ),
    "vh_ravlt_base": dict(
        depths=(4, 6, 12, 6),
        dims=(96, 192, 384, 512),
        num_heads=(1, 2, 6, 8),
        layer_scale=(1.0, 1.0, 1e-6, 1e-6),
        drop_path_rate=0.4,
    ),
    "vh_ravlt_large": dict(
        depths=(4, 7, 19, 8),
        dims=(96, 192, 448, 640),
        num_heads=(1, 2, 7, 10),
        layer_scale=(1e-6,) * 4,
        drop_path_rate=0.55,
    ),
}
_TOP1 = dict(tiny=82.8, small=84.4, base=85.5, large=85.8)
CFGS = {
    f"{name}.authors_in1k": dict(
        gated.CFG, origin_url="https://github.com/qhfan/RALA", paper_ids="arXiv:2411.07635"
    )
    for name in VARIANTS
}
WEIGHTS = {
    f"vh_ravlt_{size}.authors_in1k": Weights(
        file=f"RAVLT_{size[0].upper()}.pth",
        hub="aldjalkdf/RAVLT",
        license="MIT",
        purpose="classification: ImageNet-1k, 300 epochs at 224",
        published={"ImageNet-1K top-1 %": top1},
    )
    for size, top1 in _TOP1.items()
}


def recognise(state: State) -> bool:
    """Whether this may be a RAVLT: MALA has the same keys, but never this width of the projection."""
    return gated.proj_dim(state) not in (None, 2048, 2560)


register(
    System(
        name="ravlt",
        task="classification",
        build=RAVLT,
        recognise=recognise,
        options=partial(gated.options, variants=VARIANTS),
        convert=gated.convert,
        paper="arXiv:2411.07635",
        source="qhfan/RALA@a86314f",
        license="none stated",
        purpose="RAVLT: rank-augmented linear attention with softmax in the late stages.",
    ),
    VARIANTS,
    CFGS,
    feature_cfg=gated.TAPS,
    weights=WEIGHTS,
)
