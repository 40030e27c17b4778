"""The optimiser that finds its own rate, against its algorithm written out."""

import copy
from math import sqrt

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from visionhybrid.train import state
from visionhybrid.train.prodigy import Prodigy


def gradients(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=generator, dtype=torch.float64) + 1 for _ in range(count)]


def by_hand(x, given, lr, decay, safeguard):
    """arXiv:2306.06101 algorithm 4, with Adam's corrections of bias and decoupled decay."""
    beta1, beta2 = 0.9, 0.999
    d = d0 = 1e-6
    start, m, v, s, r = x.clone(), 0 * x, 0 * x, 0 * x, 0.0
    for k, g in enumerate(given, 1):
        rate = d * lr * sqrt(1 - beta2**k) / (1 - beta1**k)
        r = sqrt(beta2) * r + d / d0 * rate * float(g @ (start - x))
        m, v = beta1 * m + (1 - beta1) * d * g, beta2 * v + (1 - beta2) * d * d * g * g
        s = sqrt(beta2) * s + d / d0 * (d if safeguard else rate) * g
        d = max(d, r / float(s.abs().sum()))
        x = x - decay * rate * x
        x = x - rate * m / (v.sqrt() + d * 1e-8)
    return x, d


@pytest.mark.parametrize("safeguard", [True, False])
def test_its_steps_are_the_algorithms(safeguard):
    parameters = [torch.nn.Parameter(torch.full((n,), 2.0, dtype=torch.float64)) for n in (2, 3)]
    optimiser = Prodigy(parameters, lr=0.5, weight_decay=0.1, safeguard_warmup=safeguard)
    given = gradients(200)
    for g in given:
        for p, part in zip(parameters, g.split([2, 3]), strict=True):
            p.grad = part.clone()
        optimiser.step()
    x, d = by_hand(torch.full((5,), 2.0, dtype=torch.float64), given, 0.5, 0.1, safeguard)
    assert optimiser.param_groups[0]["d"] == pytest.approx(d)
    assert d > 2e-6
    torch.testing.assert_close(torch.cat([p.detach() for p in parameters]), x)


def test_timm_makes_it_and_a_checkpoint_holds_it():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True).sin()
    optimiser = create_optimizer_v2(net, opt="prodigy", lr=1.0, weight_decay=1e-4, betas=(0.9, 0.99))

    def steps(net, optimiser, count):
        losses = []
        for _ in range(count):
            optimiser.zero_grad()
            loss = F.mse_loss(net(x), y)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    losses = steps(net, optimiser, 200)
    assert losses[-1] < losses[0] / 5  # from a rate of a millionth
    twin = copy.deepcopy(net)
    tree, tensors = state.pack(optimiser.state_dict())
    again = create_optimizer_v2(twin, opt="prodigy", lr=1.0, weight_decay=1e-4, betas=(0.9, 0.99))
    again.load_state_dict(state.unpack(tree, {name: value.clone() for name, value in tensors.items()}))
    assert steps(net, optimiser, 3) == steps(twin, again, 3)
