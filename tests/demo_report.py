"""A report of the demo with known numbers, and a reader of its page."""

from __future__ import annotations

from html.parser import HTMLParser

import torch

from visionhybrid import demo
from visionhybrid.demo import costs, generation, measure, page
from visionhybrid.demo.training import Training
from visionhybrid.train.grafting import LayerReport

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


def training(recipe: str, **held_out: list[tuple[float, float]]) -> Training:
    return Training(
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


def sheet(recognised: float, right: bool = True) -> generation.Sheet:
    scores = generation.Scores(count=500, recognised=recognised, precision=0.75, recall=0.5, nearest=0.25)
    return generation.Sheet(
        scores=scores,
        pixels=torch.full((10, 2, 8, 8), 100, dtype=torch.uint8),
        right=[[True, right]] + [[True, True]] * 9,
    )


def generated(recognised: float, kept: tuple[float, float]) -> generation.Generation:
    curves = dict(loss=[(2, 1.0), (4, 0.5)], recognised=[(2, 50.0), (4, recognised)])
    layer = LayerReport(
        name="blocks.0.attn",
        mixer="linfusion",
        error=0.125,
        output_error=0.0625,
        seconds_before=0.001,
        seconds_after=0.002,
        fewer_products=0.25,
        kept=True,
    )
    students = [
        generation.Student(
            mixer=mixer,
            training=training(f"hybrid_dit_digits_{mixer}", **curves, distance=[(2, 0.5), (4, 0.01)]),
            sheet=sheet(share, right=False),
            seconds=0.02,
            untrained=sheet(30.0).scores,
            kept=share,
            distance=0.01,
            alone=2,
            layers=[layer],
        )
        for mixer, share in zip(("linfusion", "sla"), kept, strict=True)
    ]
    cost = {
        name: [
            costs.Cost(tokens=n, products=n * n, bytes=n, seconds=t)
            for n, t in zip((16, 64), times, strict=True)
        ]
        for name, times in {"softmax": (1.0, 4.0), "linfusion": (2.0, 1.0), "sla": (2.0, 8.0)}.items()
    }
    return generation.Generation(
        teacher=generation.Drawn(
            mixer="softmax",
            training=training("hybrid_dit_digits", **curves),
            sheet=sheet(recognised),
            seconds=0.01,
        ),
        students=students,
        real=sheet(99.5),
        without=sheet(45.0).scores,
        seen=1442,
        steps=16,
        guidance=2.0,
        costs=[
            costs.MixerCost(
                name=name,
                at=at,
                fewer_from=None if name == "softmax" else 49,
                faster_from=None if name == "softmax" else costs.faster_from(at, cost["softmax"]),
            )
            for name, at in cost.items()
        ],
    )


def report(
    *,
    accuracy: float = 98.0,
    gain: float = 0.8,
    recognised: float = 97.0,
    kept: tuple[float, float] = (99.0, 96.0),
    seconds: float = 125.4,
    quick: bool = False,
) -> page.Report:
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
    drawn = generated(recognised, kept)
    taken = {"digits": 30.0, "photographs": 40.0, "generation": seconds - 70}
    return page.Report(
        digits=digits,
        photographs=photographs,
        generation=drawn,
        targets=demo.targets(digits, photographs, drawn, quick=quick),
        durations=demo.durations(taken, quick=quick),
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
