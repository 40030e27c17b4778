"""The token mixers of A2Mamba: attention to near and far neighbours, and what spreads its result over the whole map.

P are the attention weights, K is the side of their window, h are the states of the scan.

Mixed precision: rotated queries and keys, attention weights, states, the mixing of heads and everything after it stay float32
under autocast (the authors round the states to half precision before the heads mix, where large ones overflow).
"""

# No `from __future__ import annotations`: TorchScript reads the annotations.

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from visionhybrid.kernels.neighborhood_attention import neighborhood_aggregate, neighborhood_scores, shared
from visionhybrid.kernels.precision import autocasting, wide
from visionhybrid.kernels.selective_scan import selective_scan
from visionhybrid.models.layers import ConvNorm, rotate


def adaptive_dilation(side: int, kernel_size: int) -> int:
    """How far apart `kernel_size` keys lie that span a side: at most `kernel_size`; 1 where they do not even fit."""
    return max(1, min(side // kernel_size, kernel_size))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, C, H, W) -> (B, heads, H, W, D), a view."""
    return x.unflatten(1, (num_heads, -1)).permute(0, 1, 3, 4, 2)


def as_sequence(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H * W), a view."""
    return x.flatten(1, 2).transpose(1, 2)


def join_heads(first: Tensor, second: Tensor) -> Tensor:
    """Two halves of the heads, (B, heads / 2, H, W, D) each -> (B, C, H, W) in channels-last memory."""
    halves = [first.permute(0, 2, 3, 1, 4), second.permute(0, 2, 3, 1, 4)]
    return torch.cat(halves, 3).flatten(3).permute(0, 3, 1, 2)


# ---- the operators; TorchScript cannot look into their Python


def attend(q: Tensor, k: Tensor, rpb: Tensor, kernel_size: int, dilation: list[int], scale: float) -> Tensor:
    """P of every pixel for its K x K neighbours, for `gather` alone: q, k (B, heads, H, W, D).

    Compact (B, heads, H, W, K * K); in eager mode on a CPU dense by tile (`kernels.neighborhood_attention.shared`).
    """
    window = [kernel_size, kernel_size]
    if torch.jit.is_scripting():
        return torch.ops.visionhybrid.neighborhood_scores(q, k, rpb, window, dilation, scale).softmax(-1)
    else:
        return _attend(q, k, rpb, window, dilation, scale)


def _attend(
    q: Tensor, k: Tensor, rpb: Tensor, window: list[int], dilation: list[int], scale: float
) -> Tensor:
    if shared.unsupported(q, k, rpb) is None and not torch.compiler.is_compiling():
        return shared.weights(q, k, rpb, window, dilation, scale)
    options = dict(kernel_size=window, dilation=dilation, rpb=rpb, scale=scale)
    if autocasting(q):  # which would round q and k
        with torch.autocast(q.device.type, enabled=False):
            return neighborhood_scores(q, k, **options).softmax(-1)
    return neighborhood_scores(q, k, **options).softmax(-1)


def gather(weights: Tensor, x: Tensor, kernel_size: int, dilation: list[int]) -> Tensor:
    """The neighbours' x (B, heads, H, W, D), summed with the weights P of `attend`."""
    window = [kernel_size, kernel_size]
    if torch.jit.is_scripting():
        return torch.ops.visionhybrid.neighborhood_aggregate(weights, x, window, dilation)
    elif weights.dim() < x.dim():
        return shared.aggregate(weights, x, window, dilation)
    else:
        return neighborhood_aggregate(weights, x, kernel_size=window, dilation=dilation)


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> Tensor:
    """States of the scan: u, delta (B, C, L), A (C, 1), B (B, 1, L) -> (B, C, L), float32 at least."""
    if torch.jit.is_scripting():
        h = torch.ops.visionhybrid.selective_scan_eager(
            u, delta, A, B.unsqueeze(1), None, None, delta_bias, True, [False]
        )
    else:
        h = selective_scan(u, delta, A, B, delta_bias=delta_bias, delta_softplus=True)
    return h.squeeze(2)


# ---- the state space


class A2SSM(nn.Module):
    """Attention-augmented state space: (B, dim, H, W), the shape stays.

    A selective scan over the pixels in raster order, one state a channel; each pixel then takes the P-weighted sum of its
    neighbours' states, and the heads mix.
    """

    no_decay = ("A_log", "D")

    def __init__(self, dim: int, *, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.rank = math.ceil(dim / 16)
        self.num_heads = num_heads
        self.conv = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.x_proj = nn.Parameter(torch.empty(self.rank + 2, dim, **dd))  # rows: step (rank), B, C
        self.dt_proj = nn.Parameter(torch.empty(dim, self.rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(dim, **dd))
        self.A_log = nn.Parameter(torch.empty(dim, 1, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.mix = nn.Linear(num_heads, num_heads, **dd)  # across heads, for each of their dims
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As Mamba: decay rate 1, skip 1, steps between 1e-3 and 1e-1 (log-uniform)."""
        nn.init.uniform_(self.x_proj, -(self.dim**-0.5), self.dim**-0.5)
        nn.init.uniform_(self.dt_proj, -(self.rank**-0.5), self.rank**-0.5)
        step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # its softplus is `step`
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(
        self,
        z: Tensor,
        near: Tensor | None = None,
        far: Tensor | None = None,
        kernel_size: int = 1,
        dilation: list[int] | None = None,
    ) -> Tensor:
        """`near` and `far` are P of the first and the second half of the heads; without them every state stays where it is."""
        u = F.silu(self.conv(z)).permute(0, 2, 3, 1)  # (B, H, W, C)
        parts = F.linear(u, self.x_proj)
        delta = F.linear(parts[..., : self.rank], self.dt_proj)
        B, C = parts[..., self.rank : self.rank + 1], parts[..., self.rank + 1 :]
        A = -wide(self.A_log).exp()
        h = scan(as_sequence(u), as_sequence(delta), A, as_sequence(B), self.dt_bias)
        h = split_heads(h.unflatten(2, u.shape[1:3]), self.num_heads)  # (B, heads, H, W, D)
        if near is not None and far is not None and dilation is not None:
            first, second = h.chunk(2, 1)
            h = torch.cat(
                [gather(near, first, kernel_size, [1, 1]), gather(far, second, kernel_size, dilation)], 1
            )
            h = self._mix(h)
        skip = (wide(u) * self.D).unflatten(3, (self.num_heads, -1))  # (B, H, W, heads, D)
        y = torch.addcmul(skip, h.permute(0, 2, 3, 1, 4), C[..., None].to(h.dtype))
        return y.flatten(3).permute(0, 3, 1, 2).to(self.D.dtype)

    def _mix(self, h: Tensor) -> Tensor:
        """Not `self.mix(h)`: autocast would round the states."""
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript
            if autocasting(h):
                with torch.autocast(h.device.type, enabled=False):
                    return self._mix(h)
        flat = h.flatten(2)
        weight, bias = self.mix.weight.to(h.dtype), self.mix.bias.to(h.dtype)
        return torch.baddbmm(bias[:, None], weight.expand(h.shape[0], -1, -1), flat).view_as(h)


# ---- the mixers


class Mixer(nn.Module):
    """MASS: gated neighbourhood attention in two branches, spread over the map by a subclass: (B, dim, H, W), the shape stays.

    Half of the heads attend to the K x K pixels around, the other half to K x K pixels that span the map; these see the
    others' result added to their values. Both have one table of relative positions.
    """

    no_decay = ("rpb",)

    def __init__(self, dim: int, *, num_heads: int, kernel_size: int, **dd: Any) -> None:
        super().__init__()
        if num_heads % 2 or dim % num_heads:
            raise ValueError(f"Mixer: an even number of heads must divide width {dim}, got {num_heads}")
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.gate = ConvNorm(dim, dim, kernel_size=1, act=nn.SiLU, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.empty(num_heads // 2, side, side, **dd))
        self.norm = LayerNorm2d(dim, **dd)
        self.proj_norm = LayerNorm2d(dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)
        nn.init.zeros_(self.rpb)

    def init_weights(self) -> None:
        nn.init.zeros_(self.rpb)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        gate = self.gate(x)
        q, k, v = self.qkv(x).chunk(3, 1)
        local = self.lepe(v)
        K, n, H, W = self.kernel_size, self.num_heads, x.shape[2], x.shape[3]
        dilation = [adaptive_dilation(H, K), adaptive_dilation(W, K)]
        q, k = self._rotate(q, position), self._rotate(k, position)
        (q1, q2), (k1, k2), (v1, v2) = q.chunk(2, 1), k.chunk(2, 1), split_heads(v, n).chunk(2, 1)
        near = attend(q1, k1, self.rpb, K, [1, 1], self.scale)
        y1 = gather(near, v1, K, [1, 1])
        far = attend(q2, k2, self.rpb, K, dilation, self.scale)
        y2 = gather(far, y1 + v2, K, dilation)
        z = self.spread(join_heads(y1, y2), q, k, near, far, dilation)
        return self._project((self.norm(z) + local) * gate)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        x = split_heads(wide(x), self.num_heads)
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript
            if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
                # One pass over numbers that lie as they came, where `rotate` makes four.
                pairs = x.unflatten(-1, (-1, 2))
                pairs = pairs if pairs.stride(-1) == 1 else pairs.contiguous()
                turn = torch.complex(position[0], position[1]).unflatten(0, x.shape[2:4])
                return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
        return rotate(x.flatten(2, 3), position).view_as(x)

    def _project(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript
            if autocasting(x):
                with torch.autocast(x.device.type, enabled=False):
                    return self.proj(self.proj_norm(x.to(self.proj.weight.dtype)))
        return self.proj(self.proj_norm(x))

    def spread(
        self, z: Tensor, q: Tensor, k: Tensor, near: Tensor, far: Tensor, dilation: list[int]
    ) -> Tensor:
        """(B, C, H, W), with all that the neighbourhood attention was made of -> (B, C, H, W)."""
        raise NotImplementedError


@register_notrace_module
class StateSpaceMixer(Mixer):
    """`Mixer` with an `A2SSM` behind the attention, which uses the same weights P again: linear in the number of pixels."""

    def __init__(self, dim: int, *, num_heads: int, kernel_size: int, **dd: Any) -> None:
        super().__init__(dim, num_heads=num_heads, kernel_size=kernel_size, **dd)
        self.ssm = A2SSM(dim, num_heads=num_heads, **dd)

    def spread(
        self, z: Tensor, q: Tensor, k: Tensor, near: Tensor, far: Tensor, dilation: list[int]
    ) -> Tensor:
        return self.ssm(z, near, far, self.kernel_size, dilation)


@register_notrace_module
class GlobalMixer(Mixer):
    """`Mixer` with attention of all pixels to all, of the same queries and keys, behind the neighbourhood attention.

    Args:
        tokens: pixels of the map for which the table of biases is made. For other maps it is resized as the authors do: as
            a picture of (tokens, tokens), bicubic, although that mixes the ends of rows; trained weights expect it.
    """

    no_decay = ("rpb", "bias")

    def __init__(self, dim: int, *, num_heads: int, kernel_size: int, tokens: int, **dd: Any) -> None:
        super().__init__(dim, num_heads=num_heads, kernel_size=kernel_size, **dd)
        self.bias = nn.Parameter(torch.empty(1, num_heads, tokens, tokens, **dd))
        nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.bias)

    def spread(
        self, z: Tensor, q: Tensor, k: Tensor, near: Tensor, far: Tensor, dilation: list[int]
    ) -> Tensor:
        bias = resized(self.bias, q.shape[2] * q.shape[3])
        out = F.scaled_dot_product_attention(
            q.flatten(2, 3).to(z.dtype),
            k.flatten(2, 3).to(z.dtype),
            split_heads(z, self.num_heads).flatten(2, 3),
            attn_mask=bias.to(z.dtype),
            scale=self.scale,
        )
        out = out.unflatten(2, q.shape[2:4])
        first, second = out.chunk(2, 1)
        return join_heads(first, second).to(self.proj.weight.dtype)


_RESIZED: Any = WeakTensorKeyDictionary()  # table -> (its state and size, the same resized)


def resized(table: Tensor, tokens: int) -> Tensor:
    """(1, heads, n, n) -> (1, heads, tokens, tokens), bicubic; at inference the last size of each table is kept."""
    if table.shape[-1] == tokens:
        return table
    if torch.jit.is_scripting():
        return F.interpolate(table, size=[tokens, tokens], mode="bicubic")
    if _volatile(table):
        return F.interpolate(table, size=(tokens, tokens), mode="bicubic")
    state = (table._version, table.data_ptr(), table.dtype, tokens)
    known, kept = _RESIZED.get(table, (None, None))
    if known != state:
        kept = F.interpolate(table, size=(tokens, tokens), mode="bicubic")
        _RESIZED[table] = (state, kept)
    return kept


def _volatile(table: Tensor) -> bool:
    """Whether what is made of `table` must not be kept: gradients, tracing, or changes that are not counted."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or table.is_inference()
        or table.device.type == "meta"
    )
