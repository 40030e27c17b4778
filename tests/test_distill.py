"""Imitation of a teacher: the published step, and single modules."""

import copy

import pytest
import torch
from golden import load_case
from published import published
from torch import nn

import visionhybrid
from visionhybrid.train.distill import imitate, regress, relative_error, watched


def test_linfusions_published_step(tmp_path):
    from diffusers import DDPMScheduler

    case = load_case("linfusion_distill_sd15tinyb_eps")
    state = case.state_dict()
    student = published(case, tmp_path)
    teacher = copy.deepcopy(student)
    own = teacher.state_dict()
    own.update({k: state[f"teacher.{k}"] for k in own if "attn1" in k})
    teacher.load_state_dict(own)
    names = [row.name for row in visionhybrid.attach(student, "linfusion", weights=tmp_path).mixed]
    student.requires_grad_(False)
    for name in names:
        student.get_submodule(name).requires_grad_(True)
    latents, noise, time, text = (
        case.input(k) for k in ("latents", "noise", "timestep", "encoder_hidden_states")
    )
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    noisy = scheduler.add_noise(latents, noise, time)
    found = imitate(student, teacher, names, ((noisy, time, text), {"return_dict": False}))
    task = torch.nn.functional.mse_loss(found.prediction, noise)
    loss = task + 0.5 * found.output + 0.5 * found.features
    loss.backward()
    case.check("losses", torch.stack([task, found.output, found.features, loss]).detach())
    gradients = {
        f"grad_{i}_{key.removeprefix('mixer.').replace('.', '_')}": parameter.grad
        for i, name in enumerate(
            m["module_name"] for m in case.facts["kwargs"]["linfusion_config"]["modules_list"]
        )
        for key, parameter in student.get_submodule(name).named_parameters()
    }
    for name in [name for name in case.outputs if name.startswith("grad_")]:
        case.check(name, gradients[name])


def toy(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))


def test_regression_is_on_the_teachers_activations_and_its_gradient_is_right():
    teacher, student, x = toy(0), toy(1), torch.randn(5, 4)
    loss, each = regress(student, teacher, ["2", "4"], ((x,), {}))
    (2 * loss).backward()
    h = torch.nn.functional.gelu(teacher[0](x)).detach()
    by_hand, wanted = copy.deepcopy(student), teacher[2](h).detach()
    error = ((by_hand[2](h) - wanted).square().sum(1) / wanted.square().sum(1)).mean()
    assert torch.allclose(each["2"], error)
    error.backward()  # weight 1/2 of two modules, times 2
    assert torch.allclose(student[2].weight.grad, by_hand[2].weight.grad, atol=1e-6)
    assert student[0].weight.grad is None
    assert float(loss.detach()) == pytest.approx(float(each["2"] + each["4"]) / 2)


def test_regression_holds_one_module_at_a_time():
    """No node of autograd survives a module: what is kept are gradients of parameters."""
    teacher, student, x = toy(0), toy(1), torch.randn(5, 4)
    loss, _ = regress(student, teacher, ["2", "4"], ((x,), {}))
    leaves = [fn.variable for fn, _ in loss.grad_fn.next_functions if fn is not None]
    assert [id(p) for p in leaves] == [id(p) for i in (2, 4) for p in student[i].parameters()]
    with torch.no_grad():
        quiet, _ = regress(student, teacher, ["2", "4"], ((x,), {}))
    assert not quiet.requires_grad
    assert torch.allclose(quiet, loss)


def test_a_copy_has_no_error_and_hooks_are_gone():
    teacher, x = toy(0), torch.randn(5, 4)
    student = copy.deepcopy(teacher)
    found = imitate(student, teacher, ["2"], ((x,), {}))
    assert found.output == found.features == found.each["2"] == 0
    assert relative_error(student, teacher, ((x,), {})) == 0
    assert relative_error(toy(1), teacher, ((x,), {})) > 0
    with pytest.raises(RuntimeError), watched(student, ["2"]):
        student(torch.randn(5, 3))
    assert not any(m._forward_hooks for net in (student, teacher) for m in net.modules())
