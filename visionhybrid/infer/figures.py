"""Figures of what the diagnoses found, as PNG files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionhybrid.data.images import atomic
from visionhybrid.infer.profiling import Profile
from visionhybrid.infer.receptive_field import ReceptiveField
from visionhybrid.infer.watching import KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour for each kind of operation, told apart also without red and green (Okabe and Ito).
COLOURS = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#F0E442", "#BBBBBB"), strict=True))


def require() -> None:
    """ValueError with what to do unless matplotlib is installed."""
    if not find_spec("matplotlib"):
        raise ValueError("figures are drawn by matplotlib: pip install 'visionhybrid[demo]'")


def draw_receptive_field(field: ReceptiveField, path: str | Path, *, title: str = "") -> Path:
    """The map of `field.display` with the squares of its thresholds."""
    figure = _figure(5.6, 5.4)
    axis = figure.add_subplot()
    size = field.display.shape[0]
    image = axis.imshow(field.display.numpy(), cmap="viridis", vmin=0, vmax=1)
    for (threshold, side), style in zip(field.sides.items(), _styles(), strict=False):
        left = size // 2 - side / 2
        xs, ys = [left, left + side, left + side, left, left], [left, left, left + side, left + side, left]
        label = f"{threshold:.0%}: {side} px, {field.ratios[threshold]:.1%} of the area"
        axis.plot(xs, ys, color="white", linewidth=1, linestyle=style, label=label)
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel="pixel", ylabel="pixel")
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axis, label="log10(gradient + 1), its maximum 1", shrink=0.8)
    # White on the map's own darkest colour, as in the map.
    figure.legend(
        loc="outside lower center", ncols=2, fontsize=8, facecolor="#440154", framealpha=1, labelcolor="white"
    )
    return _save(figure, path)


def draw_profile(profile: Profile, path: str | Path) -> Path:
    """Time and multiply-adds of each block by kind of operation, and its peak memory."""
    names = [row.name for row in profile.blocks]
    figure = _figure(11, 1.6 + 0.24 * len(names))
    time, work, memory = figure.subplots(1, 3, sharey=True)
    places = range(len(names))
    for axis, field, unit in ((time, "seconds", 1e3), (work, "macs", 1e-6)):
        left = [0.0] * len(names)
        for kind in KINDS:
            widths = [unit * getattr(profile.cells[name][kind], field) for name in names]
            if any(widths):
                axis.barh(places, widths, left=left, color=COLOURS[kind], label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    memory.barh(places, [row.memory / 2**20 for row in profile.blocks], color="#888888")
    time.set(yticks=places, yticklabels=names, xlabel="time, ms")
    time.invert_yaxis()
    work.set(xlabel="multiply-adds, millions")
    memory.set(xlabel="peak of live tensors, MiB")
    for axis in (time, work, memory):
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(len(names) - 0.4, -0.6)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(profile.title, fontsize=11)
    return _save(figure, path)


def _styles() -> tuple[str, ...]:
    return (":", "-.", "--", "-")


def _figure(width: float, height: float) -> Figure:
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path) -> Path:
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return Path(path)
