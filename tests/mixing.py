"""Every mixer written out with the N x N matrix of weights, in float64: what `tests/test_mixers.py` compares with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from math import log, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visionhybrid.mixers import Mixer

Definition = Callable[[Mixer, Tensor, Tensor, Tensor, tuple[int, ...], int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A mixer with options that show something, and its definition."""

    name: str
    definition: Definition
    options: dict[str, Any] = field(default_factory=dict)


def places(grid: tuple[int, ...]) -> Tensor:
    """(N, axes): coordinates in raster order."""
    return torch.tensor(list(product(*(range(side) for side in grid))))


def attend(q: Tensor, k: Tensor, v: Tensor, see: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (scale * q @ k.mT).masked_fill(~see, float("-inf")).softmax(-1) @ v


def joint(see: Tensor, text: int) -> Tensor:
    """A mask among image tokens with text before it, which sees and is seen by all."""
    return F.pad(see, (text, 0, text, 0), value=True)


def softmax(mixer, q, k, v, grid, text):
    return attend(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), mixer.scale)


def linfusion(mixer, q, k, v, grid, text):
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT / k.shape[2]
    return weights @ v / k.shape[2] / (weights.sum(-1, keepdim=True) + 1e-4) * k.shape[2]


def linear(mixer, q, k, v, grid, text):
    weights = q.relu() @ k.relu().mT
    out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-15)
    if mixer.conv is None:
        return out
    weight, bias = mixer.conv.weight, mixer.conv.bias
    B, heads, _, D = v.shape
    maps = v[:, :, text:].mT.reshape(B, heads * D, *grid)
    frames = [maps] if len(grid) == 2 else maps.unbind(2)
    done = [
        F.conv2d(x, weight.to(v.dtype), bias.to(v.dtype), padding="same", groups=heads * D) for x in frames
    ]
    local = torch.stack(done, 2).reshape(B, heads, D, -1).mT
    return out + F.pad(local, (0, 0, text, 0))


def lina(mixer, q, k, v, grid, text):
    weights = (q.relu() + 1e-6) @ (k.relu() + 1e-6).mT / k.shape[2]
    return weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)


def hyena(mixer, q, k, v, grid, text):
    """Each tap by itself: a token sees itself through the last one, its predecessor through the one before, ..."""

    def filtered(x, layer, first=0):
        if layer is None:
            return x
        heads, width = x.shape[1], x.shape[3]
        part = slice(first * heads * width, (first + 1) * heads * width)
        taps = layer.weight[part, 0].to(x.dtype).view(heads, 1, width, -1)
        out = layer.bias[part].to(x.dtype).view(heads, 1, width).expand_as(x)
        for back, tap in enumerate(reversed(taps.unbind(-1))):
            out = out + tap * F.pad(x, (0, 0, back, 0))[:, :, : x.shape[2]]
        return out

    q, k, v = (filtered(x, mixer.short_filter, i) for i, x in enumerate((q, k, v)))
    return q * filtered(k * v, mixer.inner_filter)


def neighborhood(mixer, q, k, v, grid, text):
    options = [
        x if isinstance(x, list) else [x] * len(grid)
        for x in (mixer.kernel_size, mixer.stride, mixer.dilation, mixer.causal)
    ]
    see = torch.ones(1, 1, dtype=torch.bool)
    for side, kernel, stride, dilation, causal in zip(grid, *options, strict=True):
        kernel = kernel or side
        axis = torch.zeros(side, side, dtype=torch.bool)
        for x in range(side):
            group = list(range(x % dilation, side, dilation))
            last, index = len(group) - 1, x // dilation
            if causal:
                leader = min(index // stride * stride + stride - 1, last)
                seen = [g for i, g in enumerate(group) if leader - kernel < i <= index]
            else:
                leader = min(index // stride * stride + stride // 2, last)
                start = min(max(leader - kernel // 2, 0), max(len(group) - kernel, 0))
                seen = group[start : start + kernel]
            axis[x, seen] = True
        see = torch.kron(see, axis)
    return attend(q, k, v, joint(see, text), mixer.scale)


def window(mixer, q, k, v, grid, text):
    see = torch.ones(1, 1, dtype=torch.bool)
    for i, side in enumerate(grid):
        size, shift, overlap = (
            x[i] if isinstance(x, list) else x for x in (mixer.window_size, mixer.shift, mixer.overlap)
        )
        shift = shift if size < side else 0
        wider = int(size * overlap)
        first = (torch.arange(side) - shift) // size * size + shift - wider // 2
        key = torch.arange(side)
        see = torch.kron(see, (first[:, None] <= key) & (key < first[:, None] + size + wider))
    return attend(q, k, v, joint(see, text), mixer.scale)


def clear(mixer, q, k, v, grid, text):
    at = places(grid).double()
    see = joint(torch.cdist(at, at) < mixer.radius - 1e-9, text)
    scale = mixer.scale
    if mixer.trained_tokens:
        length = q.shape[2] * (10 if mixer.down > 1 else 1)
        scale = (log(length) / log(mixer.trained_tokens) / q.shape[3]) ** 0.5
    if mixer.down > 1:
        *frames, height, width = grid
        d, weight = mixer.down, mixer.spatial_weight.to(q.dtype)
        index = torch.arange(prod(grid)).view(prod(frames), height, width) + text
        pooled = {id(k): [], id(v): []}
        for frame, y, x in product(range(prod(frames)), range(0, height, d), range(0, width, d)):
            cell = index[frame].index_select(0, torch.arange(y, y + d).clamp(max=height - 1))
            cell = cell.index_select(1, torch.arange(x, x + d).clamp(max=width - 1))
            for tensor in (k, v):
                pooled[id(tensor)].append((tensor[:, :, cell] * weight[..., None]).sum((2, 3)))
        k, v = (torch.cat([x, torch.stack(pooled[id(x)], 2)], 2) for x in (k, v))
        beside = torch.ones(q.shape[2], k.shape[2] - q.shape[2], dtype=torch.bool)
        beside[:text] = False
        see = torch.cat([see, beside], 1)
    return attend(q, k, v, see, scale)


def sla(mixer, q, k, v, grid, text):
    image = [x[:, :, text:] for x in (q, k)]
    means = [
        torch.stack([b.mean(2) for b in x.split(size, 2)], 2)
        for x, size in zip(image, (mixer.block_q, mixer.block_k), strict=True)
    ]
    with torch.no_grad():
        order = (means[0] @ means[1].mT).argsort(-1, descending=True)
    n = order.shape[-1]
    top = max(1, int(mixer.topk * n))
    low = min(n - top, int(mixer.negligible * n)) if mixer.version == "paper" else 0
    ranks = order.argsort(-1)
    tokens = torch.arange(prod(grid))
    ranks = ranks[..., (tokens // mixer.block_q)[:, None], (tokens // mixer.block_k)[None]]
    ranks = F.pad(ranks, (text, 0), value=-1)  # text keys are critical
    rest = torch.ones_like(ranks, dtype=torch.bool)
    if mixer.version != "main":
        rest = (ranks >= top) & (ranks < n - low)
    phi = dict(softmax=lambda x: x.softmax(-1), elu=lambda x: F.elu(x) + 1, relu=torch.relu)[
        mixer.feature_map
    ]
    weights = phi(q[:, :, text:]) @ phi(k).mT * rest
    total = weights.sum(-1, keepdim=True) + (1e-5 if mixer.version == "main" else 0)
    linear = torch.where(total > 0, weights @ v / total.clamp(min=1e-300), 0.0)
    weight, bias = mixer.proj_l.weight.to(q.dtype), mixer.proj_l.bias.to(q.dtype)
    out = attend(q[:, :, text:], k, v, ranks < top, mixer.scale) + linear @ weight.mT + bias
    return torch.cat([softmax(mixer, q[:, :, :text], k, v, grid, text), out], 2)


def agent(mixer, q, k, v, grid, text):
    """Groups of tokens as a matrix of means, one image and one head at a time."""
    *frames, height, width = grid
    n, (sy, sx) = prod(grid), mixer.cell
    index = torch.arange(n).view(prod(frames), height, width)
    whole = index[:, : max(1, height // sy * sy) : sy, : max(1, width // sx * sx) : sx]
    first = whole.flatten().tolist()
    rest = [i for i in range(n) if i not in first]
    outs = []
    for b in range(len(q)):
        with torch.no_grad():
            unit = F.normalize(k[b, :, text:].transpose(0, 1).flatten(1), dim=1)
            best = (unit[rest] @ unit[first].mT).max(1)
            order = best.values.argsort(descending=True).tolist()

        def groups(share, order=order, best=best):
            count = int(share * n)
            members = [[rest[i]] for i in order[count:]] + [
                [f] + [rest[i] for i in order[:count] if best.indices[i] == j] for j, f in enumerate(first)
            ]
            mean = torch.zeros(len(members), n, dtype=q.dtype)
            for row, member in enumerate(members):
                mean[row, member] = 1 / len(member)
            return mean

        mean, few = groups(mixer.ratio), groups(mixer.agent_ratio)
        qm, km, vm = (mean @ x[b, :, text:] for x in (q, k, v))
        agents = few @ q[b, :, text:]
        keys, values = torch.cat([k[b, :, :text], km], 1), torch.cat([v[b, :, :text], vm], 1)
        scale = q.shape[3] ** -0.5 if mixer.scale is None else mixer.scale
        if 2 * len(few) < len(mean):
            summary = (scale * agents @ keys.mT).softmax(-1) @ values
            out = (scale**mixer.sharpness * qm @ agents.mT).softmax(-1) @ summary + mixer.shortcut * vm
        else:
            out = (scale * qm @ keys.mT).softmax(-1) @ values
        outs.append((mean > 0).to(q.dtype).mT @ out)
    return torch.cat([softmax(mixer, q[:, :, :text], k, v, grid, text), torch.stack(outs)], 2)


SAMPLES = {
    "softmax": Sample(name="softmax", definition=softmax),
    "softmax, scale": Sample(name="softmax", definition=softmax, options=dict(scale=0.3)),
    "linfusion": Sample(name="linfusion", definition=linfusion),
    "linfusion, narrow": Sample(name="linfusion", definition=linfusion, options=dict(mid_dim=4)),
    "linear": Sample(name="linear", definition=linear),
    "linear, conv": Sample(name="linear", definition=linear, options=dict(conv=5)),
    # its convolution and gates: test_mixers_golden.py
    "lina": Sample(name="lina", definition=lina, options=dict(conv=0)),
    "hyena": Sample(name="hyena", definition=hyena),
    "hyena, no inner filter": Sample(name="hyena", definition=hyena, options=dict(inner=0)),
    "hyena, no short filters": Sample(name="hyena", definition=hyena, options=dict(short=0, inner=3)),
    "sla main": Sample(name="sla", definition=sla, options=dict(block_q=16, block_k=8, topk=0.3)),
    "sla v1, elu": Sample(
        name="sla",
        definition=sla,
        options=dict(version="v1", block_q=8, block_k=8, topk=0.3, feature_map="elu"),
    ),
    "sla paper": Sample(
        name="sla",
        definition=sla,
        options=dict(version="paper", block_q=8, block_k=8, topk=0.2, negligible=0.4, scale=0.2),
    ),
    "clear": Sample(name="clear", definition=clear, options=dict(radius=3)),
    "clear, pooled": Sample(
        name="clear", definition=clear, options=dict(radius=2.5, down=2, trained_tokens=40)
    ),
    "agent": Sample(name="agent", definition=agent, options=dict(cell=3)),
    "agent, merging only": Sample(name="agent", definition=agent, options=dict(cell=[2, 3], agent_ratio=0.5)),
    "neighborhood": Sample(name="neighborhood", definition=neighborhood, options=dict(kernel_size=5)),
    "neighborhood, blocked": Sample(
        name="neighborhood", definition=neighborhood, options=dict(kernel_size=4, stride=4, scale=0.4)
    ),
    "neighborhood, dilated": Sample(
        name="neighborhood", definition=neighborhood, options=dict(kernel_size=3, dilation=2, stride=2)
    ),
    "neighborhood, causal": Sample(
        name="neighborhood", definition=neighborhood, options=dict(kernel_size=None, causal=True)
    ),
    "window": Sample(name="window", definition=window, options=dict(window_size=4)),
    "window, shifted": Sample(
        name="window", definition=window, options=dict(window_size=4, shift=2, scale=0.3)
    ),
    "window, overlapping": Sample(
        name="window", definition=window, options=dict(window_size=4, overlap=0.75)
    ),
}
