"""`restore` for every kind of image, whole and in tiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import load_case
from PIL import Image, ImageCms
from restoring import Enlarge, grown, noise
from torch import nn

import visionhybrid
from visionhybrid.data.images import ImageError, Picture, read_image, write_image
from visionhybrid.data.metrics import psnr
from visionhybrid.data.resize import imresize
from visionhybrid.data.samples import photographs
from visionhybrid.infer import memory
from visionhybrid.infer.restoration import restore
from visionhybrid.infer.tiles import pasted

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


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
    print_colours = palette.convert("RGB").convert("CMYK")
    print_colours.info["icc_profile"] = b"of the four inks"
    colour = restore(Enlarge(), print_colours)
    assert (colour.mode, "icc_profile" in colour.info) == ("RGB", False)
    premultiplied = palette.convert("LA").convert("La")
    assert restore(Enlarge(), premultiplied).mode == "LA"
    for mode in "IF":
        with pytest.raises(ValueError, match=f"image of mode {mode}: .* have no white point"):
            restore(Enlarge(), palette.convert("L").convert(mode))


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
