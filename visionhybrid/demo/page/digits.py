"""The classifier's section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from visionhybrid.demo.charts import Line, Mark, line_chart
from visionhybrid.demo.measure import Digits, Guess
from visionhybrid.demo.page.parts import amount, clock, picture


def section(digits: Digits) -> Iterator[str]:
    """HTML: curves, the confusion matrix, mistakes and the least certain digits."""
    training = digits.training
    wrong = digits.count - sum(row[i] for i, row in enumerate(digits.confusion))
    yield "<h2>Next-ViT reads handwritten digits</h2>"
    yield (
        f"<p>{amount(training.parameters)} parameters, {training.steps} steps in {clock(training.seconds)}. Convolution blocks "
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
