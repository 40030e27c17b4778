"""Pairs for restoration, and the crops that large pictures are cut into."""

import pickle
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from golden import load_case
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pictures import save
from PIL import Image
from torch.utils.data import DataLoader

from visionhybrid.data import samples
from visionhybrid.data.crops import oriented
from visionhybrid.data.degrade import Bicubic, Jpeg, Noise, SecondOrder, unsharp_mask
from visionhybrid.data.errors import CorruptSample
from visionhybrid.data.metrics import psnr
from visionhybrid.data.pairs import Degraded, DegradedFolder, PairedFolder, Photographs
from visionhybrid.data.realworld import RealWorld, RealWorldFolder
from visionhybrid.data.resize import imresize, modcrop
from visionhybrid.data.scan import find_pictures
from visionhybrid.data.subimages import extract_subimages

CASE = load_case("hat_degrade_ops_64x80")
quick = settings(max_examples=40, deadline=None)

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
