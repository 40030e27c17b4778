"""The discriminator, the perceptual loss, and the task that trains with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models import vgg
from train_case import outcome

from visionhybrid.data.samples import photographs
from visionhybrid.train import loop, perceptual, run
from visionhybrid.train.config import Adversarial, ConfigError, Loop, Model, Optim, Pictures
from visionhybrid.train.discriminator import UNetDiscriminator
from visionhybrid.train.gan import RestoreAdversarially
from visionhybrid.train.losses import fooled

NARROW = ((4, 4), (4, 4), (4,) * 4, (4,) * 4, (4,) * 4)


def images(*shape, seed=0):
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind()


# ---- discriminator --------------------------------------------------------------------------------------------------


def test_discriminator_is_the_published_one():
    net = UNetDiscriminator()
    # Parameters of UNetDiscriminatorSN with 64 features, and its keys.
    assert sum(p.numel() for p in net.parameters()) == 4376897
    assert {"conv0.bias", "conv1.weight_orig", "conv8.weight_u", "conv4.weight_v", "conv9.weight"} < set(
        net.state_dict()
    )
    assert "conv1.bias" not in net.state_dict()
    assert net(torch.rand(2, 3, 24, 32)).shape == (2, 1, 24, 32)
    with pytest.raises(ValueError, match="multiples of 8"):
        net(torch.rand(1, 3, 20, 24))


def test_discriminator_by_hand():
    net, x = UNetDiscriminator(1, 2), torch.rand(1, 1, 16, 16)
    for _ in range(5):
        net(x)  # power iterations: the norms of fresh random vectors may be next to nothing
    net.eval()
    state = net.state_dict()

    def conv(name, x, stride=1):
        if f"{name}.weight" in state:
            return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, 1)
        weight, u, v = (state[f"{name}.weight_{s}"] for s in ("orig", "u", "v"))
        sigma = u @ weight.flatten(1) @ v
        return F.conv2d(x, weight / sigma, None, stride, 1)

    def act(x):
        return torch.where(x > 0, x, 0.2 * x)

    def double(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    c0 = act(conv("conv0", x))
    c1 = act(conv("conv1", c0, 2))
    c2 = act(conv("conv2", c1, 2))
    y = act(conv("conv4", double(act(conv("conv3", c2, 2))))) + c2
    y = act(conv("conv5", double(y))) + c1
    y = act(conv("conv6", double(y))) + c0
    y = conv("conv9", act(conv("conv8", act(conv("conv7", y)))))
    torch.testing.assert_close(net(x), y)


# ---- perceptual loss ------------------------------------------------------------------------------------------------


def test_features_are_those_before_the_last_relu_of_each_section():
    theirs = vgg.make_layers(vgg.cfgs["E"])
    ours = perceptual.Perceptual({f"features.{k}": v for k, v in theirs.state_dict().items()})
    x, y = images(1, 3, 32, 40)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    want, wanted = [], {}
    for image in (x, y):
        z = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        for place, layer in enumerate(theirs):
            z = layer(z.clone())  # its ReLUs work in place
            if place in (2, 7, 16, 25, 34):
                wanted.setdefault(place, []).append(z.clone())
    for feature, (a, _) in zip(ours.features(x), wanted.values(), strict=True):
        torch.testing.assert_close(feature, a)
    want = sum(
        w * (a - b).abs().mean() for w, (a, b) in zip((0.1, 0.1, 1, 1, 1), wanted.values(), strict=True)
    )
    torch.testing.assert_close(ours(x, y), want)
    assert not any(p.requires_grad for p in ours.parameters())


def narrow_weights():
    places = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
    g = torch.Generator().manual_seed(0)
    state = {}
    for place in places:
        state[f"features.{place}.weight"] = torch.randn(4, 4 if place else 3, 3, 3, generator=g) / 5
        state[f"features.{place}.bias"] = torch.randn(4, generator=g) / 5
    return state


@pytest.fixture
def vgg_file(tmp_path, monkeypatch):
    """A VGG19 of four channels in a file."""
    monkeypatch.setattr(perceptual, "SECTIONS", NARROW)
    path = tmp_path / "vgg.pth"
    torch.save(narrow_weights(), path)
    return path


def test_weights_come_from_a_file_and_never_from_the_net(vgg_file, tmp_path, monkeypatch):
    x, y = images(1, 3, 16, 16)
    loss = perceptual.load(vgg_file)
    assert loss(x, y) > 0
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"vgg19-dcbb9e9d\.pth does not exist; get https://") as caught:
        perceptual.load()
    assert "\n" not in str(caught.value)
    vgg_file.rename(hub / perceptual.FILE)
    assert torch.equal(perceptual.load()(x, y), loss(x, y))
    torch.save({**narrow_weights(), "features.10.bias": torch.zeros(5)}, hub / perceptual.FILE)
    with pytest.raises(ValueError, match=r"features\.10\.bias must be \(4,\), found \(5,\)"):
        perceptual.load()
    torch.save({"fc.weight": torch.zeros(5)}, hub / perceptual.FILE)
    with pytest.raises(ValueError, match=r"features\.0\.weight must be \(4, 3, 3, 3\), found nothing"):
        perceptual.load()


# ---- the task -------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A restorer of three layers."""

    def __init__(self, scale=4, in_chans=3, num_classes=0, **_):
        super().__init__()
        self.scale, self.in_chans, self.multiple_of, self.num_classes = scale, in_chans, 1, num_classes
        self.one = nn.Conv2d(in_chans, 8, 3, padding=1)
        self.two = nn.Conv2d(8, in_chans * scale**2, 3, padding=1)

    def forward(self, x):
        y = F.pixel_shuffle(self.two(F.relu(self.one(x))), self.scale)
        return y + F.interpolate(x, scale_factor=self.scale, mode="nearest")


def tiny_gan_restorer(
    pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs
):
    return Tiny(**kwargs)


timm.models.register_model(tiny_gan_restorer)


@pytest.fixture
def config(vgg_file, tmp_path):
    """Six steps of the second, sharper stage on two photographs."""
    folder = tmp_path / "high"
    folder.mkdir()
    for photograph in photographs("val", channels=3)[:2]:
        from PIL import Image

        Image.fromarray(photograph.pixels[:, :96, :112].permute(1, 2, 0).numpy()).save(
            folder / f"{photograph.name}.png"
        )
    return Adversarial(
        name="tiny",
        model=Model(name="tiny_gan_restorer"),
        optim=Optim(name="adam", lr=1e-3, betas=(0.9, 0.99)),
        loop=Loop(
            batch_size=4,
            steps=6,
            workers=0,
            log_every=1,
            checkpoint_every=2,
            validate_every=3,
            ema_decay=0.9,
            tensorboard=False,
        ),
        data=Pictures(
            source="folder", high=str(folder), degradation="second_order", patch=8, orient="flip", repeat=6
        ),
        sharp=("pixel", "perceptual"),
        vgg=str(vgg_file),
        width=4,
    )


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """The published pieces of 400 pixels take long to degrade."""
    from visionhybrid.data.realworld import RealWorld

    init = RealWorld.__init__
    monkeypatch.setattr(
        RealWorld, "__init__", lambda self, *args, **kw: init(self, *args, **{**kw, "piece": 64})
    )


def log_rows(out: Path):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def test_a_run_trains_both_networks_and_releases_the_first(config, tmp_path):
    result = run(config, tmp_path / "run", progress=False)
    rows = log_rows(tmp_path / "run")
    assert len(rows) == 6
    for row in rows:
        assert row["loss"] == pytest.approx(row["pixel"] + row["perceptual"] + row["adversarial"], rel=1e-4)
        assert row["discriminator_loss"] > 0
        assert {"discriminator_real", "discriminator_fake", "discriminator_grad_norm"} < row.keys()
    assert set(load_file(result["weights"])) == set(Tiny().state_dict())
    steps = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    first, last = (load_file(steps[i] / "discriminator.safetensors") for i in (0, -1))
    assert not torch.equal(first["conv1.weight_orig"], last["conv1.weight_orig"])


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_a_killed_run_continues_with_the_same_bits(config, tmp_path, monkeypatch, micro_batch):
    config = replace(config, loop=replace(config.loop, micro_batch=micro_batch))

    class KilledError(BaseException):
        pass

    record = loop.Trainer._record

    def die(self, values):
        if self.step == 3:
            raise KilledError
        record(self, values)

    run(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_record", die)
        with pytest.raises(KilledError):
            run(config, tmp_path / "killed", progress=False)
    run(config, tmp_path / "killed", progress=False)
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.fixture
def task(config):
    torch.manual_seed(0)
    task = RestoreAdversarially(config)
    return task, task.parts(), task.collate([task.train_set.sample(i, i) for i in (0, 1)], 0)


def test_the_first_network_learns_through_a_discriminator_that_stays_as_it_is(task):
    task, parts, batch = task
    assert set(batch) == {"lq", "gt", "sharp"}
    judge = {name: p.detach().clone() for name, p in parts["discriminator"].named_parameters()}
    loss, terms = task.loss("model", parts, batch)
    loss.backward()
    assert all(p.grad is None for p in parts["discriminator"].parameters())
    assert all(torch.equal(p, judge[name]) for name, p in parts["discriminator"].named_parameters())
    assert all(p.grad.abs().max() > 0 for p in parts["model"].parameters())
    output = parts["model"](batch["lq"])
    assert terms["pixel"].item() == pytest.approx((output - batch["sharp"]).abs().mean().item())
    assert terms["perceptual"].item() == pytest.approx(task.perceptual(output, batch["sharp"]).item())
    parts["discriminator"].eval()  # without a further power iteration
    wanted = 0.1 * fooled(parts["discriminator"](output))
    assert terms["adversarial"].item() == pytest.approx(wanted.item(), rel=0.05)


def test_each_loss_has_its_truth_and_its_weight(task):
    task, parts, batch = task
    output = parts["model"](batch["lq"]).detach()
    plain, sharp = ((output - batch[key]).abs().mean().item() for key in ("gt", "sharp"))
    assert plain != pytest.approx(sharp, rel=1e-3)
    for chosen, distance in (((), plain), (("pixel",), sharp), (("adversarial",), plain)):
        task.config = replace(task.config, sharp=chosen, pixel_weight=3.0)
        _, terms = task.loss("model", parts, batch)
        assert terms["pixel"].item() == pytest.approx(3 * distance)
    seen = []
    parts["discriminator"].register_forward_hook(lambda module, given, made: seen.append(given[0]))
    task.loss("discriminator", parts, batch)
    assert torch.equal(seen[-1][:2], batch["sharp"])


def test_the_discriminator_judges_what_was_made_before_the_update(task):
    task, parts, batch = task
    made = parts["model"](batch["lq"]).detach()
    task.loss("model", parts, batch)
    with torch.no_grad():
        parts["model"].two.weight.add_(1)
    seen = []
    parts["discriminator"].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    loss, _ = task.loss("discriminator", parts, batch)
    assert torch.equal(seen[-1], torch.cat([batch["gt"], made]))
    loss.backward()
    assert all(p.grad is None for p in parts["model"].parameters())
    assert all(p.grad.abs().max() > 0 for p in parts["discriminator"].parameters())
    # Cut differently, as after running out of memory: made anew. In the next step the old ones are gone.
    task.loss("discriminator", parts, {name: x[:1] for name, x in batch.items()})
    assert torch.equal(seen[-1][1:], parts["model"](batch["lq"][:1]).detach())
    task.loss("model", parts, batch)
    assert len(task._made) == 1


def test_adversarial_training_works_on_ordinary_pairs_without_vgg(config, tmp_path):
    config = replace(
        config,
        model=Model(name="tiny_gan_restorer", options=dict(scale=2)),
        data=Pictures(source="samples", scale=2, patch=16, held_out_crop=32),
        sharp=(),
        perceptual_weight=0.0,
        vgg="",
        loop=replace(config.loop, steps=2, validate_every=2),
    )
    result = run(config, tmp_path / "run", progress=False)
    assert 10 < result["metrics"]["psnr"] < 60
    assert "perceptual" not in log_rows(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data=Pictures(source="samples", scale=2, patch=16)), "sharp: sharpened truth needs"),
        (dict(sharp=(), data=Pictures(source="samples", scale=1, patch=12)), "multiple of 8, got 12"),
        (dict(sharp=(), data=Pictures(source="samples", scale=4, channels=1)), "needs data.channels=3"),
    ],
)
def test_recipes_that_cannot_work(config, change, message):
    with pytest.raises(ConfigError, match=message):
        RestoreAdversarially(replace(config, **change))


def test_the_published_recipes():
    from visionhybrid.train import recipes

    plain, sharper = recipes.find("hat_real_x4_gan"), recipes.find("hat_real_x4_gan_sharper")
    assert (plain.pixel_weight, plain.perceptual_weight, plain.adversarial_weight) == (1, 1, 0.1)
    assert plain.loss == "l1"
    assert plain.sharp == ()
    assert sharper.sharp == ("pixel", "perceptual")
    assert sharper.loop.steps == 400_000
    assert plain.optim.lr == 1e-4
