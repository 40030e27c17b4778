"""Window attention in PyTorch operations: one strip of windows at a time, gradients by recomputation.

The softmax has base 2 (log2(e) is multiplied into q and the bias: `exp2` is 4 x faster than MKL's `exp` on AMD CPUs) and no
row maximum: a column of ones beside v gives the normaliser with the product that is needed anyway. That is exact as long as the
normaliser lies in `SAFE`; a strip where it does not is computed again in the usual way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

Pair = tuple[int, int]
LOG2E = math.log2(math.e)
# A normaliser in this range says that no term overflowed and that every term of weight 2^-24 or more was a normal float32.
SAFE = (2.0**-60, 2.0**60)
OUTSIDE = -100.0  # logit between pieces of a shifted window, as Swin's and HAT's code has it


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


class _Strips:
    """What forward and backward share: rolled and padded maps, their windows, the logits' constant part."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        window: list[int],
        reach: list[int],
        shift: list[int],
        scale: float,
    ) -> None:
        self.window, self.reach, self.shift = (
            (window[0], window[1]),
            (reach[0], reach[1]),
            (shift[0], shift[1]),
        )
        # bfloat16 has float32's range, so its logits are safe; float16's are not.
        self.dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
        self.scale, self.heads = scale, q.shape[3]
        self.queries, self.keys = window[0] * window[1], reach[0] * reach[1]
        self.bias = self._constant(bias, q)

    def _constant(self, bias: Tensor | None, like: Tensor) -> dict[tuple[bool, bool], Tensor | None]:
        """Bias plus mask times log2(e), (heads, N, M), by (in the last row, in the last column)."""
        ends = [(False, False), (False, True), (True, False), (True, True)]
        if bias is None and not any(self.shift):
            return dict.fromkeys(ends)
        total = like.new_zeros(1, 1, 1, dtype=torch.float32) if bias is None else bias.float()
        if self.dtype == torch.float64:
            total = total.double() if bias is None else bias.double()
        total = total * LOG2E
        shape = (self.heads, self.queries, self.keys)
        if not any(self.shift):
            return dict.fromkeys(ends, total.expand(shape).to(self.dtype).contiguous())
        masks = _masks(self.window, self.shift, like.device, total.dtype) * LOG2E
        return {
            (down, across): (total + masks[int(down), int(across)]).to(self.dtype).expand(shape).contiguous()
            for down, across in ends
        }

    def roll(self, t: Tensor) -> Tensor:
        return t.roll((-self.shift[0], -self.shift[1]), (1, 2)) if any(self.shift) else t

    def unroll(self, t: Tensor) -> Tensor:
        return t.roll(self.shift, (1, 2)) if any(self.shift) else t

    def query_tiles(self, t: Tensor) -> Tensor:
        return _tiles(self.roll(t), self.window, self.window)

    def key_tiles(self, t: Tensor) -> Tensor:
        return _tiles(_padded(self.roll(t), self.window, self.reach), self.reach, self.window)

    def pack(self, strip: Tensor, factor: float = 1.0, ones: int = 0) -> Tensor:
        """One row of windows, (columns, height, width, heads, D) -> (columns, heads, tokens, D + ones), `factor` times."""
        columns, height, width, heads, dim = strip.shape
        out = strip.new_empty(columns, heads, height * width, dim + ones, dtype=self.dtype)
        inner = out[..., :dim].unflatten(2, (height, width))
        inner.copy_(strip.permute(0, 3, 1, 2, 4))
        if factor != 1.0:
            inner.mul_(factor)
        if ones:
            out[..., dim:] = 1.0
        return out


def _logits(out: Tensor, bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """Base-2 logits of one window, (heads, N, M), into `out`."""
    if bias is None:
        return torch.bmm(q, k.transpose(1, 2), out=out)
    return torch.baddbmm(bias, q, k.transpose(1, 2), out=out)


@torch.library.custom_op("visionhybrid::window_attention", mutates_args=())
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
    s = _Strips(q, k, v, bias, window, reach, shift, scale)
    q_tiles, k_tiles, v_tiles = s.query_tiles(q), s.key_tiles(k), s.key_tiles(v)
    B, rows, columns = q_tiles.shape[:3]
    dim = v.shape[4]
    out = v.new_empty(*v.shape)
    out_tiles = _tiles(out, s.window, s.window)
    wide = torch.float64 if s.dtype == torch.float64 else torch.float32
    lse = v.new_empty(B, rows, columns, s.heads, s.queries, dtype=wide)
    weights = q.new_empty(s.heads, s.queries, s.keys, dtype=s.dtype)
    for b in range(B):
        for row in range(rows):
            qs = s.pack(q_tiles[b, row], scale * LOG2E)
            ks, vs = s.pack(k_tiles[b, row]), s.pack(v_tiles[b, row], ones=1)
            sums = qs.new_empty(columns, s.heads, s.queries, dim + 1)
            for column in range(columns):
                constant = s.bias[row == rows - 1, column == columns - 1]
                _logits(weights, constant, qs[column], ks[column])
                torch.exp2(weights, out=weights)
                torch.bmm(weights, vs[column], out=sums[column])
            norm = sums[..., dim:]
            low, high = torch.aminmax(norm)
            if low > SAFE[0] and high < SAFE[1]:
                lse[b, row].copy_(norm[..., 0]).log2_()
            else:
                for column in range(columns):
                    constant = s.bias[row == rows - 1, column == columns - 1]
                    _logits(weights, constant, qs[column], ks[column])
                    top = weights.amax(-1, keepdim=True)
                    torch.exp2(weights.sub_(top), out=weights)
                    torch.bmm(weights, vs[column], out=sums[column])
                    lse[b, row, column] = norm[column, ..., 0].to(wide).log2() + top[..., 0]
            average = (sums[..., :dim] / norm).unflatten(2, s.window)
            out_tiles[b, row].copy_(average.permute(0, 2, 3, 1, 4))
    return s.unroll(out), lse


@_attention.register_fake
def _(q, k, v, bias, window, reach, shift, scale):
    B, H, W, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = v.new_empty(B, H // window[0], W // window[1], heads, window[0] * window[1], dtype=wide)
    return v.new_empty(v.shape), lse


@torch.library.custom_op("visionhybrid::window_attention_backward", mutates_args=())
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
    s = _Strips(q, k, v, bias, window, reach, shift, scale)
    wide = lse.dtype
    q_tiles, k_tiles, v_tiles, grad_tiles = (
        s.query_tiles(q),
        s.key_tiles(k),
        s.key_tiles(v),
        s.query_tiles(grad),
    )
    # d out / d logits needs each row's mean gradient, sum_j weight_j d_j = grad . out
    mean = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    mean_tiles = s.query_tiles(mean)
    B, rows, columns = q_tiles.shape[:3]
    dq = q.new_empty(*q.shape)
    dk, dv = (_padded(t.new_zeros(*t.shape, dtype=wide), s.window, s.reach) for t in (k, v))
    dq_tiles = _tiles(dq, s.window, s.window)
    dk_tiles, dv_tiles = _tiles(dk, s.reach, s.window), _tiles(dv, s.reach, s.window)
    dbias = q.new_zeros(0 if bias is None else bias.shape, dtype=wide)
    weights = q.new_empty(s.heads, s.queries, s.keys, dtype=s.dtype)
    slopes = torch.empty_like(weights)
    for b in range(B):
        for row in range(rows):
            qs = s.pack(q_tiles[b, row], scale * LOG2E)
            ks, vs, gs = s.pack(k_tiles[b, row]), s.pack(v_tiles[b, row]), s.pack(grad_tiles[b, row])
            means = s.pack(mean_tiles[b, row])
            for column in range(columns):
                constant = s.bias[row == rows - 1, column == columns - 1]
                _logits(weights, constant, qs[column], ks[column])
                torch.exp2(weights.sub_(lse[b, row, column][..., None]), out=weights)
                torch.bmm(gs[column], vs[column].transpose(1, 2), out=slopes)
                values = torch.bmm(weights.transpose(1, 2), gs[column])
                slopes.sub_(means[column]).mul_(weights)
                if bias is not None:
                    dbias.add_(slopes)
                keys = torch.bmm(slopes.transpose(1, 2), qs[column]).div_(LOG2E)
                queries = torch.bmm(slopes, ks[column]).mul_(scale)
                dq_tiles[b, row, column].copy_(queries.unflatten(1, s.window).permute(1, 2, 0, 3))
                dk_tiles[b, row, column].add_(keys.unflatten(1, s.reach).permute(1, 2, 0, 3))
                dv_tiles[b, row, column].add_(values.unflatten(1, s.reach).permute(1, 2, 0, 3))
    top, left = (s.reach[0] - s.window[0]) // 2, (s.reach[1] - s.window[1]) // 2
    dk, dv = (
        s.unroll(t[:, top : top + q.shape[1], left : left + q.shape[2]]).to(q.dtype).contiguous()
        for t in (dk, dv)
    )
    return s.unroll(dq), dk, dv, dbias if bias is None else dbias.to(bias.dtype)


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


def _refuse(ctx, *grads):
    raise NotImplementedError("window_attention: no second derivative; backend='reference' has one")


_attention.register_autograd(_differentiate, setup_context=_save)
_attention_backward.register_autograd(_refuse)


@register_flop_formula(torch.ops.visionhybrid.window_attention)
def _operations(q, k, v, bias, window, reach, shift, scale, *args, **kwargs) -> int:
    """Of the two matrix products, from shapes, for torch's FlopCounterMode: every query meets reach[0] * reach[1] keys."""
    B, H, W, heads, dim = q
    return 2 * B * H * W * heads * reach[0] * reach[1] * (dim + v[4])
