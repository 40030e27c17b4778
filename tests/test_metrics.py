"""Scores against the published code's numbers, against definitions written out here, and against misuse."""

import math

import numpy as np
import pytest
import torch
from golden import load_case
from hypothesis import given, settings
from hypothesis import strategies as st

from visionhybrid.data.metrics import (
    confusion_matrix,
    psnr,
    ssim,
    to_luma,
    top_k_accuracy,
    top_k_hits,
)

CASE = load_case("hat_metrics_64x80")
SCORES = {"psnr": psnr, "ssim": ssim}


def images(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(2, *shape, generator=g).unbind()


@pytest.mark.parametrize("space", ["y", "rgb"])
@pytest.mark.parametrize("score", ["psnr", "ssim"])
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.float32, torch.float64])
def test_golden(score, space, kind):
    truth = CASE.input("gt")
    tested = truth + CASE.input("noise")
    if kind.is_floating_point:
        truth, tested = truth.to(kind) / 255, tested.to(kind) / 255
    got = SCORES[score](
        tested.to(kind), truth.to(kind), crop_border=CASE.facts["kwargs"]["crop_border"], space=space
    )
    assert got.dtype == torch.float64
    CASE.check(f"{score}_{space}", got)


def ssim_by_definition(a, b):
    """SSIM of two (H, W) arrays on the 8-bit scale, position by position."""
    offset = np.arange(11) - 5
    window = np.exp(-(offset**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
            cov = (window * x * y).sum() - mx * my
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_ssim_is_its_definition():
    a, b = images(2, 13, 17)
    a8, b8 = (a * 255).round().double().numpy(), (b * 255).round().double().numpy()
    want = np.mean([ssim_by_definition(x, y) for x, y in zip(a8, b8, strict=True)])
    assert ssim(a, b, space="rgb").item() == pytest.approx(want, abs=1e-12)


def test_psnr_is_its_definition():
    # One of 100 pixels of one of three channels is off by 51 levels: 0.2 * 255.
    truth = torch.zeros(3, 10, 10)
    tested = truth.clone()
    tested[1, 4, 5] = 0.2
    assert psnr(tested, truth, space="rgb").item() == pytest.approx(10 * math.log10(255**2 * 300 / 51**2))
    luma = 128.553 * 51 / 255
    assert psnr(tested, truth).item() == pytest.approx(10 * math.log10(255**2 * 100 / luma**2))


def test_luma_range_and_no_rounding():
    ends = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert to_luma(ends).flatten().tolist() == pytest.approx([16, 235])
    assert to_luma(torch.tensor([1.0, 0, 0]).view(3, 1, 1)).item() == pytest.approx(16 + 65.481 / 255)


def test_identical_images():
    a, _ = images(3, 12, 12)
    assert psnr(a, a).item() == math.inf
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-12)
    # Equality is decided after rounding to 8 bits.
    assert psnr((a * 255).round() / 255 + 1e-4, a).item() == math.inf


def test_output_is_clamped_and_rounded_but_truth_is_checked():
    truth = torch.ones(1, 3, 12, 12)
    assert psnr(truth * 1.7, truth).item() == math.inf
    with pytest.raises(ValueError, match=r"truth must be in \[0, 1\]"):
        psnr(truth, truth * 1.7)


@pytest.mark.parametrize("score", [psnr, ssim])
def test_batches_are_scored_image_by_image(score):
    a, b = images(4, 3, 16, 20)
    got = score(a, b, crop_border=2)
    assert got.shape == (4,)
    each = torch.stack([score(x, y, crop_border=2) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(got, each, rtol=1e-12, atol=0)


@pytest.mark.parametrize("score", [psnr, ssim])
def test_border_does_not_count_and_is_cut_before_the_windows(score):
    a, b = images(3, 19, 21)
    want = score(a[:, 4:-4, 4:-4], b[:, 4:-4, 4:-4])
    a[:, :4], b[:, :, -4:] = 0, 1
    torch.testing.assert_close(score(a, b, crop_border=4), want)


def test_grey_images_are_scored_as_they_are():
    a, b = images(1, 14, 14)
    assert psnr(a, b).item() == psnr(a, b, space="rgb").item()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), step=st.floats(1e-3, 0.3))
def test_more_noise_never_scores_higher(seed, step):
    truth, noise = images(3, 16, 16, seed=seed)
    near, far = truth + step * (noise - truth), truth + 3 * step * (noise - truth)
    assert psnr(near, truth) >= psnr(far, truth)
    assert ssim(near, truth) <= 1


@pytest.mark.parametrize("score", [psnr, ssim])
def test_a_nan_is_not_a_score(score):
    a, b = images(3, 12, 12)
    a[0, 6, 6] = float("nan")
    assert score(a, b).isnan()


@pytest.mark.parametrize("score", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (torch.rand(3, 12, 12), torch.rand(3, 12, 13), {}, "of one shape"),
        (torch.rand(12, 12), torch.rand(12, 12), {}, r"\(C, H, W\)"),
        (torch.rand(0, 3, 12, 12), torch.rand(0, 3, 12, 12), {}, "of one shape"),
        (torch.rand(3, 12, 12), torch.rand(3, 12, 12), {"crop_border": 6}, "leaves nothing"),
        (torch.rand(3, 12, 12), torch.rand(3, 12, 12), {"crop_border": -1}, "leaves nothing"),
        (torch.rand(3, 12, 12), torch.rand(3, 12, 12), {"space": "ycbcr"}, "have y, rgb"),
        (torch.rand(4, 12, 12), torch.rand(4, 12, 12), {}, "luma needs 1 or 3 channels, got 4"),
        (torch.full((3, 12, 12), 300), torch.zeros(3, 12, 12, dtype=torch.int), {}, r"0\.\.255"),
        (torch.zeros(3, 12, 12).bool(), torch.zeros(3, 12, 12).bool(), {}, "torch.bool"),
        (torch.rand(3, 12, 12) * 255, torch.rand(3, 12, 12) * 255, {}, r"\[0, 1\]"),
    ],
)
def test_misuse(score, a, b, options, message):
    with pytest.raises(ValueError, match=message):
        score(a, b, **options)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.rand(3, 30, 12), torch.rand(3, 30, 12), crop_border=1)


def test_top_k():
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.3, 0.35]])
    labels = torch.tensor([1, 1, 0, 0])
    assert top_k_hits(logits, labels).tolist() == [True, False, False, True]
    assert top_k_hits(logits, labels, 2).tolist() == [True, True, False, True]
    assert [top_k_accuracy(logits, labels, k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]


def test_diverged_or_constant_logits_do_not_score():
    labels = torch.zeros(4, dtype=torch.long)
    assert top_k_accuracy(torch.full((4, 5), float("nan")), labels, 5) == 0
    # Ties: exactly one class can be the first.
    hits = [top_k_hits(torch.zeros(1, 5), torch.tensor([c])).item() for c in range(5)]
    assert sum(hits) == 1


def test_confusion_matrix():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2])
    want = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
    assert torch.equal(confusion_matrix(predicted, labels, 4), want)
    assert torch.equal(confusion_matrix(labels[:0], labels[:0], 2), torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_hits(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)), "expected"),
        (lambda: top_k_hits(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 4), r"1\.\.3"),
        (lambda: top_k_hits(torch.zeros(2, 3), torch.tensor([0, 3])), r"0\.\.2, got 0\.\.3"),
        (lambda: top_k_hits(torch.zeros(2, 3), torch.zeros(2)), "must be integers"),
        (lambda: top_k_accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), "at least one"),
        (lambda: confusion_matrix(torch.tensor([-1]), torch.tensor([0]), 3), r"got -1"),
        (lambda: confusion_matrix(torch.tensor([1]), torch.tensor([0, 1]), 3), "expected two"),
    ],
)
def test_classification_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
