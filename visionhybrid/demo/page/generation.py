"""The section of the generator and of its copies with other mixers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from visionhybrid.demo.charts import Line, Mark, line_chart
from visionhybrid.demo.costs import MixerCost
from visionhybrid.demo.generation import Generation, Scores, Sheet
from visionhybrid.demo.page.parts import NAMES, amount, clock, picture
from visionhybrid.demo.training import Series

STYLES = ("faint", "one", "two", "three")
PIXEL = 4  # side of a digit's pixel on a sheet, so that nothing is smoothed away
RED = torch.tensor([192, 39, 29, 255], dtype=torch.uint8).view(4, 1, 1)


def section(found: Generation) -> Iterator[str]:
    """HTML: the digits of all generators side by side, their scores, the grafts and what attention costs."""
    yield "<h2>HybridDiT writes digits, and goes on without softmax</h2>"
    yield from _words(found)
    yield from _learning(found)
    yield '<div class="card"><h3 style="margin-top:0">Real digits, and each generator from the same noise</h3>'
    yield from _sheets(found)
    yield "</div>"
    yield '<div class="card scroll">'
    yield _scores(found)
    yield (
        "<p class='soft' style='margin:12px 0 0;font-size:.86rem'>Precision: share of the digits that lie among the training "
        "digits in the classifier's features; recall: share of the training digits that lie among these. Nearest: median distance to the "
        "nearest training digit, root mean square in percent of the range from black to white; a generator that had "
        "memorised would be near 0. Time: of this machine, to draw one digit.</p></div>"
    )
    yield from _grafts(found)
    yield from _costs(found)


def _words(found: Generation) -> Iterator[str]:
    training, scores = found.teacher.training, found.teacher.sheet.scores
    yield (
        f"<p>{amount(training.parameters)} parameters, {training.steps} steps of flow matching in {clock(training.seconds)} on "
        f"{found.seen} real digits. From noise and a class it draws a digit in {found.steps} steps, with guidance "
        f"{found.guidance:g}. Of {scores.count} digits, as many of each class, the Next-ViT above takes "
        f"<strong>{scores.recognised:.1f} %</strong> for the class asked for.</p>"
    )
    yield (
        f"<p>That judge was trained on the same {found.seen} real digits only. It has never seen a generated one, and has no part "
        "in the training: no gradient of it, no choice of weights or samples by it. It judges the digits as they come. Of the "
        f"{found.real.scores.count} real digits kept out of training it recognises {found.real.scores.recognised:.1f} %.</p>"
    )
    yield (
        f"<p>Recognised is not everything: with its attention switched off the teacher still gets {found.without.recognised:.1f} %, for on "
        "digits this small class and place say much. What attention adds shows in the distance to real digits, in precision and recall; "
        "the table has it all, with each copy as it was put in and as it was trained.</p>"
    )
    for student in found.students:
        training = student.training
        yield (
            f"<p>A copy got {NAMES[student.mixer]} instead of softmax attention in all {len(student.layers)} blocks. As put in, "
            f"{student.untrained.recognised:.1f} % of its digits are recognised; after it has imitated the teacher for {training.steps} steps "
            f"({clock(training.seconds)} with all measuring), {student.sheet.scores.recognised:.1f} %: "
            f"<strong>{student.kept:.1f} %</strong> of the teacher's score.</p>"
        )


def _learning(found: Generation) -> Iterator[str]:
    training = found.teacher.training
    held_out = training.held_out["loss"]
    yield '<div class="pair"><div class="card">'
    yield line_chart(
        "Teacher: loss",
        [Line(name="training", points=training.loss), Line(name="held out", points=held_out, style="two")],
        x="optimisation step",
        y="squared error of the flow",
        log_y=True,
    )
    yield '</div><div class="card">'
    yield line_chart(
        "Teacher: digits recognised while training",
        [Line(name="of 10 a class", points=training.held_out["recognised"], style="two")],
        x="optimisation step",
        y="recognised (%)",
        marks=[Mark(name="target 90 %", y=90.0)],
    )
    yield "</div></div>"


def _sheets(found: Generation) -> Iterator[str]:
    yield '<div class="sheets">'
    yield _sheet("Real, held out", found.real, "digits that no network was trained on")
    for drawn in (found.teacher, *found.students):
        role = "the teacher" if drawn is found.teacher else "grafted"
        yield _sheet(f"{NAMES[drawn.mixer]}, {role}", drawn.sheet, "from noise and a class")
    yield "</div>"
    yield (
        "<p class='soft' style='margin:12px 0 0;font-size:.86rem'>Row: the class, 0 to 9. Column: the same noise for every "
        "generator; the first ones drawn, none chosen. A red frame: the judge takes it for something else.</p>"
    )


def _sheet(name: str, sheet: Sheet, what: str) -> str:
    return (
        f'<figure><img src="{picture(_mosaic(sheet))}" alt="{escape(name)}: {escape(what)}">'
        f"<figcaption><b>{escape(name)}</b><span class='soft num'>{sheet.scores.recognised:.1f} % of {sheet.scores.count} "
        "recognised</span></figcaption></figure>"
    )


def _mosaic(sheet: Sheet) -> Tensor:
    """One picture, uint8 (4, H, W): grey digits with transparent gaps, red around those that are not recognised."""
    rows, columns, height, width = sheet.pixels.shape
    gap = 1
    tile_height, tile_width = height + 2 * gap, width + 2 * gap
    canvas = torch.zeros(4, rows * tile_height, columns * tile_width, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            top, left = row * tile_height, column * tile_width
            if not sheet.right[row][column]:
                canvas[:, top : top + tile_height, left : left + tile_width] = RED
            inside = canvas[:, top + gap : top + gap + height, left + gap : left + gap + width]
            inside[:3], inside[3] = sheet.pixels[row, column], 255
    return canvas.repeat_interleave(PIXEL, 1).repeat_interleave(PIXEL, 2)


def _scores(found: Generation) -> str:
    def row(name: str, scores: Scores, kept: float | None, parameters: str, seconds: float | None) -> str:
        cells = (
            f"{scores.recognised:.1f} %",
            "" if kept is None else f"{kept:.1f} %",
            f"{scores.precision:.2f}",
            f"{scores.recall:.2f}",
            f"{100 * scores.nearest:.1f} %",
            parameters,
            "" if seconds is None else f"{1e3 * seconds:.1f}",
        )
        return f"<tr><td>{escape(name)}</td>{_cells(cells)}</tr>"

    body = row("real, held out", found.real.scores, None, "", None)
    teacher = found.teacher
    score = teacher.sheet.scores.recognised

    def kept(scores: Scores) -> float:
        return 100 * scores.recognised / score if score else float("nan")

    parameters = f"{teacher.training.parameters:,}"
    body += row(f"{NAMES[teacher.mixer]}, teacher", teacher.sheet.scores, None, parameters, teacher.seconds)
    body += row("attention switched off", found.without, kept(found.without), "", None)
    for student in found.students:
        name, parameters = NAMES[student.mixer], f"{student.training.parameters:,}"
        body += row(f"{name}, as put in", student.untrained, kept(student.untrained), parameters, None)
        body += row(f"{name}, grafted", student.sheet.scores, student.kept, parameters, student.seconds)
    heads = (
        "recognised",
        "of the<br>teacher's",
        "precision",
        "recall",
        "nearest",
        "parameters",
        "ms a<br>digit",
    )
    return _table("digits", heads, body)


def _grafts(found: Generation) -> Iterator[str]:
    yield "<h3>Learning to do without softmax</h3>"
    first = found.students[0]
    yield (
        f"<p>For {first.alone} steps each new layer by itself learns to give what the teacher's gives, on the teacher's "
        "activations; then the whole copy learns from the teacher's outputs and features and from the task. Distances are on held-out digits.</p>"
    )
    yield '<div class="pair"><div class="card">'
    yield line_chart(
        "Distance to what the teacher predicts",
        _lines({s.mixer: [(x, 100 * y) for x, y in s.training.held_out["distance"]] for s in found.students}),
        x=f"step (from {first.alone} on: the whole copy)",
        y="relative squared error (%)",
        log_y=True,
    )
    yield '</div><div class="card">'
    teacher = found.teacher.sheet.scores.recognised
    yield line_chart(
        "Digits recognised while grafting",
        _lines({s.mixer: s.training.held_out["recognised"] for s in found.students}),
        x="step",
        y="recognised (%)",
        marks=[Mark(name="95 % of the teacher's", y=0.95 * teacher)],
    )
    yield '</div></div><div class="card scroll">'
    heads = (
        "error of<br>the layer",
        "error of the output,<br>only it replaced",
        "softmax<br>ms",
        "new<br>ms",
        "multiplications,<br>softmax : new",
    )
    body = ""
    for student in found.students:
        for layer in student.layers:
            times = (f"{1e3 * seconds:.2f}" for seconds in (layer.seconds_before, layer.seconds_after))
            products = "" if layer.fewer_products is None else f"{layer.fewer_products:.2f}"
            cells = (f"{layer.error:.3f}", f"{layer.output_error:.4f}", *times, products)
            body += (
                f"<tr><td>{NAMES[student.mixer]}, <code>{escape(layer.name)}</code></td>{_cells(cells)}</tr>"
            )
    yield _table("layer, after the first phase", heads, body)
    yield "</div>"


def _lines(curves: Mapping[str, Series]) -> list[Line]:
    return [
        Line(name=NAMES[mixer], points=points, style=style)
        for (mixer, points), style in zip(curves.items(), STYLES[1:], strict=False)
    ]


def _costs(found: Generation) -> Iterator[str]:
    yield "<h3>What attention costs, and where the others pay</h3>"
    base, *others = found.costs
    yield (
        f"<p>One layer of the networks above and one image, {base.at[0].tokens} tokens for a digit of 8x8 pixels and more for "
        "larger images. Multiplications and bytes are counted (bytes: what must be read and written at least), times were measured in this run, in turns.</p><ul>"
    )
    for cost in others:
        yield f"<li>{_pays(cost, base)}</li>"
    yield '</ul><div class="pair"><div class="card">'
    yield _cost_chart("Multiplications", found.costs, "products", 1e-6, "millions")
    yield '</div><div class="card">'
    yield _cost_chart("Time", found.costs, "seconds", 1e3, "milliseconds")
    yield '</div></div><div class="card scroll">'
    heads = [f"{at.tokens}<br>tokens" for at in base.at]
    for title, text in (
        ("multiplications, thousands", lambda at: f"{at.products / 1e3:,.0f}"),
        ("bytes, thousands", lambda at: f"{at.bytes / 1e3:,.0f}"),
        ("milliseconds", lambda at: f"{1e3 * at.seconds:.3g}"),
    ):
        body = "".join(
            f"<tr><td>{_name(cost.name)}</td>{_cells([text(at) for at in cost.at])}</tr>"
            for cost in found.costs
        )
        yield _table(title, heads, body, "even")
    yield "</div>"


def _cost_chart(title: str, costs: Sequence[MixerCost], what: str, scale: float, unit: str) -> str:
    lines = [
        Line(
            name=_name(cost.name),
            points=[(at.tokens, scale * getattr(at, what)) for at in cost.at],
            style=style,
        )
        for cost, style in zip(costs, STYLES, strict=False)
    ]
    return line_chart(title, lines, x="tokens", y=unit, log_x=True, log_y=True)


def _pays(cost: MixerCost, base: MixerCost) -> str:
    """One sentence on where a mixer saves multiplications, and time."""
    fewer = (
        f"fewer multiplications from {cost.fewer_from} tokens on"
        if cost.fewer_from
        else "never fewer multiplications"
    )
    longest = base.at[-1].tokens
    if cost.faster_from is None:
        faster = f"not faster here up to {longest} tokens"
    else:
        ratio = base.at[-1].seconds / cost.at[-1].seconds
        faster = f"faster here from {cost.faster_from} tokens on, {ratio:.1f} x at {longest}"
    first = base.at[0].seconds / cost.at[0].seconds
    word = (
        f"at the digits' {base.at[0].tokens} tokens softmax is {1 / first:.0f} x as fast" if first < 1 else ""
    )
    return f"<b>{_name(cost.name)}</b>: {'; '.join(part for part in (fewer, faster, word) if part)}."


def _name(name: str) -> str:
    first, comma, rest = name.partition(",")
    return escape(NAMES.get(first, first) + comma + rest)


def _cells(values: Sequence[str]) -> str:
    return "".join(f"<td class='num'>{value}</td>" for value in values)


def _table(first: str, heads: Sequence[str], body: str, style: str = "") -> str:
    columns = "".join(f"<th class='num'>{head}</th>" for head in heads)
    return f"<table class='{style}'><thead><tr><th>{first}</th>{columns}</tr></thead><tbody>{body}</tbody></table>"
