"""Deployed convolutions with a shortcut: the sum in one call, written over what is the model's own and over nothing else."""

import pytest
import torch
import torch.nn.functional as F
from test_nextvit import TINY

from visionhybrid.models.layers import DeployedConv2d, channels_last
from visionhybrid.models.nextvit import NextViT


@pytest.mark.parametrize("kind", ["channels_last", "contiguous", "other type", "with gradient"])
def test_a_deployed_convolution_adds_its_shortcut(kind):
    torch.manual_seed(0)
    conv = DeployedConv2d(8, 16, 1)
    x, shortcut = torch.randn(2, 8, 5, 3), torch.randn(2, 16, 5, 3)
    if kind == "channels_last":
        x, shortcut = channels_last(x), channels_last(shortcut)
    elif kind == "other type":
        shortcut = shortcut.double()
    elif kind == "with gradient":
        conv.requires_grad_(False)
        shortcut = channels_last(shortcut).requires_grad_()
    want = shortcut.detach() + F.conv2d(x, conv.weight, conv.bias).detach()
    with torch.set_grad_enabled(kind == "with gradient"):
        found = conv(x, shortcut)
    torch.testing.assert_close(found.detach(), want, rtol=1e-5, atol=1e-5)  # both multiply in float32
    # Only where nothing is in the way is the sum written over the shortcut.
    assert (found.data_ptr() == shortcut.data_ptr()) == (kind == "channels_last")


def test_a_deployed_model_leaves_its_input_and_its_features_alone():
    model = NextViT(**TINY, drop_rate=0.5).eval()
    model.deploy()
    x = channels_last(torch.randn(1, 3, 64, 64))
    before, caught = x.clone(), []
    # The second block of a stage takes the first one's output as it is.
    model.stages[1].blocks[0].register_forward_hook(
        lambda module, args, out: caught.append((out, out.clone()))
    )
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(*caught[0], rtol=0, atol=0)
