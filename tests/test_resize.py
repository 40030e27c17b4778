"""MATLAB's resizing."""

import math

import pytest
import torch
from golden import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from visionhybrid.data.resize import imresize, modcrop

CASE = load_case("hat_degrade_ops_64x80")
quick = settings(max_examples=40, deadline=None)

# ---- resize ---------------------------------------------------------------------------------------------------------


def resize_by_definition(x, out, scale):
    """One row of numbers, output by output, tap by tap, exactly as the documentation says."""

    def cubic(t):
        t = abs(t)
        if t <= 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t <= 2 else 0.0

    n, shrink = len(x), min(scale, 1)
    result = []
    for k in range(1, out + 1):
        u = k / scale + (1 - 1 / scale) / 2
        total = weight = 0.0
        for i in range(math.floor(u - 2 / shrink) - 1, math.ceil(u + 2 / shrink) + 2):
            w = cubic(shrink * (u - i))
            at = i - 1
            while not 0 <= at < n:  # mirror at the outer edge of the last pixel, again and again
                at = -1 - at if at < 0 else 2 * n - 1 - at
            total, weight = total + w * x[at], weight + w
        result.append(total / weight)
    return result


@pytest.mark.parametrize(("name", "scale"), [("down", 1 / 4), ("up", 4)])
def test_imresize_golden(name, scale):
    x = CASE.input("x")
    x = x if name == "down" else x[:, :, :24, :24]
    CASE.check(name, imresize(x, scale), rel=1e-6)


@quick
@given(n=st.integers(1, 90), out=st.integers(1, 90))
def test_imresize_is_its_definition(n, out):
    x = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    want = torch.tensor(resize_by_definition(x.tolist(), out, out / n), dtype=torch.float64)
    torch.testing.assert_close(imresize(x[None], size=(1, out))[0], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(imresize(x[:, None], size=(out, 1))[:, 0], want, rtol=0, atol=1e-12)


@quick
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    scale=st.sampled_from([1 / 8, 1 / 4, 1 / 3, 0.5, 0.77, 1, 1.5, 2, 3, 4]),
    value=st.floats(-10, 10),
)
def test_constant_images_survive(height, width, scale, value):
    y = imresize(torch.full((2, height, width), value, dtype=torch.float64), scale)
    assert y.shape == (2, math.ceil(height * scale), math.ceil(width * scale))
    torch.testing.assert_close(y, torch.full_like(y, value), rtol=1e-12, atol=1e-12)


@quick
@given(scale=st.sampled_from([1 / 4, 1 / 3, 0.5, 2, 3, 4]), slope=st.floats(-5, 5), offset=st.floats(-5, 5))
def test_linear_images_survive_away_from_the_borders(scale, slope, offset):
    x = slope * torch.arange(96, dtype=torch.float64) + offset
    y = imresize(x.expand(3, 96), size=(3, round(96 * scale)))
    position = (torch.arange(y.shape[1], dtype=torch.float64) + 0.5) / scale - 0.5
    inner = slice(2, -2) if scale < 1 else slice(2 * int(scale), -2 * int(scale))
    torch.testing.assert_close(y[0, inner], (slope * position + offset)[inner], rtol=0, atol=1e-9)


@quick
@given(seed=st.integers(0, 1000), scale=st.sampled_from([2, 3, 4]))
def test_shrinking_what_was_enlarged_gives_it_back_nearly(seed, scale):
    coarse = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    smooth = imresize(coarse, 4)
    there_and_back = imresize(imresize(smooth, scale), 1 / scale)
    assert there_and_back.shape == smooth.shape
    assert (there_and_back - smooth).abs().max() < 0.1
    # Much nearer than a resize that forgets to stretch the kernel would come on detail.
    checks = (torch.arange(48).view(-1, 1) + torch.arange(48)).remainder(2).double()
    assert (imresize(checks, 1 / scale)[3:-3, 3:-3] - 0.5).abs().max() < 0.1


def test_imresize_mirrors_and_flips_alike():
    x = CASE.input("x")
    for flip in ([-1], [-2], [-1, -2]):
        torch.testing.assert_close(imresize(x.flip(flip), 0.5), imresize(x, 0.5).flip(flip))
    torch.testing.assert_close(imresize(x.mT, 1 / 3), imresize(x, 1 / 3).mT)


def test_imresize_uint8_rounds_and_saturates_after_each_axis():
    x = torch.zeros(40, 40, dtype=torch.uint8)
    x[10:30, 10:30] = 255
    rows = imresize(x.double(), size=(160, 40)).add(0.5).floor().clamp(0, 255)
    want = imresize(rows, size=(160, 160)).add(0.5).floor().clamp(0, 255)
    got = imresize(x, 4)
    assert got.dtype == torch.uint8
    assert torch.equal(got.double(), want)
    assert imresize(x.double(), 4).max() > 255  # the overshoot that saturation removes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16])
def test_imresize_keeps_the_dtype(dtype):
    x = CASE.input("x") * 200
    got = imresize(x.to(dtype), 0.5)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), imresize(x, 0.5), rtol=0.01, atol=1.0)


def test_imresize_is_differentiable():
    x = torch.rand(1, 7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: imresize(t, size=(4, 12)), x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either scale or size"),
        ({"scale": 2, "size": (3, 3)}, "either scale or size"),
        ({"scale": 0}, "positive"),
        ({"scale": float("nan")}, "positive"),
        ({"size": (0, 3)}, "at least 1"),
        ({"size": (3, 2.5)}, "whole numbers"),
    ],
)
def test_imresize_misuse(options, message):
    with pytest.raises(ValueError, match=message):
        imresize(torch.rand(3, 8, 8), **options)


def test_imresize_refuses_what_is_not_an_image():
    for bad in (
        torch.rand(5),
        torch.rand(3, 0, 4),
        torch.ones(3, 3).bool(),
        torch.ones(3, 3, dtype=torch.cfloat),
    ):
        with pytest.raises(ValueError, match="imresize: expected"):
            imresize(bad, 2)


def test_modcrop():
    assert modcrop(torch.rand(3, 17, 24), 4).shape == (3, 16, 24)
    with pytest.raises(ValueError, match="3x24 holds no multiple of 4"):
        modcrop(torch.rand(3, 3, 24), 4)
