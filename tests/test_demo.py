"""The demo: its report shows what was measured and needs nothing but itself; a missed target is said and raised."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from visionhybrid import demo
from visionhybrid.demo import charts, measure, page

VOID = {"meta", "img", "br", "path", "circle", "link", "input", "hr"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects text and everything that could make a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "srcset", "data", "poster", "xlink:href")
        ]
        if "href" in found:
            (self.links if tag == "a" else self.fetched).append(found["href"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> closes the wrong element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.open, f"never closed: {reader.open}"
    return reader


def training(recipe: str, **held_out: list[tuple[float, float]]) -> measure.Training:
    return measure.Training(
        recipe=recipe,
        command=f"visionhybrid train {recipe}",
        config={"name": recipe, "loop": {"steps": 4}},
        parameters=1234,
        steps=4,
        seconds=61.0,
        loss=[(1, 2.0), (2, 1.0), (4, 0.5)],
        held_out=held_out,
    )


def picture(value: int, height: int = 96, width: int = 128) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


def report(*, accuracy: float = 98.0, gain: float = 0.8, quick: bool = False) -> page.Report:
    confusion = torch.diag(torch.full((10,), 5))
    confusion[9, 3] = 1
    guesses = [
        measure.Guess(pixels=torch.zeros(8, 8, dtype=torch.uint8), truth=9, guess=3, confidence=0.4),
        measure.Guess(pixels=torch.zeros(8, 8, dtype=torch.uint8), truth=1, guess=1, confidence=0.5),
    ]
    photo = measure.Photo(
        name="<coffee>",
        credit="R & M",
        license="CC BY 2.0",
        package="scikit-image",
        bicubic_psnr=30.0,
        bicubic_ssim=0.9,
        psnr=30.0 + gain,
        ssim=0.91,
        box=(8, 16, 32),
        bicubic=picture(10),
        restored=picture(20),
        truth=picture(30),
    )
    digits = measure.Digits(
        training=training("nextvit_digits", top1=[(2, 50.0), (4, accuracy)], loss=[(2, 1.0), (4, 0.7)]),
        count=51,
        accuracy=accuracy,
        confusion=confusion.tolist(),
        shown=guesses,
    )
    photographs = measure.Photographs(
        training=training("hat_samples_x2", psnr=[(2, 29.0), (4, 31.0)], psnr_bicubic=[(4, 30.0)]),
        photos=[photo],
        trained_on=["astronaut"],
    )
    return page.Report(
        digits=digits,
        photographs=photographs,
        targets=demo.targets(digits, photographs, quick=quick),
        seconds=125.4,
        quick=quick,
        date="2026-11-21",
        command="visionhybrid demo --out demo",
        machine={
            "processor": "P",
            "cores": 2,
            "threads": 2,
            "memory_gib": 8,
            "system": "S",
            "python": "3.11",
        },
        versions={"torch": "2.15"},
    )


# --- the page


def test_page_is_whole_and_fetches_nothing() -> None:
    html = page.html(report())
    reader = read(html)
    assert reader.fetched
    assert all(source.startswith("data:image/") for source in reader.fetched)
    assert reader.links == [page.CC_BY]
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in reader.tags}
    assert not re.search(r"url\(|@import", html)


def test_page_shows_what_was_measured() -> None:
    text = read(page.html(report())).text
    for words in (
        "All targets met",
        "98.0 %",
        "+0.80 dB",
        "2:05",
        "30.00 dB \N{MIDDLE DOT} 0.9000",
        "30.80 dB \N{MIDDLE DOT} 0.9100",
        "9 read as 3",
        "The only mistake",
        "1 thousand parameters, 4 steps in 1:01",
        "astronaut",
        "loop.steps = 4",
        "P, 2 cores, 2 threads used",
        "CC BY 2.0",
    ):
        assert words in text, words


def test_page_escapes_what_it_is_given() -> None:
    html = page.html(report())
    assert "&lt;coffee&gt;" in html
    assert "<coffee>" not in html
    assert "R &amp; M" in html


@pytest.mark.parametrize(
    ("measured", "badge", "met"),
    [
        ({}, "All targets met", 2),
        ({"accuracy": 96.9}, "Missed: Digits read correctly", 1),
        ({"gain": 0.49}, "Missed: HAT over bicubic", 1),
        ({"gain": float("nan")}, "Missed: HAT over bicubic", 1),
        ({"accuracy": 10.0, "gain": -3.0, "quick": True}, "Quick run, nothing judged", 0),
    ],
)
def test_page_says_which_targets_are_met(measured: dict[str, float], badge: str, met: int) -> None:
    reader = read(page.html(report(**measured)))
    assert badge in reader.text
    badges = [
        attrs["class"]
        for tag, attrs in reader.tags
        if tag == "span" and "badge" in (attrs.get("class") or "")
    ]
    # The first badge is the verdict, the others those of the tiles.
    assert badges[1:].count("badge met") == met


def test_crops_show_the_same_place_of_each_picture() -> None:
    images = [
        attrs
        for tag, attrs in read(page.html(report())).tags
        if tag == "img" and "detail of" in (attrs["alt"] or "")
    ]
    assert [attrs["alt"].split(":")[0] for attrs in images] == ["Bicubic", "HAT", "Truth"]
    for attrs, value in zip(images, (10, 20, 30), strict=True):
        data = base64.b64decode(attrs["src"].split(",", 1)[1])
        image = Image.open(io.BytesIO(data))
        assert image.size == (32, 32)
        assert image.getextrema() == ((value, value),) * 3


def test_numbers_are_json_without_pictures() -> None:
    found = json.loads(json.dumps(page.numbers(report())))
    assert found["photographs"]["gain"] == pytest.approx(0.8)
    assert found["photographs"]["photos"][0]["gain"] == pytest.approx(0.8)
    assert "truth" not in found["photographs"]["photos"][0]
    assert "pixels" not in found["digits"]["shown"][0]
    assert found["digits"]["confusion"][9][3] == 1
    assert found["digits"]["training"]["loss"] == [[1, 2.0], [2, 1.0], [4, 0.5]]
    assert page.numbers(report(gain=float("nan")))["targets"][1]["value"] is None


# --- charts


def test_ticks_are_round_and_inside() -> None:
    axis = charts._Axis(0, 1234, 0, 100, log=False)
    assert axis.ticks() == [0, 500, 1000]
    axis = charts._Axis(29.13, 30.61, 100, 0, log=False)
    assert axis.ticks() == pytest.approx([29.5, 30, 30.5])
    axis = charts._Axis(0.012, 0.4, 0, 100, log=True)
    assert axis.ticks() == pytest.approx([0.03, 0.1, 0.3])


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
    measure._clear(mine, "nextvit_digits")
    assert not mine.exists()
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="no earlier run of nextvit_digits"):
        measure._clear(mine, "nextvit_digits")
    assert (mine / "thesis.txt").exists()


# --- the whole


def test_missed_target_is_written_then_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poor = report(accuracy=96.0)
    monkeypatch.setattr(demo, "learn_digits", lambda *args, **kwargs: poor.digits)
    monkeypatch.setattr(demo, "learn_photographs", lambda *args, **kwargs: poor.photographs)
    with pytest.raises(
        demo.TargetMissedError, match=r"Digits read correctly 96.00 %, target 97 %; see .*report.html"
    ):
        demo.run(tmp_path, progress=False)
    assert "Missed: Digits read correctly" in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    assert [target["met"] for target in found["targets"]] == [False, True]

    good = replace(poor.digits, accuracy=97.0)
    monkeypatch.setattr(demo, "learn_digits", lambda *args, **kwargs: good)
    assert demo.run(tmp_path, progress=False) == tmp_path / "report.html"


def test_quick_demo_end_to_end(tmp_path: Path) -> None:
    path = demo.run(tmp_path, seed=3, quick=True, progress=False)
    reader = read(path.read_text(encoding="utf-8"))
    assert "Quick run, nothing judged" in reader.text
    assert all(source.startswith("data:image/") for source in reader.fetched)
    found = json.loads((tmp_path / "report.json").read_text())
    assert sum(map(sum, found["digits"]["confusion"])) == found["digits"]["count"] == 355
    right = sum(row[i] for i, row in enumerate(found["digits"]["confusion"]))
    assert found["digits"]["accuracy"] == pytest.approx(100 * right / 355)
    # Measured a second time from the released file: what the run itself measured last.
    assert found["digits"]["training"]["held_out"]["top1"][-1][1] == pytest.approx(
        found["digits"]["accuracy"]
    )
    assert [photo["name"] for photo in found["photographs"]["photos"]] == [
        "coffee",
        "rocket",
        "camera",
        "china",
    ]
    assert not set(found["photographs"]["trained_on"]) & {"coffee", "rocket", "camera", "china"}
    assert found["photographs"]["training"]["steps"] == 4
    for name in ("digits", "photographs"):
        assert (tmp_path / name / "model.safetensors").is_file()
        assert json.loads((tmp_path / name / "config.json").read_text())["loop"]["seed"] == 3
    assert not list(tmp_path.glob(".*"))
