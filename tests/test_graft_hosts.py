"""Grafts in the denoisers of diffusers' pipelines: each family's teacher and student, without data."""

import pytest
import tiny_pipelines
import tiny_transformers
import torch
from torch import nn

import visionhybrid
from visionhybrid.train.config import Grafting
from visionhybrid.train.distill import distance, output, substituted
from visionhybrid.train.graft import Grafts


def unet():
    return tiny_pipelines.unet(), tiny_pipelines.unet_inputs()


def dit():
    image = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = dict(hidden_states=image, timestep=torch.tensor([9, 700]), class_labels=torch.tensor([1, 2]))
    return tiny_pipelines.dit().transformer, inputs


def pixart():
    noise = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 4, 16, 12, generator=noise), torch.randn(2, 5, 32, generator=noise)
    inputs = dict(hidden_states=image, encoder_hidden_states=text, timestep=torch.tensor([9, 700]))
    return tiny_pipelines.pixart().transformer, inputs


FAMILIES = {"unet": unet, "dit": dit, "pixart": pixart} | {
    name: lambda name=name: (tiny_transformers.transformer(name), tiny_transformers.INPUTS[name]())
    for name in ("flux", "sd3", "sana", "wan", "cogvideox", "hunyuan_video")
}


class NoTask:
    """Nothing but a config."""

    def __init__(self, config):
        self.config, self.notes = config, []


class Toy(Grafts, NoTask):
    def __init__(self, teacher, **options):
        self.given = teacher
        super().__init__(Grafting(**options))

    def open_teacher(self):
        return self.given


# one that needs no grid, one that does; HunyuanVideo's mask is for mixers that take one
CASES = [(family, "linfusion") for family in FAMILIES] + [
    (f, "clear") for f in FAMILIES if f != "hunyuan_video"
]
OPTIONS = {"linfusion": dict(zero_init=False), "clear": dict(radius=1.5, down=2)}


@pytest.mark.parametrize(("family", "mixer"), CASES)
def test_a_students_attention_is_compared_on_the_teachers_activations(family, mixer):
    model, inputs = FAMILIES[family]()
    inputs = {**inputs, "return_dict": False}
    own = output(model, ((), inputs))
    task = Toy(model, mixer=mixer, mixer_options=OPTIONS[mixer])
    net = task.parts()["model"]
    # the teacher is told the grid, and is the same
    assert distance(output(task.teacher, ((), inputs)), own) < 1e-10
    assert not any(p.requires_grad for p in task.teacher.parameters())
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert all(name.startswith(tuple(f"student.{layer}." for layer in net.names)) for name in trained)

    loss, each = net(phase="alone", **inputs)
    assert each.keys() == set(net.names)
    loss.backward()
    assert all(p.grad.any() for name, p in trained.items() if ".mixer." in name)
    found = net(phase="whole", **inputs)
    assert found.features > 0
    assert distance(found.prediction.detach().double(), own) > 1e-8
    net.zero_grad()
    (found.output + found.features).backward()
    assert all(p.grad.any() for name, p in trained.items() if ".mixer." in name)

    # one layer converted, in place of the teacher's or in a model of its own
    first, *_ = net.names
    with substituted(task.teacher, net.student, {first}):
        one = output(task.teacher, ((), inputs))
    mixed = task.only({first}, net.student)
    assert [row.name for row in visionhybrid.describe(mixed).mixed] == [first]
    assert distance(output(mixed, ((), inputs)), one) < 1e-10
    assert distance(one, own) > 1e-10


def test_what_is_trained_and_compared_is_a_choice():
    model, _ = FAMILIES["flux"]()
    task = Toy(
        model,
        mixer="clear",
        mixer_options=dict(radius=2, down=2),
        train="projections",
        features=("single*.1.attn",),
    )
    net = task.parts()["model"]
    assert net.features == ["single_transformer_blocks.1.attn"]
    trained = {name.split(".attn.")[1].split(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"to_q", "to_k", "to_v", "to_out", "mixer"}
    same = {n: p for n, p in model.named_parameters() if ".attn.to_" in n and "add" not in n}
    kept = dict(net.student.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in same.items())
    again, _ = FAMILIES["flux"]()
    drawn = dict(Toy(again, mixer="clear", projections="fresh").parts()["model"].student.named_parameters())
    assert not any(torch.equal(drawn[name], value) for name, value in same.items())
    assert all(isinstance(p, nn.Parameter) for p in drawn.values())
