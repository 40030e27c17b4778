"""Plans of degradations: the distributions of the published table, replay, what cannot be planned."""

import json
import math

import pytest
import torch
from hypothesis import settings

from visionhybrid.data import resize
from visionhybrid.data.degrade import (
    BELLS,
    FIRST,
    SECOND,
    Bicubic,
    Jpeg,
    Noise,
    SecondOrder,
    Step,
    apply,
    compression,
    filters,
    from_json,
    jpeg,
    make_kernel,
    preview,
    to_json,
    trace,
    unsharp_mask,
)
from visionhybrid.data.images import read_image
from visionhybrid.data.samples import photographs

quick = settings(max_examples=40, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph(side=96):
    """A detailed part of a real photograph, (1, 3, side, side) in [0, 1]."""
    return photographs("val")[3].pixels[None, :, 150 : 150 + side, 200 : 200 + side] / 255


def draws(count, **options):
    return [SecondOrder(**options).draw(seed, size=(400, 400)) for seed in range(count)]


def steps(plans, name):
    return [step.params for plan in plans for step in plan if step.name == name]


@pytest.mark.parametrize(
    "degradation",
    [Bicubic(4), Bicubic(4, eight_bit=True), Noise((3.0, 30.0)), Jpeg(), SecondOrder(), SecondOrder(scale=2)],
)
def test_plans_replay_from_their_seed_and_from_json(degradation):
    x = photograph(96).repeat(2, 1, 1, 1)
    for seed in range(4):
        plan = degradation.draw(seed, size=(96, 96), batch=2)
        assert plan == degradation.draw(seed, size=(96, 96), batch=2)
        y = apply(x, plan)
        assert y.shape == (2, 3, 96 // degradation.scale, 96 // degradation.scale)
        assert y.isfinite().all()
        again = from_json(to_json(plan))
        assert again == plan
        assert torch.equal(apply(x, again), y)
    if not isinstance(degradation, Bicubic):
        assert degradation.draw(1, size=(96, 96)) != degradation.draw(2, size=(96, 96))


def test_result_is_eight_bit_and_starts_sharpened():
    x = photograph(96)
    plan = SecondOrder().draw(0, size=(96, 96))
    y = apply(x, plan)
    assert torch.equal((y * 255).round() / 255, y)
    first, after = next(iter(trace(x, plan)))
    assert first.name == "sharpen"
    assert torch.equal(after, unsharp_mask(x))
    assert all(step.name != "sharpen" for step in SecondOrder(sharpen=False).draw(0, size=(96, 96)))


def near(values, probability):
    """Whether the share of true values is within four standard deviations of `probability`."""
    values = list(values)
    return abs(sum(values) / len(values) - probability) < 4 * math.sqrt(0.25 / len(values))


def test_choices_follow_the_published_table():
    plans = draws(2000)
    kernels = [k for p in steps(plans, "blur") for k in p["kernel"]]
    bells = [k for k in kernels if k["kind"] in BELLS]
    for kind, probability in zip(BELLS, FIRST.kernel_prob, strict=True):
        assert near((k["kind"] == kind for k in bells), probability)
    blurs = [[s.params["kernel"][0] for s in plan if s.name == "blur"] for plan in plans]
    assert near((len(b) == 3 for b in blurs), 0.8)
    assert near((b[0]["kind"] == "sinc" for b in blurs), 0.1)
    assert near((b[-1]["kind"] == "sinc" for b in blurs), 0.8)
    assert near((b[0]["size"] == 13 for b in blurs), 1 / 8)
    assert {b[0]["size"] for b in blurs} == set(range(7, 22, 2))
    factors = [next(s.params["factor"] for s in plan if s.name == "resize") for plan in plans]
    assert near((f > 1 for f in factors), 0.2)
    assert near((f < 1 for f in factors), 0.7)
    assert near((p["mode"] == "area" for p in steps(plans, "resize")), 1 / 3)
    noises = [[s for s in plan if s.name.endswith("noise")] for plan in plans]
    for stage in (0, 1):
        assert near((n[stage].name == "gaussian_noise" for n in noises), 0.5)
        assert near((n[stage].params["gray"][0] for n in noises), 0.4)
    assert near((plan[-2].name == "jpeg" for plan in plans), 0.5)
    betas = [k["beta"] for k in bells if "beta" in k]
    assert near((b > 1 for b in betas if b != 1), 0.5 / (1 - plateau_at_one(bells)))


def plateau_at_one(bells):
    """The share of betas that are exactly 1: U[1, 1] of the plateau kinds."""
    betas = [k["beta"] for k in bells if "beta" in k]
    return sum(b == 1 for b in betas) / len(betas)


def within(values, low, high):
    """All values inside, and reaching to 5 % of the range from both ends."""
    values = list(values)
    reach = 0.05 * (high - low)
    return low <= min(values) <= low + reach and high - reach <= max(values) <= high


def test_ranges_follow_the_published_table():
    plans = draws(2000)
    first = [next(s.params["kernel"][0] for s in plan if s.name == "blur") for plan in plans]
    assert within((k["sigma_x"] for k in first if "sigma_x" in k), 0.2, 3)
    assert within((k["theta"] for k in first if "theta" in k), -math.pi, math.pi)
    assert within((k["beta"] for k in first if k["kind"].startswith("generalized")), 0.5, 4)
    assert within((k["beta"] for k in first if k["kind"].startswith("plateau")), 1, 2)
    assert within(
        (k["cutoff"] for k in first if k["kind"] == "sinc" and k["size"] < 13), math.pi / 3, math.pi
    )
    assert within(
        (k["cutoff"] for k in first if k["kind"] == "sinc" and k["size"] >= 13), math.pi / 5, math.pi
    )
    factors = [[s.params for s in plan if s.name == "resize"] for plan in plans]
    assert within((f[0]["factor"] for f in factors), 0.15, 1.5)
    assert within((p["size"][0] for f in factors for p in f[1:]), 30, 120)
    qualities = [p["quality"][0] for p in steps(plans, "jpeg")]
    assert within(qualities, 30, 95)
    noises = [[s for s in plan if s.name.endswith("noise")] for plan in plans]
    for index, stage in enumerate((FIRST, SECOND)):
        sigma = [n[index].params["sigma"][0] for n in noises if n[index].name == "gaussian_noise"]
        scale = [n[index].params["scale"][0] for n in noises if n[index].name == "poisson_noise"]
        assert within(sigma, 1, (30, 25)[index])
        assert within(scale, 0.05, (3, 2.5)[index])
        assert stage.gray_prob == 0.4


def test_a_batch_shares_what_the_table_says_it_shares():
    for seed in range(10):
        plan = SecondOrder().draw(seed, size=(80, 80), batch=5)
        for step in plan:
            for name, value in step.params.items():
                per_image = name in ("kernel", "sigma", "scale", "gray", "quality")
                assert isinstance(value, list) == (per_image or name == "size")
                if per_image:
                    assert len(value) == 5
                if name in ("sigma", "scale", "quality"):
                    assert len(set(value)) == 5
    y = apply(photograph(80).repeat(5, 1, 1, 1), plan)
    assert y.shape == (5, 3, 20, 20)


def test_a_batch_is_its_images_where_no_noise_is_shared():
    plan = [
        Step("blur", {"kernel": [{"kind": "identity"}, {"kind": "iso", "size": 7, "sigma_x": 1.0}]}),
        Step("jpeg", {"quality": [30.0, 90.0]}),
        Step("resize", {"mode": "area", "size": [16, 16]}),
        Step("round", {}),
    ]
    x = photograph(64).repeat(2, 1, 1, 1)
    both = apply(x, plan)
    for i in (0, 1):
        own = [
            Step(s.name, {k: [v[i]] if k in ("kernel", "quality") else v for k, v in s.params.items()})
            for s in plan
        ]
        torch.testing.assert_close(apply(x[:1], own)[0], both[i], rtol=0, atol=1.01 / 255)


def test_tiny_pictures_survive_the_second_order():
    for seed in range(20):
        plan = SecondOrder(scale=4).draw(seed, size=(8, 4))
        assert apply(torch.rand(1, 3, 8, 4, generator=generator(seed)), plan).shape == (1, 3, 2, 1)


def test_plans_that_make_no_sense():
    x = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no operation 'blurr'; have sharpen, blur"):
        apply(x, [Step("blurr", {})])
    with pytest.raises(ValueError, match="no mode 'lanczos'; have area"):
        apply(x, [Step("resize", {"mode": "lanczos", "factor": 2.0})])
    with pytest.raises(ValueError, match=r"expected \(B, C, H, W\)"):
        apply(x[0], [])
    for text in ("nonsense", "[1]", '[{"name": "blur"}]', json.dumps({"name": "blur"})):
        with pytest.raises(ValueError, match="not a degradation plan"):
            from_json(text)
    with pytest.raises(ValueError, match="no kind 'square'"):
        make_kernel({"kind": "square", "size": 3, "sigma_x": 1.0})


def test_preview_draws_every_step_of_every_seed(tmp_path):
    image = photograph(80)[0]
    plans = preview(image, SecondOrder(), tmp_path / "sheet.png", seeds=[3, 4])
    assert plans == [SecondOrder().draw(s, size=(80, 80)) for s in (3, 4)]
    sheet = read_image(tmp_path / "sheet.png").pixels
    cell_height = sheet.shape[1] // 2
    assert sheet.shape[2] == 200 * (1 + max(len(plan) for plan in plans))
    # The last cell of the first row shows the result.
    result = apply(image[None], plans[0])[0]
    left = 200 * len(plans[0]) + 2
    shown = sheet[:, 2:198, left : left + 196]
    want = torch.nn.functional.interpolate(result[None], (196, 196), mode="nearest-exact")[0]
    torch.testing.assert_close(shown, want, rtol=0, atol=0.51 / 255)
    assert sheet[:, 200:cell_height, :200].min() < 0.5  # text
    with pytest.raises(ValueError, match="at least one seed"):
        preview(image, SecondOrder(), tmp_path / "none.png", seeds=[])


@pytest.mark.parametrize(
    "change",
    [lambda x: resize.imresize(x, 0.5), unsharp_mask, lambda x: jpeg(x, 50)],
    ids=["resize", "sharpen", "jpeg"],
)
def test_what_inference_keeps_can_be_trained_with(change):
    for kept in (resize._bands, filters._gaussian, compression._dct, compression._tables):
        kept.cache_clear()
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        change(x)
    change(x.requires_grad_()).backward(torch.rand_like(change(x)))
    assert x.grad.isfinite().all()
