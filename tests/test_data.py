"""Resizing, sample images, folders, and the pairs made of them."""

import math
import pickle
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from golden import load_case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from visionhybrid.data import samples
from visionhybrid.data.crops import oriented
from visionhybrid.data.degrade import Bicubic, Jpeg, Noise, SecondOrder, unsharp_mask
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.gallery import Folder
from visionhybrid.data.metrics import psnr
from visionhybrid.data.pairs import Degraded, DegradedFolder, PairedFolder, Photographs
from visionhybrid.data.realworld import RealWorld, RealWorldFolder
from visionhybrid.data.resize import imresize, modcrop
from visionhybrid.data.scan import find_pictures, match_pairs, read_list
from visionhybrid.data.subimages import extract_subimages

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


# ---- sample images --------------------------------------------------------------------------------------------------


def test_digits_split():
    (train, train_labels), (held_out, held_out_labels) = samples.digits("train"), samples.digits("val")
    assert train.shape == (1442, 1, 8, 8)
    assert held_out.shape == (355, 1, 8, 8)
    assert train.dtype == torch.float32
    assert (train.min(), train.max()) == (0, 1)
    # Every class is split alike, and together they are the whole set, once.
    share = held_out_labels.bincount() / (train_labels.bincount() + held_out_labels.bincount())
    assert share.shape == (10,)
    assert share.min() > 0.19
    assert share.max() <= 0.2
    from sklearn.datasets import load_digits

    everything = torch.from_numpy(load_digits().data).float() / 16
    both = torch.cat([train, held_out]).flatten(1)
    assert sorted(both.tolist()) == sorted(everything.tolist())


def test_photographs():
    train, held_out = samples.photographs("train"), samples.photographs("val")
    assert [p.name for p in held_out] == ["coffee", "rocket", "camera", "china"]
    assert len(train) == 18
    assert not {p.name for p in train} & {p.name for p in held_out}
    assert sum(p.pixels[0].numel() for p in train + held_out) == 7394225
    assert all(p.pixels.dtype == torch.uint8 and p.credit and p.license for p in train + held_out)
    assert {len(p.pixels) for p in train} == {1, 3}
    assert {len(p.pixels) for p in samples.photographs("val", channels=3)} == {3}
    grey = samples.photographs("val", channels=1)[0].pixels
    want = np.array(Image.fromarray(held_out[0].pixels.permute(1, 2, 0).numpy()).convert("L"))
    assert (grey[0].int() - torch.from_numpy(want).int()).abs().max() <= 1


@pytest.mark.parametrize(("call", "module"), [(samples.digits, "sklearn"), (samples.photographs, "skimage")])
def test_missing_packages_name_the_extra(call, module, monkeypatch):
    samples._pixels.cache_clear()
    for name in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "visionhybrid\[samples\]"') as caught:
        call()
    assert "\n" not in str(caught.value)
    samples._pixels.cache_clear()


def test_unknown_split_lists_the_splits():
    for call in (samples.digits, samples.photographs):
        with pytest.raises(ValueError, match="no split 'test'; have train, val"):
            call("test")


# ---- folders --------------------------------------------------------------------------------------------------------


def save(path, height, width, seed=0, mode="RGB"):
    """Write a smooth picture, so that JPEG keeps it; returns its pixels (H, W, C) or (H, W)."""
    g = torch.Generator().manual_seed(seed)
    channels = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2}[mode]
    coarse = torch.rand(channels, max(2, height // 6), max(2, width // 6), generator=g)
    smooth = (imresize(coarse, size=(height, width)).clamp(0, 1) * 255).round().byte()
    array = smooth[0].numpy() if channels == 1 else smooth.permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def test_find_pictures(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/.hidden.png", ".cache/d.png", "notes.txt"):
        save(tmp_path / "e.png", 4, 4)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert find_pictures(tmp_path) == ["a/c.JPG", "b.png", "e.png"]


def test_nothing_to_find_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no pictures in this folder"):
        find_pictures(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_pictures(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("0801.png", "0801.png"),
        ("0801.png", "0801x4.png"),
        ("a/baby.png", "a/baby_x4.jpg"),
        ("img_001_SRF_4_HR.png", "img_001_SRF_4_LR.png"),
        ("Canon_001_HR.png", "Canon_001_LR4.png"),
        ("with.dots.png", "with.dotsx4.png"),
    ],
)
def test_partners(high, low):
    assert match_pairs([high], ["other.png", low, "0801x2.png"], 4) == [(high, low)]


def test_exact_names_win_and_missing_or_double_partners_are_errors():
    assert match_pairs(["a.png"], ["ax4.png", "a.png"], 4) == [("a.png", "a.png")]
    with pytest.raises(
        ValueError, match=r"1 of 2 pictures have no .* first b\.png \(tried b, bx2, b_x2, b-x2\)"
    ):
        match_pairs(["a.png", "b.png"], ["a.png", "bx4.png"], 2)
    with pytest.raises(ValueError, match=r"more than one .* partner: a\.jpg, a\.png"):
        match_pairs(["a.png"], ["a.jpg", "a.png"], 2)


def test_meta_info_lists(tmp_path):
    listed = tmp_path / "meta.txt"
    listed.write_text("a b.png (480,480,3)\n\nsub/c.png (12,13,1) 1\nd(1).png\n")
    assert read_list(listed) == ["a b.png", "sub/c.png", "d(1).png"]
    save(tmp_path / "a b.png", 4, 4)
    with pytest.raises(ValueError, match=r"2 of 3 pictures of .* are not there, first sub/c\.png"):
        Folder(tmp_path, names=listed)
    listed.write_text("a b.png (480,480,3)\n")
    save(tmp_path / "other.png", 4, 4)
    assert Folder(tmp_path, names=listed).files == ["a b.png"]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_channels(tmp_path, mode):
    save(tmp_path / "x.png", 9, 7, mode=mode)
    colour, grey = Folder(tmp_path).picture(0), Folder(tmp_path, channels=1).picture(0)
    assert (colour.shape, grey.shape) == ((3, 9, 7), (1, 9, 7))
    assert colour.dtype == grey.dtype == torch.uint8
    if mode in ("L", "LA"):
        assert torch.equal(colour, grey.expand(3, -1, -1))


def test_sixteen_bits_stay_fine(tmp_path):
    levels = np.arange(0, 65536, 512, dtype=np.uint16).reshape(8, 16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    x = Folder(tmp_path, channels=1).picture(0)
    assert x.dtype == torch.float32
    assert len(x.unique()) == 128


def test_cache_keeps_what_fits(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", 10, 10, seed=i)
    folder = Folder(tmp_path, cache=2 * 300)
    pictures = [folder.picture(i) for i in range(3)]
    assert [folder.picture(i) is pictures[i] for i in range(3)] == [True, True, False]
    assert torch.equal(folder.picture(2), pictures[2])
    # A loading process starts empty, with all of the room.
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.picture(2) is copy.picture(2)


# ---- pairs ----------------------------------------------------------------------------------------------------------


class One:
    """A gallery of one picture."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return 1

    def name(self, index):
        return "one"

    source = name

    def picture(self, index):
        return self.pixels


def picture(height, width, seed=0, channels=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=g, dtype=torch.uint8)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def paired(tmp_path):
    """Folders of x2 pairs, of several sizes and formats, one in a sub-folder."""
    for i, (name, height, width) in enumerate([("a.png", 24, 30), ("b/c.jpg", 33, 20), ("d.bmp", 20, 20)]):
        array = save(tmp_path / "high" / name, 2 * height + i % 2, 2 * width, seed=i)
        low = imresize(modcrop(torch.from_numpy(array).permute(2, 0, 1), 2), 0.5)
        path = tmp_path / "low" / name.replace(".", "x2.")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(low.permute(1, 2, 0).numpy()).save(path)
    return tmp_path


def every_set(paired):
    high = paired / "high"
    return [
        PairedFolder(paired / "low", high, 2, 16),
        DegradedFolder(high, Bicubic(2), 16, cache=10**6),
        DegradedFolder(high, Noise((5.0, 50.0)), 16, channels=1),
        DegradedFolder(high, Jpeg(), 16),
        Photographs(3, 16, "val"),
        RealWorldFolder(high, SecondOrder(scale=4), 8, piece=64, truth="both"),
    ]


def test_every_set_keeps_the_contract(paired):
    for pairs in every_set(paired):
        assert len(pairs) >= 3
        for index in range(len(pairs)):
            sample = pairs.sample(index, 2**62 + index)
            side, scale = pairs.patch, pairs.scale
            channels = sample["lq"].shape[0]
            assert sample["lq"].shape == (channels, side, side)
            for key in sample.keys() - {"lq"}:
                assert sample[key].shape == (channels, side * scale, side * scale)
            for x in sample.values():
                assert x.dtype == torch.float32
                assert x.is_contiguous()
            whole = pairs.whole(index)
            assert [n * scale for n in whole["lq"].shape[1:]] == list(whole["gt"].shape[1:])
            assert pairs.name(index)
        assert len({pairs.name(i) for i in range(len(pairs))}) == len(pairs)


def test_samples_depend_on_the_seed_alone(paired):
    for pairs, again in zip(every_set(paired), every_set(paired), strict=True):
        torch.manual_seed(1)
        first = pairs.sample(1, 5)
        torch.rand(3)
        other = pairs.sample(1, 6)
        assert equal(again.sample(1, 5), first)
        assert equal(pairs.sample(1, 5), first)
        assert not equal(other, first)
        assert equal(pairs.whole(2), again.whole(2))


class Numbered:
    """A map-style view: item i is sample(i % len, seed = i)."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.pairs.sample(i % len(self.pairs), i)


def test_workers_change_nothing(paired):
    for pairs in every_set(paired)[:2] + every_set(paired)[-1:]:
        one, two = (
            list(DataLoader(Numbered(pairs), batch_size=2, num_workers=workers)) for workers in (0, 2)
        )
        assert all(equal(a, b) for a, b in zip(one, two, strict=True))


@quick
@given(
    scale=st.integers(1, 4),
    height=st.integers(24, 60),
    width=st.integers(24, 60),
    patch=st.integers(1, 6),
    seed=st.integers(0, 2**63),
)
def test_a_bicubic_crop_is_that_crop_of_the_whole(scale, height, width, patch, seed):
    pixels = picture(height, width, seed % 97)
    sample = Degraded(One(pixels), Bicubic(scale), patch, orient="none").sample(0, seed)
    whole = modcrop(pixels, scale).float() / 255
    low = imresize(whole, 1 / scale)
    windows = whole.unfold(1, patch * scale, scale).unfold(2, patch * scale, scale)
    same = (windows == sample["gt"][:, None, None]).all((0, 3, 4)).nonzero()
    assert len(same)
    top, left = same[0].tolist()
    torch.testing.assert_close(
        sample["lq"], low[:, top : top + patch, left : left + patch], rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(("orient", "count"), [("all", 8), ("flip", 2), ("none", 1)])
def test_orientations_are_all_drawn_and_shared_by_both_sides(paired, orient, count):
    pixels = picture(16, 16)
    pairs = Degraded(One(pixels), Bicubic(2), 8, orient=orient)
    seen = set()
    for seed in range(100):
        sample = pairs.sample(0, seed)
        torch.testing.assert_close(sample["lq"], imresize(sample["gt"], 0.5))
        seen.add(sample["gt"].numpy().tobytes())
    assert len(seen) == count
    read = PairedFolder(paired / "low", paired / "high", 2, 20, orient=orient)
    for seed in range(10):
        sample = read.sample(2, seed)
        assert psnr(imresize(sample["gt"], 0.5), sample["lq"]) > 45


def test_oriented_is_the_dihedral_group():
    x = torch.arange(6).view(1, 2, 3)
    shapes = [tuple(oriented(x, code).shape) for code in range(8)]
    assert shapes == [(1, 2, 3)] * 4 + [(1, 3, 2)] * 4
    assert len({(oriented(x, c).shape, tuple(oriented(x, c).flatten().tolist())) for c in range(8)}) == 8
    assert oriented(x, 1).tolist() == [[[2, 1, 0], [5, 4, 3]]]


def test_crops_reach_every_place_equally():
    pixels = torch.zeros(1, 10, 10, dtype=torch.uint8)
    pixels[0] = torch.arange(100, dtype=torch.uint8).view(10, 10)
    pairs = Degraded(One(pixels), Bicubic(1), 8, orient="none")
    corners = [round(pairs.sample(0, s)["gt"][0, 0, 0].item() * 255) for s in range(900)]
    counts = torch.tensor(corners).bincount()
    assert counts.nonzero().flatten().tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert counts[counts > 0].min() > 60


def test_whole_is_what_the_benchmarks_hold(paired):
    pairs, read = (
        DegradedFolder(paired / "high", Bicubic(2)),
        PairedFolder(paired / "low", paired / "high", 2),
    )
    for i in (0, 2):  # the lossless ones
        assert equal(pairs.whole(i), read.whole(i))
    assert torch.equal(pairs.whole(0)["lq"] * 255, (pairs.whole(0)["lq"] * 255).round())


def test_small_pictures_are_refused_or_enlarged():
    small = picture(20, 70)
    with pytest.raises(CorruptSample, match="one: 70x20 is smaller than the crop, 32x32"):
        Degraded(One(small), Bicubic(2), 16).sample(0, 0)
    sample = Degraded(One(small), Bicubic(2), 16, enlarge=True, orient="none").sample(0, 0)
    stretched = torch.nn.functional.interpolate(small[None].float() / 255, (32, 70), mode="bilinear")[0]
    windows = stretched.unfold(2, 32, 2)
    assert (windows.transpose(1, 2) == sample["gt"][:, None]).all((0, 2, 3)).any()
    with pytest.raises(CorruptSample, match="side shorter than 4"):
        Degraded(One(picture(3, 9)), Bicubic(4), 1).whole(0)


def test_noise_and_jpeg_pairs(paired):
    noise = Degraded(One(picture(64, 64)), Noise(25.0), 64).sample(0, 3)
    assert (noise["lq"] - noise["gt"]).std().item() * 255 == pytest.approx(25, rel=0.03)
    assert noise["lq"].min() < 0  # not clamped
    smooth = Photographs(1, 64, "val", degradation=Jpeg(10)).sample(0, 1)
    better = Photographs(1, 64, "val", degradation=Jpeg(90)).sample(0, 1)
    assert torch.equal(smooth["gt"], better["gt"])
    assert 20 < psnr(smooth["lq"], smooth["gt"]) < psnr(better["lq"], better["gt"]) - 3


def test_real_world_truths():
    gallery = One(picture(50, 90))
    make = {t: RealWorld(gallery, SecondOrder(), 8, piece=64, truth=t) for t in ("plain", "sharp", "both")}
    plain, sharp, both = (make[t].sample(0, 11) for t in ("plain", "sharp", "both"))
    assert torch.equal(plain["lq"], sharp["lq"])
    assert torch.equal(plain["gt"], both["gt"])
    assert torch.equal(sharp["gt"], both["sharp"])
    assert not torch.equal(plain["gt"], sharp["gt"])
    whole = make["both"].whole(0)
    torch.testing.assert_close(whole["sharp"], unsharp_mask(whole["gt"][None])[0])
    assert torch.equal(plain["lq"] * 255, (plain["lq"] * 255).round())


def test_real_world_sides_belong_together():
    # Whatever was done to it, the low-quality crop looks most like its truth where both are aligned.
    pairs = RealWorld(One(samples.photographs("val")[3].pixels), SecondOrder(), 40, piece=240)
    pull = torch.zeros(3, 3)
    for seed in range(8):
        sample = pairs.sample(0, seed)
        coarse = torch.nn.functional.avg_pool2d(sample["gt"], 4).mean(0)
        given = sample["lq"].mean(0)[4:-4, 4:-4]
        for row in range(3):
            for column in range(3):
                shifted = coarse[4 * row : 4 * row + 32, 4 * column : 4 * column + 32]
                pull[row, column] += torch.corrcoef(torch.stack([given.flatten(), shifted.flatten()]))[0, 1]
    assert pull.argmax() == 4
    assert pull[1, 1] > 8 * 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: Degraded(g, Bicubic(2), 0), "at least 1"),
        (lambda g: Degraded(g, Bicubic(2), 8, orient="rot"), "no orient 'rot'; have all, flip, none"),
        (lambda g: Degraded(g, SecondOrder(), 8), "see RealWorld"),
        (lambda g: RealWorld(g, truth="usm"), "have plain, sharp, both"),
        (lambda g: RealWorld(g, patch=128), "at least 512"),
        (lambda g: Photographs(2, 8, degradation=Bicubic(4)), "has scale 4, not 2"),
    ],
)
def test_sets_that_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make(One(picture(64, 64)))


def test_damaged_and_mismatched_files_are_corrupt_samples(paired):
    good = (paired / "high" / "a.png").read_bytes()
    (paired / "high" / "a.png").write_bytes(good[: len(good) // 2])
    (paired / "high" / "b" / "c.jpg").write_bytes(b"not a picture")
    save(paired / "high" / "d.bmp", 50, 40)
    pairs = PairedFolder(paired / "low", paired / "high", 2, 8)
    with warnings.catch_warnings(record=True):
        for index, reason in enumerate(
            ["truncated or damaged", "not an image", "40x50 is not 2 times its partner's 20x20"]
        ):
            for call in (lambda i: pairs.sample(i, 0), pairs.whole):
                with pytest.raises(CorruptSample, match=reason) as caught:
                    call(index)
                assert caught.value.path.exists()
                assert "\n" not in str(caught.value)
                assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    (paired / "high" / "a.png").unlink()
    with pytest.raises(CorruptSample, match="No such file"):
        pairs.sample(0, 0)
    low_only = PairedFolder(paired / "low", paired / "low", 1, 21)
    with pytest.raises(CorruptSample, match="20x20 is smaller than the patch, 21"):
        low_only.sample(2, 0)


# ---- sub-images -----------------------------------------------------------------------------------------------------


def test_extract_subimages(tmp_path):
    array = save(tmp_path / "in" / "0001x2.png", 50, 40)
    save(tmp_path / "in" / "tiny.png", 10, 40)
    (tmp_path / "in" / "broken.png").write_bytes(b"x")
    calls = []
    result = extract_subimages(
        tmp_path / "in", tmp_path / "out", crop=20, step=15, workers=2, progress=lambda *a: calls.append(a)
    )
    # Rows at 0, 15, 30; columns at 0, 15 and, flush with the border, 20.
    assert result.crops == 9
    assert sorted(e.path.name for e in result.skipped) == ["broken.png", "tiny.png"]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    files = find_pictures(tmp_path / "out")
    assert files == [f"0001_s{n:03d}.png" for n in range(1, 10)]
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / "0001_s006.png")), array[15:35, 20:40])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(ValueError, match="exists already"):
        extract_subimages(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "in" / "sub" / "0001x4.png", 50, 40)
    with pytest.raises(ValueError, match="more than one picture is called 0001"):
        extract_subimages(tmp_path / "in", tmp_path / "out2")


@quick
@given(length=st.integers(1, 300), crop=st.integers(1, 60), step=st.integers(1, 60))
def test_crops_cover_the_picture_when_the_step_allows(length, crop, step):
    from visionhybrid.data.subimages import _starts

    assume(crop <= length)
    starts = _starts(length, crop, step)
    assert starts[0] == 0
    assert starts[-1] == length - crop
    assert all(0 < b - a <= step for a, b in pairwise(starts))
