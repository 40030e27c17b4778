"""The super-resolver's section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from visionhybrid.demo.charts import Line, Mark, line_chart
from visionhybrid.demo.measure import SCALE, Photo, Photographs
from visionhybrid.demo.page.parts import CC_BY, amount, clock, picture


def section(found: Photographs) -> Iterator[str]:
    """HTML: curves, scores, and a detail of each photograph three times."""
    training = found.training
    yield "<h2>HAT doubles the size of photographs</h2>"
    yield (
        f"<p>{amount(training.parameters)} parameters, {training.steps} steps in {clock(training.seconds)} on patches of "
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


def credits(found: Photographs) -> str:
    """Whose photographs they are, and which others were trained on."""
    return "".join(_credits(found))


def _credits(found: Photographs) -> Iterator[str]:
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
        f"<p class='soft'>Trained on: {escape(', '.join(found.trained_on))} (scikit-image and scikit-learn; flower: vultilion, "
        "flickr, CC BY 2.0).</p>"
    )
