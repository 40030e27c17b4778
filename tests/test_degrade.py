"""The degradations: golden numbers, definitions written out, the distributions of the published table, replay."""

import json
import math

import numpy as np
import pytest
import torch
from golden import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

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
    add_gaussian_noise,
    add_poisson_noise,
    apply,
    bell_kernel,
    compression,
    filter2d,
    filters,
    from_json,
    jpeg,
    jpeg_codec,
    make_kernel,
    preview,
    reflect_pad,
    sinc_kernel,
    to_json,
    trace,
    unsharp_mask,
)
from visionhybrid.data.images import read_image
from visionhybrid.data.metrics import psnr
from visionhybrid.data.samples import photographs

CASE = load_case("hat_degrade_ops_64x80")
OFFICIAL = {"iso": "gaussian_iso", "aniso": "gaussian_aniso"}
quick = settings(max_examples=40, deadline=None)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph(side=96):
    """A detailed part of a real photograph, (1, 3, side, side) in [0, 1]."""
    return photographs("val")[3].pixels[None, :, 150 : 150 + side, 200 : 200 + side] / 255


def golden_kernel(kind):
    facts = CASE.facts["kwargs"]["kernel"]
    return bell_kernel(kind, facts["size"], facts["sig_x"], facts["sig_y"], facts["theta"], facts["beta"])


# ---- operations against the published code --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BELLS)
def test_bell_kernels_golden(kind):
    want = CASE.outputs[f"k_{OFFICIAL.get(kind, kind)}"]
    torch.testing.assert_close(golden_kernel(kind), want, rtol=1e-12, atol=1e-15)


def test_sinc_kernel_golden():
    facts = CASE.facts["kwargs"]["sinc"]
    got = sinc_kernel(facts["cutoff"], facts["size"], pad_to=21)
    # The case was made with torch's J1, good to 5e-7; ours is compared with scipy's below.
    torch.testing.assert_close(got, CASE.outputs["k_sinc"], rtol=0, atol=5e-7)


def test_filter2d_golden():
    kernels = torch.stack([golden_kernel("aniso"), golden_kernel("plateau_iso")])
    CASE.check("filtered", filter2d(CASE.input("x"), kernels), rel=1e-6)


def test_unsharp_mask_golden():
    CASE.check("usm", unsharp_mask(CASE.input("x")), rel=1e-5)


def test_jpeg_golden():
    # A coefficient on a rounding boundary may flip, see the notes of the case.
    CASE.check("jpeg", jpeg(CASE.input("x"), CASE.facts["kwargs"]["jpeg_quality"]), rel=2e-3)


# ---- kernels --------------------------------------------------------------------------------------------------------


@quick
@given(
    kind=st.sampled_from(BELLS),
    size=st.integers(0, 10).map(lambda n: 2 * n + 1),
    sigma=st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)),
    theta=st.floats(-math.pi, math.pi),
    beta=st.floats(0.5, 4),
)
def test_bells_are_symmetric_weights(kind, size, sigma, theta, beta):
    kernel = bell_kernel(kind, size, *sigma, theta, beta)
    assert kernel.dtype == torch.float64
    assert kernel.min() >= 0
    assert kernel.sum().item() == pytest.approx(1)
    torch.testing.assert_close(kernel, kernel.flip(0, 1))
    assert kernel.argmax() == size * size // 2
    if not kind.endswith("aniso"):
        torch.testing.assert_close(kernel, kernel.mT)


def test_rotation_turns_from_columns_towards_rows():
    # Wide along x (columns) without rotation, along y (rows) after a quarter turn, down the diagonal at half of it.
    wide = bell_kernel("aniso", 9, 3.0, 0.5)
    assert wide[4, 8] > 100 * wide[8, 4]
    torch.testing.assert_close(bell_kernel("aniso", 9, 3.0, 0.5, math.pi / 2), wide.mT)
    diagonal = bell_kernel("aniso", 9, 3.0, 0.5, math.pi / 4)
    assert diagonal[8, 8] > 100 * diagonal[0, 8]


def test_families_meet_at_exponent_one():
    gauss = bell_kernel("aniso", 11, 2.0, 1.0, 0.3)
    torch.testing.assert_close(bell_kernel("generalized_aniso", 11, 2.0, 1.0, 0.3, beta=1), gauss)


@quick
@given(cutoff=st.floats(math.pi / 5, math.pi), size=st.integers(3, 10).map(lambda n: 2 * n + 1))
def test_sinc_is_round_and_padded(cutoff, size):
    from scipy.special import j1

    kernel = sinc_kernel(cutoff, size, pad_to=21)
    assert kernel.shape == (21, 21)
    assert kernel.sum().item() == pytest.approx(1)
    torch.testing.assert_close(kernel, kernel.mT)
    inner = kernel[10 - size // 2 : 11 + size // 2, 10 - size // 2 : 11 + size // 2]
    assert inner.count_nonzero() == kernel.count_nonzero()
    # The ratio to the centre is free of the normalisation: c J1(c r) / (2 pi r) over its limit at 0, c^2 / (4 pi).
    for r in range(1, size // 2 + 1):
        want = 2 * j1(cutoff * r) / (cutoff * r)
        assert (kernel[10, 10 + r] / kernel[10, 10]).item() == pytest.approx(want, abs=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bell_kernel("round", 7, 1.0), "have iso, aniso"),
        (lambda: bell_kernel("iso", 8, 1.0), "must be odd"),
        (lambda: bell_kernel("iso", 7, 0.0), "positive"),
        (lambda: sinc_kernel(4.0, 7), r"\(0, pi\]"),
        (lambda: sinc_kernel(1.0, 7, pad_to=10), "cannot centre"),
        (lambda: filter2d(torch.rand(2, 3, 8, 8), torch.rand(3, 5, 5)), "expected"),
        (lambda: filter2d(torch.rand(2, 3, 8, 8), torch.rand(4, 4)), "odd side"),
        (lambda: jpeg(torch.rand(2, 1, 8, 8), 50), r"\(B, 3, H, W\)"),
        (lambda: jpeg(torch.rand(2, 3, 8, 8), 100.0), r"in \(0, 100\)"),
        (lambda: jpeg(torch.rand(2, 3, 8, 8), [50.0, 60.0, 70.0]), "one or 2"),
        (lambda: jpeg_codec(torch.rand(3, 8, 8), 0), r"1\.\.100"),
        (lambda: jpeg_codec(torch.rand(2, 8, 8), 50), "1 or 3"),
        (lambda: add_gaussian_noise(torch.rand(2, 3, 8, 8), [1.0, 2.0, 3.0]), "expected one value or 2"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- filtering and sharpening ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "k"), [(9, 12, 5), (4, 3, 9), (1, 2, 7), (30, 1, 21)])
def test_filter2d_is_its_definition(height, width, k):
    x = torch.rand(2, 3, height, width, generator=generator(), dtype=torch.float64)
    kernel = torch.rand(2, k, k, generator=generator(1), dtype=torch.float64)
    p = k // 2
    want = np.zeros(x.shape)
    padded = np.pad(x.numpy(), [(0, 0), (0, 0), (p, p), (p, p)], mode="reflect")
    for i in range(k):
        for j in range(k):
            want += kernel[:, i, j].view(2, 1, 1, 1).numpy() * padded[:, :, i : i + height, j : j + width]
    torch.testing.assert_close(filter2d(x, kernel), torch.from_numpy(want))
    torch.testing.assert_close(filter2d(x, kernel[0])[0], filter2d(x, kernel)[0])


def test_reflect_pad_is_numpys():
    x = torch.arange(12.0).view(3, 4)
    want = np.pad(x.numpy(), [(5, 1), (0, 0)], mode="reflect")
    assert np.array_equal(reflect_pad(x, 5, 1, 0).numpy(), want)


def test_unsharp_mask_leaves_flat_pictures_and_sharpens_edges():
    faint = torch.full((1, 3, 60, 60), 0.5)
    faint[..., 30:] += 9 / 255  # below the threshold of 10 levels
    assert torch.equal(unsharp_mask(faint), faint)
    edge = torch.full((1, 3, 60, 60), 0.4)
    edge[..., 30:] = 0.6
    sharp = unsharp_mask(edge)
    assert sharp[..., 30, 31].min() > 0.61
    assert sharp[..., 30, 28].max() < 0.39
    assert sharp.min() >= 0
    assert sharp.max() <= 1


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_gaussian_noise_has_its_sigma_per_image():
    x = torch.full((3, 3, 200, 200), 0.5)
    noise = add_gaussian_noise(x, [5.0, 20.0, 0.0], generator=generator()) - x
    assert (noise.flatten(1).std(1) * 255).tolist() == pytest.approx([5, 20, 0], rel=0.02)
    assert noise.mean().abs() < 1e-3
    channels = torch.corrcoef(noise[1].flatten(1))
    assert (channels - torch.eye(3)).abs().max() < 0.03


def test_gray_gaussian_noise_is_one_field_for_all():
    x = torch.full((3, 3, 50, 60), 0.5)
    noise = add_gaussian_noise(x, [10.0, 20.0, 10.0], gray=[True, True, False], generator=generator()) - x
    torch.testing.assert_close(noise[0, 0], noise[0, 2])
    torch.testing.assert_close(2 * noise[0], noise[1], rtol=1e-3, atol=1e-6)
    assert (noise[2, 0] - noise[2, 1]).abs().max() > 0.05


def test_poisson_noise_has_the_variance_of_counts():
    # One level: V = 1 and the counts are those of one photon per unit of light.
    x = torch.full((1, 3, 300, 300), 0.2)
    noise = add_poisson_noise(x, 0.05, generator=generator()) - x
    assert noise.std().item() == pytest.approx(0.05 * math.sqrt(0.2), rel=0.02)
    # Five levels: V = 8.
    x[0, :, 0, :4] = torch.tensor([0.0, 0.4, 0.6, 0.8])
    noise = add_poisson_noise(x, 0.05, generator=generator()) - x
    assert noise.std().item() == pytest.approx(0.05 * math.sqrt(0.2 / 8), rel=0.02)


def test_poisson_noise_is_zero_in_the_dark_and_gray_when_asked():
    x = photograph(64).repeat(2, 1, 1, 1)
    x[:, :, :10] = 0
    noisy = add_poisson_noise(x, 1.0, gray=[True, False], generator=generator())
    assert torch.equal(noisy[1, :, :10], x[1, :, :10])
    noise = noisy - x
    inside = (noisy[0] > 0).all(0) & (noisy[0] < 1).all(0)  # where nothing was clamped
    assert inside.sum() > 1000
    torch.testing.assert_close(noise[0, 0][inside], noise[0, 2][inside])
    assert (noise[1, 0] - noise[1, 2]).abs().max() > 0.1


@quick
@given(seed=st.integers(0, 2**62), gray=st.booleans(), strength=st.floats(0, 60))
def test_noise_replays_and_stays_in_range(seed, gray, strength):
    x = torch.rand(2, 3, 9, 11, generator=generator(seed))
    for add in (add_gaussian_noise, add_poisson_noise):
        one, two = (add(x, strength, gray=gray, generator=generator(seed)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.min() >= 0
        assert one.max() <= 1
    torch.testing.assert_close(add_gaussian_noise(x, 0.0), x)


# ---- JPEG -----------------------------------------------------------------------------------------------------------


def test_jpeg_gets_worse_with_less_quality_and_any_size_works():
    x = photograph(90)[:, :, :77]
    scores = [psnr(jpeg(x, q), x).item() for q in (5, 20, 50.0, 75.5, 95)]
    assert scores == sorted(scores)
    assert scores[0] < 24
    assert scores[-1] > 30


def test_jpeg_is_near_a_real_codec_once_its_quirk_is_undone():
    # Transposed tables act on the transposed picture like the standard's on the picture.
    x = photograph(96)
    real = jpeg_codec(x[0], 40)[None]
    ours = jpeg(x.mT, 40).mT
    assert psnr(ours, real) > 38
    assert psnr(ours, real) > psnr(jpeg(x, 40), real) + 1


def test_jpeg_codec_grey():
    x = photograph(64)[0, :1]
    assert jpeg_codec(x, 30).shape == x.shape
    assert 22 < psnr(jpeg_codec(x, 30), x) < psnr(jpeg_codec(x, 95), x)


def test_jpeg_treats_each_image_by_itself():
    x = photograph(48).repeat(2, 1, 1, 1)
    both = jpeg(x, [20.0, 80.0])
    torch.testing.assert_close(both[0], jpeg(x[:1], 20.0)[0])
    torch.testing.assert_close(both[1], jpeg(x[:1], 80.0)[0])


# ---- plans ----------------------------------------------------------------------------------------------------------


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
