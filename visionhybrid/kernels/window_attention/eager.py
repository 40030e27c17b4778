"""Window attention in PyTorch operations: one row of windows at a time, gradients by recomputation.

The softmax has base 2 (log2(e) is multiplied into q and the bias: `exp2` is 4 x faster than MKL's `exp` on AMD CPUs) and no
row maximum: a row of ones under v^T gives the normaliser with the product that is needed anyway. That is exact as long as the
normaliser lies in `SAFE`; a row of windows where it does not is computed again in the usual way. Logits are
laid out keys first, so that the second product is v^T weights: with a head dim of 24 or 30 that is up to 1.9 x faster in MKL,
and a grouped convolution can do it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from visionhybrid.kernels.operators import end_of_derivatives, register
from visionhybrid.kernels.precision import widened

Pair = tuple[int, int]
LOG2E = math.log2(math.e)
# A normaliser in this range says that no term overflowed and that every term of weight 2^-24 or more was a normal float32.
SAFE = (2.0**-60, 2.0**60)
OUTSIDE = -100.0  # logit between pieces of a shifted window, as Swin's and HAT's code has it
# Bytes of weights alive at a time: more windows to a product hide its overhead (16-bit types gain most), as long as the
# weights stay in the last-level cache.
BUDGET = 6_500_000


def unsupported(*args: object) -> str | None:
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: Pair, reach: Pair, shift: Pair, scale: float
) -> Tensor:
    # ONNX knows no operator of ours; there the same formula runs on the whole map.
    if torch.compiler.is_exporting():
        return whole_map(q, k, v, bias, window, reach, shift, scale)
    return _attention(q, k, v, bias, [*window], [*reach], [*shift], scale)[0]


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
        masks = _masks(window, shift, q.device, q.dtype)  # (2, 2, N, N)
        mask = masks[down.long()[:, None], across.long()].flatten(0, 1)  # (windows, N, N)
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


def _masks(window: Pair, shift: Pair, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(2, 2, N, N): what to add to the logits of a window, by [in the last row?, in the last column?]."""
    rows, columns = (torch.arange(w, device=device) >= (w - s) for w, s in zip(window, shift, strict=True))
    one = torch.zeros_like(rows[:, None] | columns)
    pieces = torch.stack([one.long(), one + columns.long(), one + 2 * rows.long()[:, None]])
    pieces = torch.cat([pieces, pieces[1:2] + pieces[2:3]]).flatten(1)  # (4, N)
    mask = OUTSIDE * (pieces[:, :, None] != pieces[:, None, :]).to(dtype)
    return mask.unflatten(0, (2, 2))


class _Grid:
    """What forward and backward share: the grid's bands and windows, and the constant part of the logits."""

    def __init__(
        self,
        q: Tensor,
        bias: Tensor | None,
        window: list[int],
        reach: list[int],
        shift: list[int],
        *,
        keys_first: bool = False,
    ) -> None:
        self.window, self.reach, self.shift = tuple(window), tuple(reach), tuple(shift)
        self.pad = tuple((e - w) // 2 for e, w in zip(reach, window, strict=True))
        self.rows, self.columns = q.shape[1] // window[0], q.shape[2] // window[1]
        # bfloat16 has float32's range, so its logits are safe; float16's are not.
        self.dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
        self.wide = torch.promote_types(q.dtype, torch.float32)
        queries, keys = window[0] * window[1], reach[0] * reach[1]
        # heads, then the axes of the logits: queries and keys, or the other way round
        self.shape = (q.shape[3], keys, queries) if keys_first else (q.shape[3], queries, keys)
        self.constants = self._constants(bias.transpose(1, 2) if keys_first and bias is not None else bias, q)

    def _constants(self, bias: Tensor | None, q: Tensor) -> dict[tuple[bool, bool], Tensor | None]:
        """Bias plus mask times log2(e), of `shape`, by (in the last row, in the last column). Masks are symmetric."""
        shifted = any(self.shift)
        base = None if bias is None else bias.to(self.wide) * LOG2E
        masks = _masks(self.window, self.shift, q.device, self.wide) * LOG2E if shifted else None

        def constant(down: bool, across: bool) -> Tensor | None:
            if masks is None or not (down or across):
                total = base
            else:
                total = (
                    masks[int(down), int(across)] if base is None else base + masks[int(down), int(across)]
                )
            return None if total is None else total.to(self.dtype).expand(self.shape).contiguous()

        ends = [(False, False), (False, True), (True, False), (True, True)]
        if not shifted:
            return dict.fromkeys(ends, constant(False, False))
        return {end: constant(*end) for end in ends}

    def spans(self) -> Iterator[slice]:
        """Runs of columns to do together: within `BUDGET`, and the last by itself where its constant is another."""
        heads, queries, keys = self.shape
        step = max(1, BUDGET // (heads * queries * keys * self.dtype.itemsize))
        last = self.columns - 1 if self.shift[1] else self.columns
        for first in range(0, last, step):
            yield slice(first, min(first + step, last))
        if last < self.columns:
            yield slice(last, self.columns)

    def logits(self, out: Tensor, row: int, span: slice, q: Tensor, k: Tensor, scale: float = 1.0) -> Tensor:
        """Base-2 logits of a run of windows, (columns * heads, ...), into `out`; `scale` of the product. Keys first: swap q, k."""
        constant = self.constants[row == self.rows - 1, span.stop == self.columns]
        if constant is None:
            return torch.baddbmm(out, q, k.transpose(1, 2), beta=0, alpha=scale, out=out)
        if len(out) == self.shape[0]:
            return torch.baddbmm(constant, q, k.transpose(1, 2), alpha=scale, out=out)
        out.unflatten(0, (-1, self.shape[0])).copy_(constant)
        return out.baddbmm_(q, k.transpose(1, 2), alpha=scale)

    def band(self, t: Tensor, row: int, size: Pair) -> Tensor:
        """The part of `t`, (H, W, heads, D), under one row of windows of `size`: rolled or padded, a view if it can be."""
        H, W = t.shape[:2]
        top = row * self.window[0] + self.shift[0]
        if size != self.window:
            ph, pw = self.pad
            first, last = max(top - ph, 0), min(top + size[0] - ph, H)
            band = t.new_zeros(size[0], W + 2 * pw, *t.shape[2:])
            band[first - top + ph : last - top + ph, pw : pw + W] = t[first:last]
            return band
        band = t[top : top + size[0]]
        if top + size[0] > H:
            band = torch.cat([band, t[: top + size[0] - H]])
        if self.shift[1]:
            band = torch.cat([band[:, self.shift[1] :], band[:, : self.shift[1]]], dim=1)
        return band

    def put(self, t: Tensor, row: int, band: Tensor) -> None:
        """Write a band back where `band` took it from; bands that overlap are added."""
        H, W = t.shape[:2]
        top = row * self.window[0] + self.shift[0]
        if band.shape[:2] != (self.window[0], W):
            ph, pw = self.pad
            first, last = max(top - ph, 0), min(top + band.shape[0] - ph, H)
            t[first:last] += band[first - top + ph : last - top + ph, pw : pw + W]
            return
        inside, cut = min(H - top, band.shape[0]), W - self.shift[1]
        for target, source in (
            (t[top : top + inside], band[:inside]),
            (t[: band.shape[0] - inside], band[inside:]),
        ):
            target[:, self.shift[1] :] = source[:, :cut]
            target[:, : self.shift[1]] = source[:, cut:]

    def windows(self, t: Tensor, row: int, size: Pair) -> Tensor:
        """One row of windows, (columns, height, width, heads, D)."""
        return self.band(t, row, size).unfold(1, size[1], self.window[1]).permute(1, 0, 4, 2, 3)

    def rows_of(self, windows: Tensor, factor: float = 1.0) -> Tensor:
        """(columns, height, width, heads, D) -> (columns, heads, tokens, D), `factor` times."""
        columns, height, width, heads, dim = windows.shape
        out = windows.new_empty(columns, heads, height, width, dim, dtype=self.dtype)
        out.copy_(windows.permute(0, 3, 1, 2, 4))
        return out.flatten(2, 3) if factor == 1 else out.flatten(2, 3).mul_(factor)

    def columns_of(self, windows: Tensor, ones: int = 0) -> Tensor:
        """(columns, height, width, heads, D) -> (columns, heads, D + ones, tokens), then `ones` rows of ones."""
        columns, height, width, heads, dim = windows.shape
        out = windows.new_empty(columns, heads, dim + ones, height, width, dtype=self.dtype)
        out[:, :, :dim] = windows.permute(0, 3, 4, 1, 2)
        out[:, :, dim:] = 1.0
        return out.flatten(3)

    def as_band(self, columns: Tensor) -> Tensor:
        """(columns, heads, D, tokens) -> band (height, columns * width, heads, D)."""
        return columns.unflatten(3, self.window).permute(3, 0, 4, 1, 2).flatten(1, 2)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Batched a @ b into `out`. In float32 on a CPU by a grouped 1x1 convolution: oneDNN's takes half of MKL's time here."""
    if a.device.type != "cpu" or a.dtype != torch.float32:
        torch.bmm(a, b, out=out)
        return
    groups, rows, inner = a.shape
    y = F.conv2d(b.reshape(1, groups * inner, 1, -1), a.reshape(groups * rows, inner, 1, 1), groups=groups)
    out.copy_(y.view_as(out))


@partial(register, "window_attention")
def _attention(
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
    g = _Grid(q, bias, window, reach, shift, keys_first=True)
    heads, _, queries = g.shape
    dim = v.shape[4]
    out = v.new_empty(v.shape)
    lse = v.new_empty(len(q), g.rows, g.columns, heads, queries, dtype=g.wide)
    spans = list(g.spans())
    widest = max(span.stop - span.start for span in spans)
    buffer = q.new_empty(widest * heads, *g.shape[1:], dtype=g.dtype)
    sums = q.new_empty(g.columns, heads, dim + 1, queries, dtype=g.dtype)
    norm = sums[:, :, dim:]
    for b in range(len(q)):
        for row in range(g.rows):
            qs = g.rows_of(g.windows(q[b], row, g.window))
            ks = g.rows_of(g.windows(k[b], row, g.reach))
            vs = g.columns_of(g.windows(v[b], row, g.reach), ones=1)
            for span in spans:
                q_run, k_run, v_run, out_run = (t[span].flatten(0, 1) for t in (qs, ks, vs, sums))
                weights = g.logits(buffer[: len(q_run)], row, span, k_run, q_run, scale * LOG2E)
                _product(v_run, torch.exp2(weights, out=weights), out_run)
            low, high = torch.aminmax(norm)
            if low > SAFE[0] and high < SAFE[1]:
                lse[b, row].copy_(norm[:, :, 0]).log2_()
            else:
                for span in spans:
                    q_run, k_run, v_run, out_run = (t[span].flatten(0, 1) for t in (qs, ks, vs, sums))
                    weights = g.logits(buffer[: len(q_run)], row, span, k_run, q_run, scale * LOG2E)
                    top = weights.amax(1, keepdim=True)
                    _product(v_run, torch.exp2(weights.sub_(top), out=weights), out_run)
                    total = norm[span, :, 0].to(g.wide).log2()
                    lse[b, row, span] = total + top.unflatten(0, (-1, heads))[:, :, 0]
            g.put(out[b], row, g.as_band(sums[:, :, :dim] / norm))
    return out, lse


@_attention.register_fake
def _(q, k, v, bias, window, reach, shift, scale):
    B, H, W, heads, _ = q.shape
    lse = v.new_empty(B, H // window[0], W // window[1], heads, window[0] * window[1], dtype=widened(q))
    return v.new_empty(v.shape), lse


@partial(register, "window_attention_backward")
def _attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: list[int],
    reach: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias (empty without one)."""
    g = _Grid(q, bias, window, reach, shift)
    dq = q.new_empty(q.shape)
    dk, dv = (t.new_zeros(t.shape, dtype=g.wide) for t in (k, v))
    dbias = q.new_zeros(0 if bias is None else bias.shape, dtype=g.wide)
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
                if bias is not None:
                    dbias.add_(slopes)
                torch.bmm(slopes, ks[column], out=queries[column])
                left = column * g.window[1]
                for band, part in (
                    (band_k, torch.bmm(slopes.transpose(1, 2), qs[column]).div_(LOG2E)),
                    (band_v, torch.bmm(weights.transpose(1, 2), gs[column])),
                ):
                    part = part.unflatten(1, g.reach).permute(1, 2, 0, 3)
                    band[:, left : left + g.reach[1]] += part
            g.put(dq[b], row, g.as_band(queries.mul_(scale).transpose(2, 3)))
            g.put(dk[b], row, band_k)
            g.put(dv[b], row, band_v)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias if bias is None else dbias.to(bias.dtype)


@_attention_backward.register_fake
def _(grad, q, k, v, bias, out, lse, window, reach, shift, scale):
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _save(ctx, inputs, output):
    q, k, v, bias, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    q, k, v, bias, out, lse = ctx.saved_tensors
    *grads, dbias = _attention_backward(grad, q, k, v, bias, out, lse, *ctx.options)
    return *grads, None if bias is None else dbias, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
end_of_derivatives(_attention_backward, "window_attention")


@register_flop_formula(torch.ops.visionhybrid.window_attention)
def _operations(q, k, v, bias, window, reach, shift, scale, *args, **kwargs) -> int:
    """Of the two matrix products, from shapes, for torch's FlopCounterMode: every query meets reach[0] * reach[1] keys."""
    B, H, W, heads, dim = q
    return 2 * B * H * W * heads * reach[0] * reach[1] * (dim + v[4])
