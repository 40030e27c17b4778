"""Window attention in PyTorch operations: one row of windows at a time, gradients by recomputation.

The softmax has base 2 (log2(e) is multiplied into q and the bias: `exp2` is 4 x faster than MKL's `exp` on AMD CPUs) and no
row maximum: a channel of ones beside those of v gives the normaliser with the product that is needed anyway. That is exact as
long as the normaliser lies in `SAFE`; a row of windows where it does not is computed again in the usual way.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.kernels.window_attention import ops
from visionhybrid.kernels.window_attention.grid import LOG2E, Grid, Pair, masks

# A normaliser in this range says that no term overflowed and that every term of weight 2^-24 or more was a normal float32.
SAFE = (2.0**-60, 2.0**60)
SMALLEST = -126.0  # log2 of the smallest normal float32


def unsupported(*args: object) -> str | None:
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Pair, reach: Pair, shift: Pair, scale: float
) -> Tensor:
    # ONNX knows no operator of ours; there the same formula runs on the whole map.
    if torch.compiler.is_exporting():
        return whole_map(q, k, v, bias, window, reach, shift, scale)
    return OPERATOR(q, k, v, bias, [*window], [*reach], [*shift], scale)[0]


def whole_map(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Pair, reach: Pair, shift: Pair, scale: float
) -> Tensor:
    """All windows at once by `scaled_dot_product_attention`: plain operators, any size symbolic."""
    B, H, W, heads, _ = q.shape
    (wh, ww), (eh, ew), (sh, sw) = window, reach, shift
    if sh or sw:
        q, k, v = (t.roll((-sh, -sw), (1, 2)) for t in (q, k, v))
    kind = v.dtype
    half = kind in (torch.float16, torch.bfloat16)
    q, k, v = (t.float() if half else t for t in (q, k, v))
    nh, nw = H // wh, W // ww
    q = q.reshape(B, nh, wh, nw, ww, heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
    q = q.reshape(B * nh * nw, heads, wh * ww, -1)
    k, v = (
        _tiles(_padded(t, window, reach), reach, window)
        .permute(0, 1, 2, 5, 3, 4, 6)
        .reshape(B * nh * nw, heads, eh * ew, -1)
        for t in (k, v)
    )
    extra = None if bias is None else bias.to(q.dtype)
    if sh or sw:
        down, across = (
            torch.arange(nh, device=q.device) == nh - 1,
            torch.arange(nw, device=q.device) == nw - 1,
        )
        edges = masks(window, shift, q.device, q.dtype)  # (2, 2, N, N)
        mask = edges[down.long()[:, None], across.long()].flatten(0, 1)  # (windows, N, N)
        mask = mask.repeat(B, 1, 1)[:, None]
        extra = mask if extra is None else mask + extra
    out = F.scaled_dot_product_attention(q, k, v, extra, scale=scale)  # (windows, heads, N, E)
    out = out.reshape(B, nh, nw, heads, wh, ww, -1).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, heads, -1)
    return (out.roll((sh, sw), (1, 2)) if sh or sw else out).to(kind)


def _padded(t: Tensor, window: Pair, reach: Pair) -> Tensor:
    ph, pw = (reach[0] - window[0]) // 2, (reach[1] - window[1]) // 2
    return F.pad(t, (0, 0, 0, 0, pw, pw, ph, ph)) if ph or pw else t


def _tiles(t: Tensor, size: Pair, stride: Pair) -> Tensor:
    """(B, H, W, heads, D) -> view (B, rows, columns, height, width, heads, D) of the windows."""
    return t.unfold(1, size[0], stride[0]).unfold(2, size[1], stride[1]).permute(0, 1, 2, 5, 6, 3, 4)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Batched a @ b into `out`. In float32 on a CPU by a grouped 1x1 convolution: oneDNN's takes half of MKL's time here."""
    if a.device.type != "cpu" or a.dtype != torch.float32:
        torch.bmm(a, b, out=out)
        return
    groups, rows, inner = a.shape
    y = F.conv2d(b.reshape(1, groups * inner, 1, -1), a.reshape(groups * rows, inner, 1, 1), groups=groups)
    out.copy_(y.view_as(out))


class Rows:
    """Attention of one row of windows after the other, in the same scratch memory.

    bfloat16 has queries first: the second product is (weights)(v), tokens come out as rows, and channels are filled up with ones
    to the multiple of 16 that oneDNN takes anyway. The others have keys first, (v^T)(weights): with a head dim of 24 or 30 up to
    1.9 x faster in MKL, and a grouped convolution can do it.
    """

    def __init__(self, grid: Grid, q: Tensor, v: Tensor, scale: float) -> None:
        """`q` and `v` are anything with their head dim as the last."""
        self.grid, self.dim, self.scale = grid, v.shape[-1], scale * LOG2E
        heads, first, second = grid.shape
        spans = list(grid.spans())
        make = partial(torch.empty, dtype=grid.dtype, device=v.device)
        weights = make(max(span.stop - span.start for span in spans) * heads, first, second)
        q, k = (make(grid.columns, heads, *size, q.shape[-1]) for size in (grid.window, grid.reach))
        if grid.keys_first:
            v = torch.ones_like(make(grid.columns, heads, self.dim + 1, *grid.reach))
            self.v = v[:, :, : self.dim].permute(0, 3, 4, 1, 2)
            v, sums = v.flatten(3), make(grid.columns, heads, self.dim + 1, second)
            self.rows = sums.transpose(2, 3)
        else:
            width = self.dim + 1 + -(self.dim + 1) % 16
            v = torch.ones_like(make(grid.columns, heads, *grid.reach, width))
            self.v = v[..., : self.dim].permute(0, 2, 3, 1, 4)
            v, sums = v.flatten(2, 3), make(grid.columns, heads, first, width)
            self.rows = sums
        # where windows (columns, height, width, heads, D) go
        self.q, self.k = (t.permute(0, 2, 3, 1, 4) for t in (q, k))
        self.norm = self.rows[..., self.dim : self.dim + 1]
        q, k = q.flatten(2, 3), k.flatten(2, 3)
        a, b = (k, q) if grid.keys_first else (q, k)
        self.runs = []
        for span in spans:
            parts = [t[span].flatten(0, 1) for t in (a, b, v, sums)]
            self.runs.append((span, weights[: len(parts[0])], *parts))

    def __call__(self, row: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None = None) -> Tensor:
        """Windows (columns, height, width, heads, D) -> (columns, tokens, heads, E); into `lse`, (columns, heads, tokens), log2
        of the normalisers.
        """
        self.q.copy_(q)
        self.k.copy_(k)
        self.v.copy_(v)
        for span, weights, a, b, values, sums in self.runs:
            self.grid.logits(weights, row, span, a, b, self.scale)
            masked = self.grid.masked(weights, row, span)
            if len(masked):
                # Between pieces exp2 would give subnormal numbers, which processors are slow with.
                masked.clamp_(min=SMALLEST)
            self._multiply(torch.exp2(weights, out=weights), values, sums)
        low, high = (t.item() for t in torch.aminmax(self.norm))
        if not (low > SAFE[0] and high < SAFE[1]):
            self._carefully(row, lse)
        elif lse is not None:
            lse.copy_(self.norm[..., 0]).log2_()
        # Dividing whole rows is five times as fast as dividing the part that is wanted.
        return (self.rows / self.norm)[..., : self.dim].transpose(1, 2)

    def _multiply(self, weights: Tensor, v: Tensor, sums: Tensor) -> None:
        _product(v, weights, sums) if self.grid.keys_first else _product(weights, v, sums)

    def _carefully(self, row: int, lse: Tensor | None) -> None:
        """The sums with each row's maximum taken off first."""
        keys = 1 if self.grid.keys_first else 2
        for span, weights, a, b, values, sums in self.runs:
            self.grid.logits(weights, row, span, a, b, self.scale)
            top = weights.amax(keys, keepdim=True)
            self._multiply(torch.exp2(weights.sub_(top), out=weights), values, sums)
            if lse is not None:
                total = self.norm[span, ..., 0].to(self.grid.wide).log2()
                lse[span] = total + top.flatten(1).unflatten(0, (-1, self.grid.shape[0]))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    reach: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output map, and log2 of each softmax's normaliser, (B, rows, columns, heads, N)."""
    g = Grid(q, q.shape[3], bias, window, reach, shift)
    attend = Rows(g, q, v, scale)
    out = v.new_empty(v.shape)
    lse = v.new_empty(len(q), g.rows, g.columns, q.shape[3], window[0] * window[1], dtype=g.wide)
    for b in range(len(q)):
        for row in range(g.rows):
            windows = (g.windows(t[b], row, size) for t, size in ((q, g.window), (k, g.reach), (v, g.reach)))
            g.put(out[b], row, g.as_band(attend(row, *windows, lse[b, row])))
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_learns: bool,
    window: list[int],
    reach: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty if nobody wants it)."""
    g = Grid(q, q.shape[3], bias, window, reach, shift, keys_first=False)
    dq = q.new_empty(q.shape)
    dk, dv = (t.new_zeros(t.shape, dtype=g.wide) for t in (k, v))
    dbias = q.new_zeros(bias.shape if bias_learns else 0, dtype=g.wide)
    weights = q.new_empty(g.shape, dtype=g.dtype)
    slopes = torch.empty_like(weights)
    for b in range(len(q)):
        for row in range(g.rows):
            qs = g.rows_of(g.windows(q[b], row, g.window), scale * LOG2E)
            ks = g.rows_of(g.windows(k[b], row, g.reach))
            vs = g.columns_of(g.windows(v[b], row, g.reach))
            gs, outs = (g.rows_of(g.windows(t[b], row, g.window)) for t in (grad, out))
            # The slope of a softmax needs each row's mean gradient: sum_j weight_j grad . v_j = grad . out
            mean = (gs.to(g.wide) * outs.to(g.wide)).sum(-1, keepdim=True).to(g.dtype)
            queries = torch.empty_like(qs)
            band_k, band_v = (torch.zeros_like(g.band(t[b], row, g.reach)) for t in (dk, dv))
            for column in range(g.columns):
                g.logits(weights, row, slice(column, column + 1), qs[column], ks[column])
                torch.exp2(weights.sub_(lse[b, row, column][..., None]), out=weights)
                torch.bmm(gs[column], vs[column], out=slopes)
                slopes.sub_(mean[column]).mul_(weights)
                if bias_learns:
                    dbias.add_(slopes)
                torch.bmm(slopes, ks[column], out=queries[column])
                left = column * g.window[1]
                for band, part in (
                    (band_k, torch.bmm(slopes.transpose(1, 2), qs[column]).div_(LOG2E)),
                    (band_v, torch.bmm(weights.transpose(1, 2), gs[column])),
                ):
                    part = part.unflatten(1, g.reach).permute(1, 2, 0, 3)
                    band[:, left : left + g.reach[1]] += part
            g.put(dq[b], row, g.as_band(queries.mul_(scale).transpose(1, 2)))
            g.put(dk[b], row, band_k)
            g.put(dv[b], row, band_v)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype) if bias_learns else q.new_empty(0)


OPERATOR = ops.define("eager", attention, attention_backward)
