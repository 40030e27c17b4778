"""Local attribution maps: the authors' numbers, and what must hold for any model."""

import pytest
import torch
from golden import load_case
from torch import nn

import visionhybrid
from visionhybrid.infer import attribution
from visionhybrid.infer.attribution import attribute, blur_path, detect, gini, overlay


def test_golden_map_of_a_small_hat():
    case = load_case("hat_tiny_lam_x2_24x32")
    lam = case.facts["lam"]
    image = case.input("x")[0]
    points, _ = blur_path(image, fold=lam["fold"], sigma=lam["sigma"], size=lam["l"])
    case.check("path0", points[:1].reshape(case.outputs["path0"].shape))
    case.check("pathmid", points[lam["fold"] // 2].reshape(case.outputs["pathmid"].shape))
    found = attribute(
        visionhybrid.load(case.state_dict()),
        image,
        row=lam["h"],
        column=lam["w"],
        window=lam["window"],
        fold=lam["fold"],
        sigma=lam["sigma"],
        size=lam["l"],
        batch=5,
    )
    case.check("attribution", found.values.reshape(case.outputs["attribution"].shape))
    case.check("map", found.map)
    case.check("gini", torch.tensor([found.gini]))
    case.check("di", torch.tensor([found.diffusion_index]))
    assert overlay(found, image).shape == image.shape


class Shift(nn.Module):
    """Moves the image one pixel to the right: the output window reads a known input window."""

    def forward(self, x):
        return torch.roll(x, 1, dims=3)


def test_only_pixels_the_model_reads_are_attributed():
    found = attribute(Shift(), torch.rand(3, 20, 24), row=6, column=9, window=4, fold=8)
    touched = found.map > 0
    assert touched[6:11, 8:13].float().mean() > 0.8
    touched[6:11, 8:13] = False
    assert not touched.any()
    assert found.map.max() == 1


def test_batch_of_the_path_does_not_matter():
    model = nn.Conv2d(3, 3, 3, padding=1)
    image = torch.rand(3, 16, 16)
    one, four = (attribute(model, image, row=3, column=2, window=6, fold=6, batch=b) for b in (1, 4))
    torch.testing.assert_close(one.values, four.values)
    assert model.training  # left as it was


def test_flat_image_has_no_attribution_and_no_nan():
    found = attribute(Shift(), torch.full((3, 16, 16), 0.5), row=2, column=2, window=4, fold=4)
    assert found.values.abs().max() < 1e-4
    assert torch.isfinite(found.map).all()


def test_detector_by_hand():
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 1, 1] = 1.0
    # (1, 1) falls down and right: sqrt 2; (0, 1) and (1, 0) rise by 1 once.
    assert detect(image, 0, 0, 2).item() == pytest.approx(2 + 2**0.5)


def test_gini_extremes():
    assert gini(torch.ones(100)) == pytest.approx(0, abs=1e-9)
    one = torch.zeros(1000)
    one[3] = 1
    assert gini(one) == pytest.approx(0.999, abs=1e-3)


@pytest.mark.parametrize(("row", "column", "window"), [(0, 0, 16), (-1, 0, 4), (13, 0, 4), (0, 0, 0)])
def test_window_outside_the_output(row, column, window):
    with pytest.raises(ValueError, match="needs one pixel more"):
        attribute(Shift(), torch.rand(3, 16, 16), row=row, column=column, window=window, fold=2)


def test_wrong_image():
    with pytest.raises(ValueError, match=r"must be \(C, H, W\)"):
        attribute(Shift(), torch.rand(1, 3, 16, 16), row=0, column=0)
    with pytest.raises(ValueError, match="both sides must exceed 4"):
        attribution.blur(torch.rand(3, 4, 16), attribution.gaussian_kernel(9, 1.0))
