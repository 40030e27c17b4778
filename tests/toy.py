"""A system small enough to see through: what the tests of loading, saving and registering use beside the real ones."""

from __future__ import annotations

import re

import torch
from torch import nn

from visionhybrid.models.checkpoint import rename
from visionhybrid.models.registry import System

RULES = (
    (r"(stem|head)\.(.+)", r"\1.\2"),
    (r"layers\.(\d+)\.lin\.(.+)", r"blocks.\1.conv.\2"),
    (r"layers\.(\d+)\.bn\.(.+)", r"blocks.\1.norm.\2"),
    (r"index_table", None),
)


class Block(nn.Module):
    def __init__(self, dim, **dd):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x):
        return self.norm(self.conv(x)).relu() + x

    def deploy(self):
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        conv = nn.Conv2d(*self.conv.weight.shape[1::-1], 1).to(self.conv.weight.device)
        with torch.no_grad():
            conv.weight.copy_(self.conv.weight * scale[:, None, None, None])
            conv.bias.copy_(self.norm.bias - self.norm.running_mean * scale)
        self.conv, self.norm = conv, nn.Identity()


class Toy(nn.Module):
    """A classifier: convolution, residual blocks, mean, linear; `gain` scales the logits and shows in no tensor."""

    def __init__(
        self,
        *,
        in_chans=3,
        num_classes=1000,
        depth=2,
        dim=8,
        gain=1.0,
        global_pool="avg",
        drop_rate=0.0,
        **dd,
    ):
        super().__init__()
        self.num_classes, self.num_features, self.in_chans, self.gain = num_classes, dim, in_chans, gain
        self.stem = nn.Conv2d(in_chans, dim, 3, padding=1, **dd)
        self.blocks = nn.Sequential(*(Block(dim, **dd) for _ in range(depth)))
        self.head = nn.Linear(dim, num_classes, **dd)
        self.feature_info = [dict(num_chs=dim, reduction=1, module="blocks")]

    def forward(self, x):
        return self.gain * self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def deploy(self):
        for block in self.blocks:
            block.deploy()
        return self


def build(
    *,
    in_chans=3,
    num_classes=1000,
    depth=2,
    dim=8,
    gain=1.0,
    global_pool="avg",
    drop_rate=0.0,
    device=None,
    dtype=None,
):
    return Toy(
        in_chans=in_chans,
        num_classes=num_classes,
        depth=depth,
        dim=dim,
        gain=gain,
        device=device,
        dtype=dtype,
    )


def recognise(state):
    return any(re.fullmatch(r"(layers\.0\.lin|blocks\.0\.conv)\.weight", key) for key in state)


def convert(state):
    return rename(state, RULES) if any(key.startswith("layers.") for key in state) else dict(state)


def options(state, **given):
    layers = {match[1] for key in state if (match := re.match(r"(?:layers|blocks)\.(\d+)\.", key))}
    shapes = dict(
        in_chans=state["stem.weight"].shape[1],
        dim=state["stem.weight"].shape[0],
        num_classes=state["head.weight"].shape[0],
        depth=len(layers),
    )
    if "blocks.0.conv.bias" in state:
        shapes["deployed"] = True
    return {**shapes, **given}


TOY = System(
    name="toy",
    task="classification",
    build=build,
    recognise=recognise,
    options=options,
    convert=convert,
    paper="none",
    source="tests/toy.py",
    license="Apache-2.0",
    purpose="A toy.",
)


def randomised(model):
    """Every float tensor random (running variances positive), so that no two layers are alike."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else torch.randn_like(value) / 4)
    return model.eval()


def authors(model):
    """The state of `model` under the names of its imaginary authors, with a table that nobody needs."""
    state = {}
    for name, value in model.state_dict().items():
        name = re.sub(
            r"blocks\.(\d+)\.conv", r"layers.\1.lin", re.sub(r"blocks\.(\d+)\.norm", r"layers.\1.bn", name)
        )
        state[name] = value.clone()
    return {**state, "index_table": torch.arange(4)}


def same(model, toy):
    """`model` is in eval mode and gives what `toy` gives, bit for bit."""
    x = torch.randn(2, toy.in_chans, 6, 7)
    assert not model.training
    torch.testing.assert_close(model(x), toy(x), rtol=0, atol=0)
