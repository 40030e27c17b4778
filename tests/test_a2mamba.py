"""A2Mamba: mixers, blocks and whole models against the official code's numbers, keys, options, sizes, mixed precision.

What holds for every backbone is in `tests/test_models.py`.
"""

import pytest
import torch
from golden import list_cases, load_case

import visionhybrid
from visionhybrid.models import a2mamba
from visionhybrid.models.a2mamba import A2SSM, A2Mamba, Block, GlobalMixer, StateSpaceMixer
from visionhybrid.models.a2mamba.keys import block_key
from visionhybrid.models.layers import RotaryGrid

TINY = dict(depths=(1, 1, 2, 1), dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), proj_dim=48, num_classes=5)


def tiny(**kwargs):
    return A2Mamba(**{**TINY, **kwargs})


def cases(*kinds):
    return [name for name in list_cases() if name.startswith(tuple(f"a2mamba_{kind}_" for kind in kinds))]


# ---- the official numbers


@pytest.mark.parametrize("name", cases("n", "t", "s", "b", "l"))
def test_golden_model(name):
    case = load_case(name)
    model = visionhybrid.load({"model": case.state_dict()}, image_size=case.facts["kwargs"]["image_size"])
    assert model.state_dict().keys() == a2mamba.convert(case.state_dict()).keys()
    check(model, case)
    check(model.deploy(), case)


def check(model, case):
    with torch.inference_mode():
        final, taps = model.forward_intermediates(case.input("x"))
        case.check("logits", model.forward_head(final))
    for i, (tap, step) in enumerate(zip(taps, (4, 4, 2, 1), strict=True), start=1):
        case.check(f"stage{i}", tap[..., ::step, ::step])


@pytest.mark.parametrize("name", cases("mass", "massglobal", "block", "a2ssm"))
def test_golden_part(name):
    """A mixer, a block or a state space alone: the output, and the gradient of input and parameters for a given cotangent."""
    case = load_case(name)
    kwargs, x = case.facts["kwargs"], case.input("x").requires_grad_()
    part, prefix = build(kwargs)
    state = {
        ours(prefix, key): value for key, value in case.state_dict().items() if not key.endswith("rpb.0")
    }
    target = part.state_dict()
    part.load_state_dict({key: value.view_as(target[key]) for key, value in state.items()}, strict=True)
    part.eval()
    heads = kwargs["num_heads"]
    args = () if isinstance(part, A2SSM) else (RotaryGrid(x.shape[1] // heads)(x),)
    y = part(x, *args)
    case.check("y", y)
    y.backward(case.input("g"))
    case.check("dx", x.grad)
    gradients = dict(part.named_parameters())
    for key in [key for key in case.outputs if key.startswith("d:")]:
        grad = gradients[ours(prefix, key[2:])].grad
        case.check(key, grad.view_as(case.outputs[key]))


def build(kwargs):
    """The part that a case names, and what its keys have before them in a block."""
    if "d_model" in kwargs:
        return A2SSM(kwargs["d_model"], num_heads=kwargs["num_heads"]), "token_mixer.ssm."
    common = dict(num_heads=kwargs["num_heads"], kernel_size=kwargs["window_size"])
    dim = kwargs["embed_dim"]
    if kwargs["global_mode"]:
        height, width = kwargs["image_size"]
        mixer = GlobalMixer(dim, tokens=height * width, **common)
    else:
        mixer = StateSpaceMixer(dim, **common)
    if "ffn_dim" not in kwargs:
        return mixer, "token_mixer."
    scale = "layer_scale" if kwargs["layerscale"] else "plain"
    residual = "residual_scale" if kwargs["resscale"] else scale
    return Block(dim, mixer=lambda dim: mixer, hidden=kwargs["ffn_dim"], residual=residual), ""


def ours(prefix, key):
    return block_key(prefix + key).removeprefix(block_key(prefix))
