"""Plots as SVG text that lives inside the page.

matplotlib draws with placeholder colours that become CSS variables, so one drawing serves a light and a dark page; text stays
text (selectable, in the page's font). A unit of the drawing is one CSS pixel at full size. The same data give the same bytes:
ids are salted with the plot's name, which also keeps them apart on one page, and nothing carries a date. No pyplot; the settings
hold inside `rc_context` alone.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

Values = Sequence[float]

# Colours that no plot uses by accident, and the CSS variables that they stand for.
INK, MUTED, RULE, TRAIN, HELD = "#010203", "#010204", "#010205", "#010206", "#010207"
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", TRAIN: "--train", HELD: "--held"}

WIDE, NARROW, HALF = (900, 330), (360, 270), (380, 220)  # CSS pixels
MOST_POINTS = 600  # of one line: more cannot be seen, and would make the file large
FONT_SIZE = 12
STEPS = [1, 2, 2.5, 5, 10]  # between two numbers of an axis


def smoothing_window(count: int) -> int:
    """Over how many of `count` steps the smoothed line averages: an odd number, 1 for none."""
    return 1 if count < 10 else max(3, count // 25) | 1


def smooth(values: Values, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends; what is not finite is left out and stays a gap."""
    import numpy as np

    y = np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(y))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(y))
    inside = counts[high] - counts[low]
    return np.where(finite, (sums[high] - sums[low]) / np.maximum(inside, 1), np.nan)


def thin(x: Values, y: Values) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points that keep the lowest and the highest of every stretch: no spike is lost."""
    import numpy as np

    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(xs) <= MOST_POINTS:
        return xs, ys
    keep = []
    for part in np.array_split(np.arange(len(ys)), MOST_POINTS // 2):
        values = ys[part]
        if np.isfinite(values).any():
            keep += sorted({int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])})
        else:
            keep.append(int(part[0]))  # the gap stays a gap
    return xs[keep], ys[keep]


def draw(name: str, label: str, size: tuple[int, int], *, x: str, y: str, paint: Callable[[Axes], None]) -> str:
    """One set of axes as `<svg>`.

    Args:
        name: unique on the page, ASCII; it salts the ids.
        label: what is seen, in words, for those who do not see it.
        size: (width, height) in CSS pixels.
        x, y: what the axes mean, with their units.
        paint: puts the data on the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, height = size
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": f"finetune/{name}", "font.size": FONT_SIZE, "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"], "text.color": MUTED, "axes.edgecolor": RULE, "axes.labelcolor": MUTED,
        "axes.titlecolor": MUTED, "axes.axisbelow": True, "xtick.color": RULE, "ytick.color": RULE,
        "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "text.usetex": False, "text.parse_math": False,
        "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        left, right, top, bottom = 46, 10, 34, 44
        axes = figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
        axes.patch.set_visible(False)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0, pad=6)
        axes.grid(axis="y", color=RULE, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(6 if width < 500 else 9, integer=x == "step", steps=STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.xaxis.set_major_formatter(_tick)
        axes.yaxis.set_major_formatter(_tick)
        axes.margins(x=0.015, y=0)
        axes.set_xlabel(x, labelpad=6, loc="right")
        axes.annotate(y, (0, 1), (0, -FONT_SIZE), xycoords="figure fraction", textcoords="offset points", color=MUTED)
        paint(axes)
        low, high = axes.get_ylim()
        ticks = axes.yaxis.get_major_locator().tick_values(low, high)
        axes.set_ylim(min(low, ticks[0]), max(high, ticks[-1]))  # the data lie between two lines of the grid
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), label)


def _tick(value: float, position: float) -> str:
    """An axis number without mathtext: 12,000 · 0.25 · −3."""
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}").replace("-", "−")


def _inline(svg: str, label: str) -> str:
    """matplotlib's file as an element of an HTML page: no prologue, no metadata, no style that would reach beyond it."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|[xy]tick|matplotlib\.axis|\w+Collection)_\d+"', "", svg)
    svg = re.sub(r"font(?:-family)?: [^;\"]*'DejaVu Sans'[^;\"]*;? ?", "", svg)  # the page's font
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = f'<svg {view[0]} role="img" aria-label="{html.escape(label)}">' + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"\s*\n\s*", " ", svg)
    # A hundredth of a pixel is enough; numbers that are read as text are not touched.
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _line(axes: Axes, x: Values, y: Values, *, colour: str = TRAIN) -> None:
    """The values, faint, and their smoothed line; few values are drawn as they are."""
    window = smoothing_window(len(y))
    faint = window > 1
    marker = "." if len(y) < 10 else ""
    axes.plot(*thin(x, y), color=colour, alpha=0.4 if faint else 1.0, linewidth=1 if faint else 2, marker=marker)
    if faint:
        axes.plot(*thin(x, smooth(y, window).tolist()), color=colour, linewidth=2, solid_joinstyle="round")


def loss(name: str, size: tuple[int, int], steps: Values, losses: Values, held: Sequence[tuple[float, float, float]]) -> str:
    """Training loss by step, and held-out points (step, loss, standard error or NaN), in nats per token."""

    def paint(axes: Axes) -> None:
        _line(axes, steps, losses)
        if held:
            x, y, error = zip(*held, strict=True)
            axes.plot(x, y, color=HELD, linewidth=1, alpha=0.5, zorder=3)
            axes.errorbar(x, y, yerr=error, color=HELD, fmt="o", markersize=7, elinewidth=1.5, capsize=3, capthick=1.5, zorder=4)

    label = "Training loss by step" + (" with held-out loss and its standard error" if held else "")
    return draw(name, label, size, x="step", y="loss (nats per token)", paint=paint)


def series(name: str, label: str, x: Values, y: Values, *, x_label: str, y_label: str, zero: bool, raw: bool = False) -> str:
    """One quantity over steps or time. `zero`: both axes begin at 0; `raw`: as it is, without smoothing."""

    def paint(axes: Axes) -> None:
        if raw:
            axes.plot(*thin(x, y), color=TRAIN, linewidth=2, marker="." if len(y) < 10 else "", solid_joinstyle="round")
        else:
            _line(axes, x, y)
        if zero:
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)

    return draw(name, label, HALF, x=x_label, y=y_label, paint=paint)


def histogram(name: str, label: str, edges: Values, counts: Values, *, x_label: str, y_label: str) -> str:
    """Bars from edges[i] to edges[i + 1] with height counts[i]."""
    from matplotlib.ticker import MaxNLocator

    def paint(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=TRAIN, alpha=0.85, linewidth=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))

    return draw(name, label, HALF, x=x_label, y=y_label, paint=paint)
