"""What the demo measures, and how it draws curves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from demo_report import picture, read

from visionhybrid import mixers
from visionhybrid.demo import charts, costs, generation, measure
from visionhybrid.demo.training import clear

# --- charts


def test_ticks_are_round_and_inside() -> None:
    axis = charts._Axis(0, 1234, 0, 100, log=False)
    assert axis.ticks() == [0, 500, 1000]
    axis = charts._Axis(29.13, 30.61, 100, 0, log=False)
    assert axis.ticks() == pytest.approx([29.5, 30, 30.5])
    axis = charts._Axis(0.012, 0.4, 0, 100, log=True)
    assert axis.ticks() == pytest.approx([0.03, 0.1, 0.3])
    axis = charts._Axis(1.1, 1.9, 0, 100, log=True)
    assert axis.ticks() == pytest.approx([1.2, 1.4, 1.6, 1.8])


def test_axis_maps_ends_to_ends() -> None:
    for log in (False, True):
        axis = charts._Axis(0.1, 10, 200, 20, log=log)
        assert (axis(0.1), axis(10)) == pytest.approx((200, 20))
    assert charts._Axis(0.1, 10, 0, 100, log=True)(1) == pytest.approx(50)


def test_chart_has_axes_legend_and_gaps() -> None:
    line = charts.Line(name="a < b", points=[(0, 1.0), (1, float("nan")), (2, 3.0), (3, 4.0)])
    html = charts.line_chart("T", [line], x="step", y="dB", marks=[charts.Mark(name="goal", y=2.0)])
    reader = read(html)
    assert all(words in reader.text for words in ("T", "step", "dB", "a < b", "goal"))
    (path,) = (
        attrs["d"]
        for tag, attrs in reader.tags
        if attrs.get("class") == "line one" and attrs["d"] != "M1 4H21"
    )
    assert (path.count("M"), path.count("L")) == (2, 1)
    assert "nan" not in html


def test_chart_of_a_constant_and_of_nothing() -> None:
    flat = charts.line_chart("T", [charts.Line(name="a", points=[(0, 5.0), (9, 5.0)])], x="x", y="y")
    assert "nan" not in flat
    assert "inf" not in flat
    with pytest.raises(ValueError, match="no finite point"):
        charts.line_chart("T", [charts.Line(name="a", points=[(0, float("nan"))])], x="x", y="y")
    with pytest.raises(ValueError, match="logarithmic axis cannot show"):
        charts.line_chart("T", [charts.Line(name="a", points=[(0, 0.0)])], x="x", y="y", log_y=True)


def test_both_axes_may_be_logarithmic() -> None:
    line = charts.Line(name="a", points=[(16, 1.0), (256, 10.0), (4096, 100.0)])
    html = charts.line_chart("T", [line], x="x", y="y", log_x=True, log_y=True)
    places = re.findall(r'<circle [^>]*cx="([0-9.]+)" cy="([0-9.]+)"', html)
    x, y = ([float(place[axis]) for place in places] for axis in (0, 1))
    assert re.findall(r'text-anchor="middle">(\d+)<', html) == ["16", "256", "4096"]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.11)
    with pytest.raises(ValueError, match="logarithmic axis cannot show"):
        charts.line_chart("T", [charts.Line(name="a", points=[(0, 1.0)])], x="x", y="y", log_x=True)


# --- measuring


def test_detail_is_chosen_by_content_alone() -> None:
    image = picture(100, 120, 160)
    image[:, 60:90, 100:130] = torch.randint(
        0, 256, (3, 30, 30), generator=torch.Generator().manual_seed(0)
    ).byte()
    top, left, side = measure._busiest(image, 24)
    assert side == 24
    assert 60 <= top <= 66
    assert 100 <= left <= 106


def test_photo_scores_are_those_of_the_pictures_shown() -> None:
    from visionhybrid.data.metrics import psnr
    from visionhybrid.data.resize import imresize
    from visionhybrid.data.samples import photographs

    class Bicubic(torch.nn.Module):
        scale, in_chans, multiple_of = 2, 3, 1

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return imresize(x, 2) * self.weight

    given = photographs("val", channels=3)[0]
    found = measure._photo(Bicubic(), given, given.pixels[:, 100:200, 100:220])
    # The network is bicubic too; only the rounding between its two axes differs.
    assert found.gain == pytest.approx(0, abs=0.02)
    assert found.psnr == float(psnr(found.restored, found.truth, crop_border=2))
    assert (found.name, found.credit, found.license) == (given.name, given.credit, given.license)


def test_only_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "digits"
    mine.mkdir()
    (mine / "config.json").write_text('{"name": "nextvit_digits"}')
    clear(mine, "nextvit_digits")
    assert not mine.exists()
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="no earlier run of nextvit_digits"):
        clear(mine, "nextvit_digits")
    assert (mine / "thesis.txt").exists()
    graft = tmp_path / "sla"
    (graft / "alone").mkdir(parents=True)
    (graft / "alone" / "config.json").write_text('{"name": "hybrid_dit_digits_sla_alone"}')
    clear(graft, "hybrid_dit_digits_sla")
    assert not graft.exists()


def test_costs_are_the_mixers_own_and_times_are_compared_from_the_long_end() -> None:
    shape = dict(dim=16, heads=2, head_dim=8)
    found = costs.compare(
        {name: mixers.create(name, **shape) for name in ("softmax", "linfusion")}, (2, 8), 1
    )
    softmax, linear = found
    assert [at.tokens for at in softmax.at] == [4, 64]
    assert [at.products for at in softmax.at] == [2 * n * n * 16 for n in (4, 64)]
    assert (softmax.fewer_from, softmax.faster_from) == (None, None)
    assert linear.fewer_from == mixers.crossover(mixers.create("linfusion", **shape))
    assert all(at.seconds > 0 for cost in found for at in cost.at)

    def at(*seconds: float) -> list[costs.Cost]:
        return [costs.Cost(tokens=4**i, products=1, bytes=1, seconds=s) for i, s in enumerate(seconds)]

    assert costs.faster_from(at(1, 3, 1, 1), at(2, 2, 2, 2)) == 16
    assert costs.faster_from(at(1, 1, 3), at(2, 2, 2)) is None


def test_digits_are_judged_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that reads the mean grey level, so that what is right, near and covered is known."""

    class Grey:
        def __init__(self, run: Path) -> None:
            pass

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return (images.mean((1, 2, 3)) * 10).long()

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((1, 2, 3))[:, None]

    def grey(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    labels = torch.arange(10).repeat_interleave(4)
    train = grey((labels + 0.5) / 10 + torch.arange(40) % 4 * 1e-3)
    monkeypatch.setattr(generation, "Judge", Grey)
    monkeypatch.setattr(generation, "digits", lambda split: (train, labels))
    judging = generation.Judging(Path(), quick=False)
    assert judging.real().scores == generation.Scores(
        count=40, recognised=100.0, precision=1.0, recall=1.0, nearest=0.0
    )
    wrong = train.clone()
    wrong[:4] = 0.25 + torch.arange(4).view(4, 1, 1, 1) * 1e-3  # zeros that are twos
    found = judging._sheet(wrong + 0.01, labels)
    assert found.scores.recognised == pytest.approx(90)
    assert found.right[0] == [False] * 4
    assert all(all(row) for row in found.right[1:])
    # 7, 8, 9 and 10 thousandths from the fourth training digit of the class; torch's median is the lower one
    assert found.scores.nearest == pytest.approx(0.008, abs=1e-4)
    assert found.scores.recall < 1
    assert found.pixels.shape == (10, 4, 8, 8)
