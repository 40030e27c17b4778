"""Tiles: what they must not change, how they shrink when memory runs out, and the published hard-seam mode."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from visionhybrid.infer.memory import Count
from visionhybrid.infer.tiles import out_of_memory, pasted, tiled, weights, windows


def enlarge(mode: str, scale: int):
    return lambda x: F.interpolate(x, scale_factor=scale, mode=mode)


@st.composite
def cuts(draw):
    """(height, width, tile, overlap, multiple_of), all legal."""
    step = draw(st.sampled_from([1, 2, 5, 8]))
    tile = draw(st.integers(step, 48))
    return draw(st.integers(1, 90)), draw(st.integers(1, 90)), tile, draw(st.integers(0, tile // 2)), step


@given(cuts(), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_a_model_that_sees_one_pixel_is_reproduced(cut, scale, seed):
    height, width, tile, overlap, step = cut
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    sizes = []

    def fn(window):
        sizes.append(window.shape[-2:])
        return enlarge("nearest", scale)(window) * 2 - 1

    y = tiled(fn, x, scale=scale, tile=tile, overlap=overlap, multiple_of=step)
    torch.testing.assert_close(y, enlarge("nearest", scale)(x) * 2 - 1, rtol=0, atol=4e-6)
    assert max(max(size) for size in sizes) <= tile


@given(cuts(), st.sampled_from([2, 3, 4]))
@settings(max_examples=150, deadline=None)
def test_constant_and_linear_images_survive(cut, scale):
    """Bilinear enlargement is not linear within half a pixel of an edge: only the image's own edge may show it."""
    height, width, tile, overlap, step = cut
    tile, overlap = max(tile, 4), max(overlap, 2)
    slope = torch.linspace(0.1, 0.9, height)[:, None] * 0.5 + torch.linspace(0.0, 0.5, width)
    for x in (torch.full((1, 1, height, width), 0.7), slope[None, None]):
        y = tiled(
            enlarge("bilinear", scale),
            x,
            scale=scale,
            tile=tile,
            overlap=overlap,
            multiple_of=min(step, tile // 2),
        )
        torch.testing.assert_close(y, enlarge("bilinear", scale)(x), rtol=0, atol=3e-7)


@given(st.integers(1, 300), cuts())
@settings(max_examples=300, deadline=None)
def test_windows_cover_align_and_overlap(length, cut):
    _, _, size, overlap, step = cut
    spans = windows(length, size, overlap, step)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    shared = min(-(-overlap // step) * step, size // step // 2 * step)
    for (a, b), (c, d) in pairwise(spans):
        assert a < c < d
        assert b - c >= shared
    assert all(a % step == 0 and 0 < b - a <= max(size, step) for a, b in spans)
    total = torch.zeros(length * 2, dtype=torch.float64)
    for (a, b), w in zip(spans, weights(spans, 2), strict=True):
        assert (w >= 0).all()
        total[a * 2 : b * 2] += w
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    # At the image's own borders nothing fades.
    assert weights(spans, 2)[0][0] == pytest.approx(1)
    assert weights(spans, 2)[-1][-1] == pytest.approx(1)


def test_weights_are_smooth():
    spans = windows(200, 64, 32)
    steps = torch.cat([w.diff().abs() for w in weights(spans, 4)])
    assert steps.max() < 0.03  # a rise over 16 pixels at scale 4: pi / 2 / 64


def convolutions(radius: int) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.GELU()]
    for _ in range(radius - 2):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)).eval()


def test_a_network_that_sees_no_further_than_a_quarter_of_the_overlap_is_reproduced():
    x = torch.rand(1, 3, 75, 101)
    with torch.no_grad():
        fn = convolutions(radius=4)
        whole = fn(x)
        exact = tiled(fn, x, scale=2, tile=40, overlap=16)
        seams = tiled(fn, x, scale=2, tile=40, overlap=0)
    torch.testing.assert_close(exact, whole, rtol=0, atol=1e-6)
    assert (seams - whole).abs().max() > 1e-3  # so the test can fail


class Limited:
    """A model on a machine with room for `room` input pixels."""

    def __init__(self, room: int, error: type[BaseException] = MemoryError, text: str = ""):
        self.room, self.error, self.text, self.calls = room, error, text, []

    def __call__(self, x):
        pixels = x.shape[-2] * x.shape[-1]
        self.calls.append((tuple(x.shape[-2:]), pixels <= self.room))
        if pixels > self.room:
            raise self.error(self.text)
        return enlarge("nearest", 2)(x)


OUT_OF_MEMORY = [
    (MemoryError, ""),
    (torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20.00 GiB"),
    (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ...",
    ),
    (RuntimeError, "DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    (RuntimeError, "MPS backend out of memory"),
]


@pytest.mark.parametrize(("error", "text"), OUT_OF_MEMORY)
def test_memory_running_out_halves_the_tile_and_goes_on(error, text):
    x = torch.rand(1, 3, 90, 130)
    fn, fractions = Limited(33 * 33, error, text), []
    y = tiled(fn, x, scale=2, tile=64, overlap=8, progress=fractions.append)
    torch.testing.assert_close(y, enlarge("nearest", 2)(x), rtol=0, atol=1e-6)
    failures = [size for size, fits in fn.calls if not fits]
    assert failures == [(64, 64)]  # tried once, not again for every later tile
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)


def test_finished_tiles_are_kept_when_memory_runs_out_later():
    x = torch.rand(1, 3, 64, 200)
    fn = Limited(64 * 64)
    windows_before = 2

    def later(window):
        if len(fn.calls) == windows_before:
            fn.room = 32 * 32  # another program took the rest
        return fn(window)

    y = tiled(later, x, scale=2, tile=64, overlap=8)
    torch.testing.assert_close(y, enlarge("nearest", 2)(x), rtol=0, atol=1e-6)
    assert [size for size, fits in fn.calls[:3]] == [(64, 64)] * 3
    # The third failed; it and the fourth are then made of small ones, the first two are not run again.
    small = [size for size, fits in fn.calls[3:]]
    assert all(max(size) <= 32 for size in small)
    assert len(small) == 2 * 9


def test_no_tile_is_small_enough():
    x = torch.rand(1, 3, 90, 90)
    fn = Limited(5)
    with pytest.raises(MemoryError, match="not enough memory even for a tile of 16 pixels"):
        tiled(fn, x, scale=2, tile=64, overlap=8)
    assert [size for size, _ in fn.calls] == [(64, 64), (32, 32), (16, 16)]


def test_other_errors_pass_through():
    fn = Limited(5, RuntimeError, "shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        tiled(fn, torch.rand(1, 3, 90, 90), scale=2, tile=64, overlap=8)
    assert len(fn.calls) == 1
    assert not out_of_memory(ValueError("out of memory"))


def test_impossible_cuts_are_refused():
    x = torch.rand(1, 3, 90, 90)
    with pytest.raises(ValueError, match="between 0 and half the tile \\(16\\), got 17"):
        tiled(enlarge("nearest", 2), x, scale=2, tile=32, overlap=17)
    with pytest.raises(ValueError, match="window of 16 pixels"):
        tiled(enlarge("nearest", 2), x, scale=2, tile=8, overlap=0, multiple_of=16)


def test_memory_is_bounded_by_the_tile():
    """Beside the result nothing of the image's size may be alive while a tile runs."""
    x = torch.rand(1, 3, 256, 256)
    with torch.no_grad(), Count() as count:
        y = tiled(enlarge("bilinear", 2), x, scale=2, tile=32, overlap=8)
    tile = 4 * 3 * 64 * 64
    assert count.peak < 4 * y.numel() + 4 * tile


def test_pasted_cores_fill_the_image_and_see_their_surroundings():
    x = torch.rand(1, 3, 40, 53)
    seen = []

    def fn(window):
        seen.append(tuple(window.shape[-2:]))
        return enlarge("nearest", 2)(window)

    y = pasted(fn, x, scale=2, tile=16, pad=8, multiple_of=8)
    torch.testing.assert_close(y, enlarge("nearest", 2)(x), rtol=0, atol=0)
    assert len(seen) == 3 * 4
    assert seen[0] == (24, 24)  # clipped at the border
    assert seen[5] == (32, 32)
