"""The demo's report: one HTML file that needs nothing but itself, and report.json with every number in it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from visionhybrid.demo.charts import Line, Mark, line_chart
from visionhybrid.demo.measure import SCALE, Digits, Guess, Photo, Photographs
from visionhybrid.demo.style import CSS

CC_BY = "https://creativecommons.org/licenses/by/2.0/"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A promise beside its measurement. `met` is None for a quick run, which promises nothing."""

    name: str
    value: float
    limit: float
    unit: str
    met: bool | None


@dataclass(frozen=True, kw_only=True)
class Report:
    digits: Digits
    photographs: Photographs
    targets: list[Target]
    seconds: float
    quick: bool
    date: str
    command: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def missed(self) -> list[Target]:
        return [target for target in self.targets if target.met is False]


def numbers(value: Any) -> Any:
    """`value` as JSON-able data: pictures left out, what is not finite as null."""
    if isinstance(value, Tensor):
        return None
    if is_dataclass(value):
        found = {f.name: numbers(getattr(value, f.name)) for f in fields(value) if f.repr}
        if isinstance(value, Photo | Photographs):
            found["gain"] = value.gain
        return found
    if isinstance(value, Mapping):
        return {key: numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON knows no nan
    return value


def html(report: Report) -> str:
    """The whole page."""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>visionhybrid demo: {_verdict(report)[0]}</title>",
            f"<style>{CSS}</style>\n</head>\n<body>",
            *_head(report),
            "<main>",
            *_digits(report.digits),
            *_photographs(report.photographs),
            *_again(report),
            *_credits(report.photographs),
            "</main>",
            f"<footer>Written by <code>{escape(report.command)}</code> on {escape(report.date)}. Every number on this page was "
            "measured in that run; <code>report.json</code> beside it holds all of them.</footer>",
            "</body>\n</html>\n",
        ]
    )


def _verdict(report: Report) -> tuple[str, str]:
    if report.quick:
        return "quick run, nothing judged", "unjudged"
    if report.missed:
        return f"missed: {', '.join(target.name for target in report.missed)}", "missed"
    return "all targets met", "met"


def _head(report: Report) -> Iterator[str]:
    text, style = _verdict(report)
    yield "<header>"
    yield f'<span class="badge {style}">{escape(text[0].upper() + text[1:])}</span>'
    yield "<h1>Two hybrid networks, trained just now</h1>"
    yield (
        '<p class="lead">A small Next-ViT learned to read handwritten digits, and a small HAT learned to double the size '
        f"of photographs. Both began from random weights and trained on this machine for {clock(report.seconds)} in all, on "
        "images that come with two Python packages.</p>"
    )
    yield '<div class="tiles">'
    for target in report.targets:
        value = f"{target.value:+.2f}" if target.unit == "dB" else f"{target.value:.1f}"
        goal = f"target \N{GREATER-THAN OR EQUAL TO} {target.limit:g} {target.unit}"
        yield _tile(target.name, value, target.unit, goal, target.met)
    mean = sum(photo.psnr for photo in report.photographs.photos) / len(report.photographs.photos)
    yield _tile("HAT on unseen photographs", f"{mean:.2f}", "dB", "PSNR on Y, mean", None)
    yield _tile("Time in all", clock(report.seconds), "", "goal < 6:00 on 2 quiet cores", None)
    yield "</div></header>"


def _tile(name: str, value: str, unit: str, note: str, met: bool | None) -> str:
    style = {True: "met", False: "missed", None: "unjudged"}[met]
    word = {True: " &middot; met", False: " &middot; missed", None: ""}[met]
    small = f"<small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}{small}</b>'
        f'<span class="badge {style}">{escape(note)}{word}</span></div>'
    )


def _digits(digits: Digits) -> Iterator[str]:
    training = digits.training
    wrong = digits.count - sum(row[i] for i, row in enumerate(digits.confusion))
    yield "<h2>Next-ViT reads handwritten digits</h2>"
    yield (
        f"<p>{_count(training.parameters)} parameters, {training.steps} steps in {clock(training.seconds)}. Convolution blocks "
        "look at neighbourhoods, attention blocks at the whole image. Of "
        f"{digits.count} digits that were kept out of training it reads {digits.count - wrong} correctly: "
        f"<strong>{digits.accuracy:.2f} %</strong>.</p>"
    )
    top1 = training.held_out.get("top1", [])
    yield '<div class="pair"><div class="card">'
    held_out = training.held_out.get("loss", [])
    yield line_chart(
        "Loss",
        [Line(name="training (label smoothing 0.1)", points=training.loss)]
        + ([Line(name="held out", points=held_out, style="two")] if held_out else []),
        x="optimisation step",
        y="cross entropy (nats)",
        log_y=all(value > 0 for _, value in training.loss + held_out),
    )
    yield '</div><div class="card">'
    yield line_chart(
        "Accuracy on held-out digits",
        [Line(name="correct", points=top1, style="two")],
        x="optimisation step",
        y="accuracy (%)",
        marks=[Mark(name="target 97 %", y=97.0)],
    )
    yield "</div></div>"
    yield '<div class="pair" style="margin-top:14px"><div class="card">'
    yield "<h3 style='margin-top:0'>Confusion matrix</h3>"
    yield _confusion(digits.confusion)
    yield "<p class='soft' style='margin:10px 0 0;font-size:.86rem'>Row: the digit. Column: what the network says. "
    yield "Mistakes are outlined.</p></div>"
    yield '<div class="card">'
    title = (
        f"{'The only mistake' if wrong == 1 else f'The {wrong} mistakes'}, then the closest calls"
        if wrong
        else "No mistake; the closest calls"
    )
    if wrong > len(digits.shown):
        title = f"{len(digits.shown)} of the {wrong} mistakes"
    yield f"<h3 style='margin-top:0'>{title}</h3><ul class='digits'>"
    for guess in digits.shown:
        yield _guess(guess)
    yield "</ul></div></div>"


def _confusion(matrix: Sequence[Sequence[int]]) -> str:
    most = max(max(row) for row in matrix) or 1
    rows = []
    for truth, row in enumerate(matrix):
        cells = []
        for guess, count in enumerate(row):
            kind = "zero" if not count else "right" if truth == guess else "wrong"
            heat = f' style="background:rgb(var(--heat) / {0.08 + 0.5 * count / most:.2f})"' if count else ""
            cells.append(f'<td class="{kind}"{heat}>{count}</td>')
        rows.append(f"<tr><th scope='row'>{truth}</th>{''.join(cells)}</tr>")
    top = "".join(f"<th scope='col'>{i}</th>" for i in range(len(matrix)))
    return f"<table class='confusion'><tr><th></th>{top}</tr>{''.join(rows)}</table>"


def _guess(guess: Guess) -> str:
    wrong = guess.guess != guess.truth
    source = picture(guess.pixels[None].expand(3, -1, -1))
    alt = f"a handwritten {guess.truth}, read as {guess.guess}"
    text = (
        f"<b>{guess.truth}</b> read as <b>{guess.guess}</b>" if wrong else f"<b>{guess.truth}</b> read right"
    )
    return (
        f'<li class="{"wrong" if wrong else "right"}"><img src="{source}" alt="{alt}" width="84" height="84">'
        f"{text}<br><span class='soft'>{100 * guess.confidence:.0f} % sure</span></li>"
    )


def _photographs(found: Photographs) -> Iterator[str]:
    training = found.training
    yield "<h2>HAT doubles the size of photographs</h2>"
    yield (
        f"<p>{_count(training.parameters)} parameters, {training.steps} steps in {clock(training.seconds)} on patches of "
        f"{len(found.trained_on)} photographs. It is measured on {len(found.photos)} others: each is reduced to half its size by "
        "MATLAB's bicubic rule, then enlarged again. PSNR and SSIM are taken on luma (Y) with "
        f"{SCALE} border pixels left out, as in the published tables. HAT is "
        f"<strong>{found.gain:+.2f} dB</strong> against bicubic on average.</p>"
    )
    curve = training.held_out.get("psnr", [])
    bicubic = training.held_out.get("psnr_bicubic", [])
    yield '<div class="pair"><div class="card">'
    yield line_chart(
        "Training loss",
        [Line(name="L1 on training patches", points=training.loss)],
        x="optimisation step",
        y="mean absolute error (0 to 1)",
        log_y=all(value > 0 for _, value in training.loss),
    )
    yield '</div><div class="card">'
    yield line_chart(
        "PSNR while training, centres of the held-out photographs",
        [Line(name="HAT (averaged weights)", points=curve, style="two")],
        x="optimisation step",
        y="PSNR on Y (dB)",
        marks=[Mark(name="bicubic", y=bicubic[-1][1])] if bicubic else (),
    )
    yield "</div></div>"
    yield '<div class="card scroll">'
    yield _scores(found)
    yield "</div>"
    for photo in found.photos:
        yield _photo(photo)


def _scores(found: Photographs) -> str:
    def row(name: str, values: Sequence[float]) -> str:
        psnr0, psnr1, ssim0, ssim1 = values
        sign = "up" if psnr1 > psnr0 else "down"
        return (
            f"<tr><td>{escape(name)}</td><td class='num'>{psnr0:.2f}</td><td class='num'>{psnr1:.2f}</td>"
            f"<td class='num {sign}'>{psnr1 - psnr0:+.2f}</td><td class='num'>{ssim0:.4f}</td><td class='num'>{ssim1:.4f}</td></tr>"
        )

    table = [(p.bicubic_psnr, p.psnr, p.bicubic_ssim, p.ssim) for p in found.photos]
    mean = [sum(column) / len(table) for column in zip(*table, strict=True)]
    body = "".join(row(photo.name, values) for photo, values in zip(found.photos, table, strict=True))
    return (
        "<table><thead><tr><th>held-out photograph</th><th class='num'>bicubic<br>dB</th><th class='num'>HAT<br>dB</th>"
        "<th class='num'>gain<br>dB</th><th class='num'>bicubic<br>SSIM</th><th class='num'>HAT<br>SSIM</th></tr></thead>"
        f"<tbody>{body}</tbody><tfoot>{row('mean', mean)}</tfoot></table>"
    )


def _photo(photo: Photo) -> str:
    top, left, side = photo.box
    height, width = photo.truth.shape[1:]
    frame = (
        f"left:{100 * left / width:.2f}%;top:{100 * top / height:.2f}%;"
        f"width:{100 * side / width:.2f}%;height:{100 * side / height:.2f}%"
    )
    captions = (
        ("Bicubic", photo.bicubic, f"{photo.bicubic_psnr:.2f} dB &middot; {photo.bicubic_ssim:.4f}"),
        ("HAT", photo.restored, f"{photo.psnr:.2f} dB &middot; {photo.ssim:.4f}"),
        ("Truth", photo.truth, "PSNR &middot; SSIM on Y"),
    )
    crops = "".join(
        f'<figure><img src="{picture(pixels[:, top : top + side, left : left + side])}" '
        f'alt="{name}: detail of {escape(photo.name)}" width="{side}" height="{side}">'
        f"<figcaption><b>{name}</b><span class='soft num'>{text}</span></figcaption></figure>"
        for name, pixels, text in captions
    )
    return (
        f'<section class="card photo"><h3>{escape(photo.name)} <span class="{"up" if photo.gain > 0 else "down"}">'
        f'{photo.gain:+.2f} dB</span></h3><div class="view"><div class="whole">'
        f'<img src="{picture(photo.truth, lossy=True)}" alt="the photograph {escape(photo.name)}" width="{width}" height="{height}">'
        f'<i style="{frame}"></i></div><div class="crops">{crops}</div></div></section>'
    )


def _again(report: Report) -> Iterator[str]:
    facts = report.machine
    yield "<h2>Do it again</h2>"
    commands = [
        report.command,
        *(
            f"{t.command} --out runs/{t.recipe}"
            for t in (report.digits.training, report.photographs.training)
        ),
        "visionhybrid restore photo.jpg large.png --model runs/hat_samples_x2/model.safetensors",
    ]
    yield f"<pre><code>{escape(chr(10).join(commands))}</code></pre>"
    rows = {
        "Processor": f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads used",
        "Memory": f"{facts['memory_gib']} GiB",
        "System": f"{facts['system']}, Python {facts['python']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "Time": f"{clock(report.seconds)} in all; digits {clock(report.digits.training.seconds)}, photographs "
        f"{clock(report.photographs.training.seconds)}",
    }
    yield "<div class='card scroll'><table><tbody>"
    for name, text in rows.items():
        yield f"<tr><th scope='row'>{name}</th><td>{escape(str(text))}</td></tr>"
    yield "</tbody></table></div>"
    for training in (report.digits.training, report.photographs.training):
        yield f"<details><summary>Recipe <code>{escape(training.recipe)}</code>, every setting</summary><pre><code>"
        yield escape("\n".join(f"{key} = {value}" for key, value in _flat(training.config)))
        yield "</code></pre></details>"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _credits(found: Photographs) -> Iterator[str]:
    yield "<h2>Credits</h2>"
    yield "<div class='card scroll'><table><thead><tr><th>photograph</th><th>by</th><th>rights</th><th>comes with</th></tr></thead>"
    yield "<tbody>"
    for photo in found.photos:
        rights = escape(photo.license)
        if photo.license == "CC BY 2.0":
            rights = f'<a href="{CC_BY}">CC BY 2.0</a>, shown reduced and enlarged again'
        yield (
            f"<tr><td>{escape(photo.name)}</td><td>{escape(photo.credit)}</td><td>{rights}</td>"
            f"<td>{escape(photo.package)}</td></tr>"
        )
    yield "</tbody></table></div>"
    yield (
        "<p class='soft'>Digits: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
        "Repository (CC BY 4.0), as packed in scikit-learn. Trained on: "
        f"{escape(', '.join(found.trained_on))} (scikit-image and scikit-learn; flower: vultilion, flickr, CC BY 2.0). Next-ViT: "
        "arXiv:2207.05501. HAT: arXiv:2309.05239.</p>"
    )


def picture(pixels: Tensor, *, lossy: bool = False) -> str:
    """uint8 (3, H, W) as a data URI: PNG, or JPEG where every pixel need not be exact."""
    data = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(data, **({"format": "JPEG", "quality": 85} if lossy else {"format": "PNG", "optimize": True}))
    kind = "jpeg" if lossy else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def clock(seconds: float) -> str:
    """Minutes and seconds: 4:07."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} million" if parameters >= 1e6 else f"{parameters / 1e3:.0f} thousand"
