"""The operations of degradations: golden numbers, definitions written out."""

import math

import numpy as np
import pytest
import torch
from golden import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from visionhybrid.data.degrade import (
    BELLS,
    add_gaussian_noise,
    add_poisson_noise,
    bell_kernel,
    filter2d,
    jpeg,
    jpeg_codec,
    reflect_pad,
    sinc_kernel,
    unsharp_mask,
)
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
