"""`restore` for every kind of image, and `restore_path` for files and folders, in good days and bad."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import load_case
from PIL import Image, ImageCms
from torch import nn

import visionhybrid
from visionhybrid.data.images import ImageError, Picture, read_image, write_image
from visionhybrid.data.metrics import psnr
from visionhybrid.data.resize import imresize
from visionhybrid.data.samples import photographs
from visionhybrid.infer import memory
from visionhybrid.infer.engine import Engine
from visionhybrid.infer.restoration import restore, restore_path
from visionhybrid.infer.tiles import pasted

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


class Enlarge(nn.Module):
    """The smallest restorer: nearest neighbour, so that every expected value is known."""

    def __init__(self, scale: int = 2, in_chans: int = 3, multiple_of: int = 1):
        super().__init__()
        self.scale, self.in_chans, self.multiple_of = scale, in_chans, multiple_of
        self.gain = nn.Parameter(torch.ones(()))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x):
        assert x.shape[1] == self.in_chans
        assert not self.training
        assert not torch.is_grad_enabled()
        self.sizes.append(tuple(x.shape))
        return F.interpolate(x, scale_factor=self.scale, mode="nearest") * self.gain


def grown(x: np.ndarray, scale: int = 2) -> np.ndarray:
    return x.repeat(scale, 0).repeat(scale, 1)


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(3).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


# ---- kinds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("shape", [(30, 21), (30, 21, 1), (30, 21, 2), (30, 21, 3), (30, 21, 4)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64"])
def test_arrays(shape, dtype, tile, in_chans):
    x = noise(*shape, dtype=np.uint16 if dtype == "uint16" else np.uint8).astype(dtype)
    x = x / 255 if "float" in dtype else x
    y = restore(Enlarge(in_chans=in_chans), x.astype(dtype), tile=tile, overlap=None if tile is None else 4)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, grown(x), rtol=0, atol=1e-6 if "float" in dtype else 0)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_pil_images_keep_their_mode(mode):
    shape = {"L": (9, 7), "I;16": (9, 7), "LA": (9, 7, 2), "RGB": (9, 7, 3), "RGBA": (9, 7, 4)}[mode]
    x = noise(*shape, dtype=np.uint16 if mode == "I;16" else np.uint8)
    y = restore(Enlarge(), Image.fromarray(x))
    assert y.mode == mode
    np.testing.assert_array_equal(np.asarray(y), grown(x))


def test_pil_images_are_turned_upright_and_keep_their_profile(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(9, 7, 3)).save(tmp_path / "x.png", exif=exif, icc_profile=SRGB, dpi=(300, 300))
    with Image.open(tmp_path / "x.png") as image:
        y = restore(Enlarge(), image)
    assert y.size == (18, 14)
    np.testing.assert_array_equal(np.asarray(y), grown(np.rot90(noise(9, 7, 3), -1)))
    y.save(tmp_path / "y.png")
    assert read_image(tmp_path / "y.png").icc == SRGB


def test_pil_images_of_other_modes():
    bit = restore(Enlarge(), Image.fromarray(noise(9, 7) > 99))
    assert bit.mode == "L"
    np.testing.assert_array_equal(np.asarray(bit), grown(255 * (noise(9, 7) > 99)))
    palette = Image.fromarray(noise(9, 7, 3)).quantize(9)
    colour = restore(Enlarge(), palette)
    assert colour.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(colour), grown(np.asarray(palette.convert("RGB"))))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_tensors(dtype):
    x = torch.from_numpy(noise(2, 3, 9, 7))
    x = x if dtype == torch.uint8 else (x / 255).to(dtype)
    for given in (x, x[0]):
        y = restore(Enlarge(), given)
        assert y.dtype == dtype
        torch.testing.assert_close(y, given.repeat_interleave(2, -1).repeat_interleave(2, -2), rtol=0, atol=0)


def test_a_path_gives_a_picture_and_the_package_offers_restore(tmp_path):
    x = noise(9, 7, 4, dtype=np.uint16)
    planes = torch.from_numpy(x.astype(np.float32) / 65535).permute(2, 0, 1)
    write_image(tmp_path / "x.png", Picture(pixels=planes[:3], alpha=planes[3:], bits=16, icc=SRGB))
    picture = visionhybrid.restore(Enlarge(), tmp_path / "x.png")
    assert (picture.bits, picture.icc, picture.size) == (16, SRGB, (14, 18))
    both = torch.cat([picture.pixels, picture.alpha]).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.round(both * 65535), grown(x))
    with pytest.raises(ImageError, match="No such file"):
        restore(Enlarge(), str(tmp_path / "none.png"))


def test_results_are_clamped_and_alpha_too():
    model = Enlarge()
    nn.init.constant_(model.gain, 3)
    y = restore(model, np.full((4, 4, 3), 200, np.uint8))
    assert (y == 255).all()
    alpha = np.dstack([noise(4, 4, 3), np.full((4, 4), 100, np.uint8)])
    alpha[0, 0, 3] = 101
    assert (restore(model, alpha)[..., 3] == 255).all()


def test_a_constant_alpha_does_not_go_through_the_model():
    model = Enlarge()
    nn.init.constant_(model.gain, 0.9)
    y = restore(model, np.dstack([noise(9, 7, 3), np.full((9, 7), 255, np.uint8)]))
    assert (y[..., 3] == 255).all()
    assert len(model.sizes) == 1


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(Enlarge(), nn.Dropout()).train()
    model.scale, model.in_chans, model.multiple_of = 2, 3, 1
    model[1].eval()
    y = restore(model, torch.rand(3, 5, 6))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert not y.requires_grad
    y.requires_grad_().sum().backward()  # an ordinary tensor, not one of inference mode


def test_self_ensemble_is_the_mean_over_eight_views():
    class Leaning(Enlarge):  # tells left from right and up from down
        def forward(self, x):
            y = super().forward(x)
            return y + 0.01 * y.roll(1, -1) + 0.02 * y.roll(1, -2)

    x = torch.rand(1, 3, 6, 9)
    got = restore(Leaning(), x / 2, self_ensemble=True)
    up = F.interpolate(x / 2, scale_factor=2)
    sides = [up.roll(n, d) for d in (-1, -2) for n in (1, -1)]
    torch.testing.assert_close(got, up + 0.03 * sum(sides) / 4, rtol=0, atol=1e-6)


def test_autocast_and_half_weights():
    seen = []

    class Watched(Enlarge):
        def forward(self, x):
            y = F.conv2d(x, torch.eye(3, device=x.device, dtype=x.dtype)[:, :, None, None])
            seen.append((x.dtype, y.dtype))
            return super().forward(y)

    x = torch.rand(3, 6, 9)
    torch.testing.assert_close(
        restore(Watched(), x, dtype=torch.bfloat16), restore(Watched(), x), rtol=0, atol=4e-3
    )
    assert seen == [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)]
    restore(Watched().bfloat16(), x)
    assert seen[-1] == (torch.bfloat16, torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must be"):
        restore(Enlarge(), x, dtype=torch.int8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2, 2, 2), np.uint8), "shape"),
        (np.zeros((0, 5, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 3), np.int32), "uint8, uint16 or floating point, got int32"),
        (np.zeros((4, 4, 7), np.uint8), "takes 3 channels, the image has 7"),
        (torch.zeros(4, 4), "shape"),
        (3, "got int"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        restore(Enlarge(), image)


def test_what_is_no_restorer_is_refused():
    with pytest.raises(ValueError, match="Linear is not a restorer, it has no scale, in_chans, multiple_of"):
        restore(nn.Linear(2, 2), np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="at least the model's window of 8"):
        restore(Enlarge(multiple_of=8), np.zeros((4, 4, 3), np.uint8), tile=4)
    model = Enlarge()
    model.scale = 3

    model.forward = lambda x: x
    with pytest.raises(ValueError, match="the model made"):
        restore(model, np.zeros((4, 4, 3), np.uint8))


def test_values_that_are_not_finite_are_not_hidden():
    model = Enlarge()
    nn.init.constant_(model.gain, float("nan"))
    with pytest.raises(ValueError, match="not finite in torch"):
        restore(model, np.zeros((4, 4, 3), np.uint8))


# ---- a real network ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hat():
    return visionhybrid.load(load_case("hat_tiny_x2_tile_40x53").state_dict())


def test_the_published_tile_mode_is_reproduced(hat):
    case = load_case("hat_tiny_x2_tile_40x53")
    tile = case.facts["tile"]
    with torch.no_grad():
        y = pasted(
            hat,
            case.input("x"),
            scale=2,
            tile=tile["tile_size"],
            pad=tile["tile_pad"],
            multiple_of=hat.multiple_of,
        )
    case.check("out", y)


def test_blended_tiles_of_a_photograph_are_the_whole_image_but_for_a_grey_level(hat):
    """HAT's channel attention averages over what it sees, so that tiles cannot be exact. Random weights: as a correction of
    4 grey levels to bicubic, which is what a trained network adds."""
    truth = photographs("val", channels=3)[0].pixels[:, :256, :320]
    truth = truth / 255 if truth.dtype == torch.uint8 else truth
    x = (imresize(truth, 0.5).clamp(0, 1) * 255).round()[None] / 255
    with torch.no_grad():
        detail = hat(x)
    gain, level = (4 / 255) / detail.std((2, 3), keepdim=True), detail.mean((2, 3), keepdim=True)

    class Corrected(Enlarge):
        def forward(self, x):
            return F.interpolate(x, scale_factor=2, mode="bicubic") + gain * (hat(x) - level)

    model = Corrected(multiple_of=hat.multiple_of)
    whole, tiles = restore(model, x), restore(model, x, tile=64)
    seams = restore(model, x, tile=64, overlap=0)

    def quality(y):
        return psnr(y, truth[None], crop_border=2).item()

    assert 29 < quality(whole) < 32
    assert abs(quality(tiles) - quality(whole)) < 0.01  # 0.1 is what is asked for
    assert (tiles - whole).abs().max() < 1 / 255
    assert (seams - whole).abs().max() > 10 / 255  # so the test can fail


# ---- automatic tiles ---------------------------------------------------------------------------------------------


def test_whole_where_memory_allows_and_tiles_where_not(monkeypatch):
    x = torch.rand(1, 3, 200, 300)
    roomy, tight = Enlarge(multiple_of=8), Enlarge(multiple_of=8)
    whole = restore(roomy, x)
    assert roomy.sizes == [(1, 3, 64, 64), (1, 3, 200, 300)]  # the probe, the image
    monkeypatch.setattr(memory, "available", lambda device: 4 * x.numel() * 4 + 25 * 4 * 3 * 4 * 64 * 64)
    tiles = restore(tight, x)
    torch.testing.assert_close(tiles, whole, rtol=0, atol=1e-6)
    sides = {max(size[-2:]) for size in tight.sizes[1:]}
    assert 100 < max(sides) < 300
    assert max(sides) % 8 == 0


def test_the_price_of_a_pixel_is_counted_right():
    def fn(x):  # (1, 3, h, w): 30 channels, then 30 more while the first live
        y = torch.cat([x] * 10, 1)
        z = y + 1
        del y
        return z[:, :3] * 2

    x = torch.rand(1, 3, 100, 100)
    assert memory.bytes_per_pixel(fn, x, 1, torch.device("cpu")) == pytest.approx(4 * 60 * memory.SCRATCH)
    weight = torch.rand(1000, 1000)  # what lives before is not counted
    assert memory.bytes_per_pixel(lambda x: x * weight.t()[0, 0], x, 1, torch.device("cpu")) == pytest.approx(
        4 * 3 * memory.SCRATCH
    )


PEAK = """
import re, sys, torch
sys.path.insert(0, sys.argv[1])
import visionhybrid
from golden import load_case
from visionhybrid.infer import memory
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
model, x = visionhybrid.load(load_case("hat_tiny_x3_24x40").state_dict()), torch.rand(1, 3, 256, 256)
with torch.no_grad():
    price = memory.bytes_per_pixel(model, x, model.multiple_of, x.device)
    before = status("VmRSS")
    model(x)
print(price * x[0, 0].numel(), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_the_price_covers_what_a_process_really_takes():
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent)]
    told, real = map(
        float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    assert real < 1.15 * told
    assert told < 4 * real


def test_there_is_memory():
    free = memory.available(torch.device("cpu"))
    assert 1e7 < free < 1e14
    assert memory.largest_tile(1e12, torch.rand(1, 3, 90, 90), 2, 16, torch.device("cpu")) == 32
    assert memory.largest_tile(1.0, torch.rand(1, 3, 90, 90), 2, 16, torch.device("cpu")) == 96


# ---- files -------------------------------------------------------------------------------------------------------


def save(path: Path, channels: int = 3, bits: int = 8, size=(9, 7), **options) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    x = noise(*size, channels, dtype=np.uint16 if bits == 16 else np.uint8)
    planes = torch.from_numpy(x.astype(np.float32) / (2**bits - 1)).permute(2, 0, 1)
    colours = 3 if channels > 2 else 1
    picture = Picture(
        pixels=planes[:colours], alpha=planes[colours:] if channels in (2, 4) else None, bits=bits, **options
    )
    write_image(path, picture)
    return x


def samples(path: Path) -> np.ndarray:
    picture = read_image(path)
    planes = picture.pixels if picture.alpha is None else torch.cat([picture.pixels, picture.alpha])
    return np.round(planes.permute(1, 2, 0).numpy() * (2**picture.bits - 1)).astype(int)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    ("name", "channels", "bits"),
    [(f"x.{s}", c, b) for s in ("png", "tif") for c in (1, 2, 3, 4) for b in (8, 16)]
    + [("x.webp", 3, 8), ("x.webp", 4, 8)],
)
def test_every_kind_of_file_comes_back_as_it_was(tmp_path, name, channels, bits, in_chans):
    x = save(tmp_path / name, channels, bits, icc=SRGB, dpi=(300.0, 300.0))
    report = restore_path(Enlarge(in_chans=in_chans), tmp_path / name, f"{tmp_path}/out/")
    assert report.ok
    assert [(d.source, d.target, d.size) for d in report.done] == [
        (tmp_path / name, tmp_path / "out" / name, (14, 18))
    ]
    got = samples(tmp_path / "out" / name)
    if (name, channels, bits) == ("x.tif", 2, 16):
        x = x[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(got, grown(x))
    picture = read_image(tmp_path / "out" / name)
    assert (picture.bits, picture.icc) == (bits, SRGB)
    assert picture.dpi is None if name == "x.webp" else picture.dpi == pytest.approx((300, 300), rel=1e-3)


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "L"), (1, "RGB"), (3, "RGB")])
def test_jpeg_files_stay_grey_or_coloured(tmp_path, in_chans, mode):
    x = np.add.outer(np.arange(16) * 4, np.arange(24) * 6).astype(np.uint8)
    x = x if mode == "L" else np.dstack([x, x[::-1], x[:, ::-1]])
    Image.fromarray(x).save(tmp_path / "x.jpg", quality=100, subsampling=0)
    assert restore_path(Enlarge(in_chans=in_chans), tmp_path / "x.jpg", tmp_path / "y.jpg", quality=100).ok
    with Image.open(tmp_path / "y.jpg") as image:
        assert image.mode == mode
        assert np.abs(np.asarray(image).astype(int) - grown(x)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_out_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    x = noise(9, 7, 3)
    Image.fromarray(x).save(tmp_path / "x.png", exif=exif)
    upright = samples(tmp_path / "x.png")
    assert upright.shape == ((9, 7, 3) if orientation < 5 else (7, 9, 3))
    restore_path(Enlarge(), tmp_path / "x.png", tmp_path / "y.png")
    np.testing.assert_array_equal(samples(tmp_path / "y.png"), grown(upright))


def test_one_file_and_the_name_it_gets(tmp_path):
    save(tmp_path / "x.png")
    (tmp_path / "folder").mkdir()
    cases = [
        (dict(target=tmp_path / "y.jpg"), "y.jpg", "JPEG"),
        (dict(target=tmp_path / "folder"), "folder/x.png", "PNG"),
        (dict(target=f"{tmp_path}/new/", suffix="_x2"), "new/x_x2.png", "PNG"),
        (dict(target=f"{tmp_path}/new/", format="jpeg"), "new/x.jpg", "JPEG"),
        (dict(target=f"{tmp_path}/new/", format="webp", suffix="2"), "new/x2.webp", "WEBP"),
        (dict(target=f"{tmp_path}/deep/er/", format="TIFF"), "deep/er/x.tif", "TIFF"),
    ]
    for options, name, format in cases:
        report = restore_path(Enlarge(), tmp_path / "x.png", **options)
        assert [d.target for d in report.done] == [tmp_path / name]
        with Image.open(tmp_path / name) as image:
            assert image.format == format


def test_mistakes_are_refused_before_any_work(tmp_path):
    model = Enlarge()
    save(tmp_path / "in" / "x.png")
    save(tmp_path / "in" / "x.jpg")
    save(tmp_path / "y.png")
    (tmp_path / "empty").mkdir()
    here, source = tmp_path, tmp_path / "in" / "x.png"
    (here / "link.png").symlink_to(source)
    cases = [
        (here / "none.png", here / "z.png", {}, "no such file or folder"),
        (here / "empty", here / "out", {}, "no images in this folder"),
        (source, source, {"overwrite": True}, "this would replace a source image"),
        (source, here / "link.png", {"overwrite": True}, "this would replace a source image"),
        (here / "in", here / "in", {"suffix": "_x2"}, "the same folder"),
        (here / "in", here / "out", {"format": "png"}, r"x\.jpg and .*x\.png would both become .*out/x\.png"),
        (here / "in", here / "y.png", {}, "is a file"),
        (source, here / "z", {}, "give it the suffix"),
        (source, here / "z.bmp", {}, r"no format for the suffix '\.bmp'"),
        (source, here / "z.png", {"format": "jpg"}, "not that of the format"),
        (source, here / "z.png", {"format": "exr"}, "no format 'exr' to write"),
        (source, here / "z.png", {"quality": 101}, "quality goes from 1 to 100"),
        (source, here / "z.png", {"on_error": "shrug"}, "'skip' or 'raise'"),
        (source, here / "y.png", {}, "exists already"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for given, target, options, message in cases:
        with pytest.raises(ValueError, match=message):
            restore_path(model, given, target, **options)
    assert model.sizes == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_with_broken_files_among_good_ones(tmp_path):
    x = save(tmp_path / "in/a.png")
    save(tmp_path / "in/z.tif", bits=16)
    save(tmp_path / "in/sub/deep.png")
    (tmp_path / "in/empty.png").write_bytes(b"")
    (tmp_path / "in/half.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:150])
    (tmp_path / "in/text.jpg").write_text("no image")
    (tmp_path / "in/notes.txt").write_text("passed over")
    (tmp_path / "in/.hidden.png").write_text("passed over")
    (tmp_path / "in/dangling.png").symlink_to(tmp_path / "nowhere.png")
    report = restore_path(Enlarge(), tmp_path / "in", tmp_path / "out")
    assert not report.ok
    assert [d.source.name for d in report.done] == ["a.png", "z.tif"]
    reasons = {path.name: reason for path, reason in report.failed}
    assert set(reasons) == {"empty.png", "half.png", "text.jpg", "dangling.png"}
    assert "empty" in reasons["empty.png"]
    assert "damaged" in reasons["half.png"]
    assert "not an image" in reasons["text.jpg"]
    assert "No such file" in reasons["dangling.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "z.tif"]
    np.testing.assert_array_equal(samples(tmp_path / "out/a.png"), grown(x))
    with pytest.raises(ImageError, match="No such file"):
        restore_path(Enlarge(), tmp_path / "in", tmp_path / "out", overwrite=True, on_error="raise")


def test_trees_targets_inside_and_going_on(tmp_path):
    for name in ("a.png", "s/b.jpg", "s/t/c.bmp", "x.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(9, 7, 3)).save(tmp_path / name)
    first = restore_path(Enlarge(), tmp_path, tmp_path / "out", recursive=True)
    names = ["a.png", "s/b.jpg", "s/t/c.png", "x.png"]
    assert [d.target.relative_to(tmp_path / "out").as_posix() for d in first.done] == names
    assert first.ok
    (tmp_path / "out/s/b.jpg").unlink()
    stamp = (tmp_path / "out/a.png").stat().st_mtime_ns
    second = restore_path(Enlarge(), tmp_path, tmp_path / "out", recursive=True)
    assert [d.source.name for d in second.done] == ["b.jpg"]
    assert [(path.name, "exists already" in reason) for path, reason in second.skipped] == [
        ("a.png", True), ("c.bmp", True), ("x.gif", True)
    ]  # fmt: skip
    assert second.ok
    assert (tmp_path / "out/a.png").stat().st_mtime_ns == stamp
    third = restore_path(Enlarge(), tmp_path, tmp_path / "out", recursive=True, overwrite=True)
    assert len(third.done) == 4


def test_notes_say_what_was_lost(tmp_path):
    save(tmp_path / "deep.png", bits=16)
    assert restore_path(Enlarge(), tmp_path / "deep.png", tmp_path / "y.jpg").done[0].notes == (
        "16 bits rounded to 8",
    )
    frames = [Image.fromarray(np.full((5, 5), 50 * i, np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    report = restore_path(Enlarge(), tmp_path / "film.gif", tmp_path / "still.png")
    assert report.done[0].notes == ("the first of 3 frames or pages",)


def test_a_format_that_cannot_hold_the_result_is_found_before_the_work(tmp_path):
    model = Enlarge(scale=4)
    save(tmp_path / "long.webp", size=(1, 5000))
    save(tmp_path / "clear.png", channels=4)
    report = restore_path(model, tmp_path / "long.webp", tmp_path / "out.webp")
    assert "WEBP holds at most 16383 pixels a side" in report.failed[0][1]
    report = restore_path(model, tmp_path / "clear.png", tmp_path / "out.jpg")
    assert "JPEG cannot hold transparency" in report.failed[0][1]
    assert model.sizes == []


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png")
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    report = restore_path(Enlarge(), tmp_path / "in", tmp_path / "out")
    assert [d.source.name for d in report.done] == ["a.png"]
    assert [(p.name, r) for p, r in report.failed] == [
        ("b.png", f"{tmp_path / 'out/b.png'}: cannot be written: No space left on device")
    ]
    assert [(p.name, r) for p, r in report.skipped] == [("c.png", "not reached: the disk cannot be written")]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


def test_out_of_memory_in_one_file_spares_the_others(tmp_path):
    class Small(Enlarge):
        def forward(self, x):
            if x.shape[-1] == 7 and x.shape[-2] == 9:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().forward(x)

    save(tmp_path / "in/a.png")
    save(tmp_path / "in/b.png", size=(5, 5))
    report = restore_path(Small(), tmp_path / "in", tmp_path / "out")
    assert [d.source.name for d in report.done] == ["b.png"]
    assert "not enough memory even for a tile of 9 pixels" in report.failed[0][1]


def test_a_mistake_in_the_model_is_not_taken_for_a_bad_file(tmp_path):
    class Wrong(Enlarge):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    save(tmp_path / "a.png")
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        restore_path(Wrong(), tmp_path / "a.png", tmp_path / "b.png")


def test_a_folder_that_cannot_be_made(tmp_path):
    save(tmp_path / "in/sub/a.png")
    save(tmp_path / "in/b.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").write_text("a file in the way")
    report = restore_path(Enlarge(), tmp_path / "in", tmp_path / "out", recursive=True)
    assert [d.source.name for d in report.done] == ["b.png"]
    assert report.failed[0][1].startswith(f"{tmp_path / 'out/sub/a.png'}: its folder cannot be made: ")


def test_ctrl_c_leaves_no_half_file(tmp_path, monkeypatch):
    save(tmp_path / "in/a.png")
    save(tmp_path / "in/b.png")
    real, calls = os.replace, []

    def replace(a, b):
        calls.append(b)
        if len(calls) > 1:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        restore_path(Enlarge(), tmp_path / "in", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_restoration as t
class Chatty(t.Enlarge):
    def forward(self, x):
        print("tile", flush=True)
        return super().forward(x)
t.restore_path(Chatty(scale=4), sys.argv[2], sys.argv[3], progress=False)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_whole_files_only_and_goes_on(tmp_path, sign):
    for i in range(16):
        save(tmp_path / "in" / f"{i:02}.png", size=(150, 150), bits=16)
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(Path(__file__).parent),
        str(tmp_path / "in"),
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        for _ in range(4):
            run.stdout.readline()
        time.sleep(0.02)  # somewhere in the encoding or writing of a file
        run.send_signal(sign)
        assert run.wait() != 0
    whole = [p for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]
    assert 0 < len(whole) < 16
    assert all(read_image(p).size == (600, 600) for p in whole)
    if sign == signal.SIGINT:
        assert len(whole) == len(list((tmp_path / "out").iterdir()))
    report = restore_path(Enlarge(scale=4), tmp_path / "in", tmp_path / "out")
    assert report.ok
    assert len(report.done) == 16 - len(whole)


def test_memory_of_a_long_run_stays_flat(tmp_path):
    for i in range(12):
        save(tmp_path / "in" / f"{i:02}.png", size=(40 + i, 40))
    alive = {}

    class Counting(Enlarge):
        def forward(self, x):
            if x.shape[-2] in (42, 51):  # the third picture and the last
                alive[x.shape[-2]] = sum(type(o) is torch.Tensor for o in gc.get_objects())
            return super().forward(x)

    gc.collect()
    gc.disable()  # what only the collector would free counts as alive
    try:
        restore_path(Counting(), tmp_path / "in", tmp_path / "out")
    finally:
        gc.enable()
    assert alive[51] <= alive[42]


def test_progress_shows_on_a_terminal_and_nowhere_else(tmp_path, monkeypatch, capsys):
    from visionhybrid.infer import progress

    save(tmp_path / "in/[red]a.png")
    restore_path(Enlarge(), tmp_path / "in", tmp_path / "out", progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for: take this for a terminal
    monkeypatch.setenv("TERM", "xterm")

    class Slow(Enlarge):
        def forward(self, x):
            time.sleep(0.3)
            return super().forward(x)

    restore_path(Slow(), tmp_path / "in", tmp_path / "out", overwrite=True)
    shown = capsys.readouterr().err
    assert "[red]a.png (1 of 1)" in shown  # a name is no markup
    assert "%" in shown


def test_the_fraction_done_only_grows(tmp_path):
    fractions = []
    Engine(Enlarge(in_chans=1), tile=8).picture(
        Picture(pixels=torch.rand(3, 20, 20), alpha=torch.rand(1, 20, 20)), fractions.append
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    assert len(fractions) > 4 * 4
