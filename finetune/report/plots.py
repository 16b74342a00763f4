"""Plots as inline SVG.

matplotlib draws with placeholder colours that become CSS variables, so one drawing serves a light and a dark page; text stays
text (selectable, in the page's font). A unit of the drawing is one CSS pixel at full size. The output is deterministic:
ids are salted with the plot's name, which also keeps them unique on the page, and there are no dates. pyplot is not used;
settings apply inside `rc_context` only.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

Values = Sequence[float]

# Placeholder colours, and the CSS variables that replace them.
INK, MUTED, RULE, TRAIN, HELD = "#010203", "#010204", "#010205", "#010206", "#010207"
TWIN, THIRD, BAD, PAPER = "#010208", "#010209", "#01020a", "#01020b"
# Terms of memory, each with its colour on every page.
TERMS = {
    "weights": "#010301", "more weights": "#010302", "other weights": "#01030c", "adapters": "#010303", "gradients": "#010304",
    "optimizer": "#010305", "activations": "#010306", "logits": "#010307", "workspace": "#010308", "cache": "#010309",
    "context": "#01030a", "fragmentation": "#01030b",
}  # fmt: skip
VARIABLES = {
    INK: "--ink", MUTED: "--muted", RULE: "--rule", TRAIN: "--train", HELD: "--held", TWIN: "--twin", THIRD: "--third",
    BAD: "--bad", PAPER: "--paper", **{colour: f"--{name.replace(' ', '-')}" for name, colour in TERMS.items()},
}  # fmt: skip
Points = Sequence[tuple[float, float, float]]  # (step, loss, standard error or NaN)

WIDE, NARROW, HALF = (900, 330), (360, 270), (380, 220)  # CSS pixels
MOST_POINTS = 600  # of one line: more are not visible, and would make the file large
MOST_IN_ALL = 6000  # points of many thin lines together
FONT_SIZE = 12
STEPS = [1, 2, 2.5, 5, 10]  # between two ticks of an axis


def smoothing_window(count: int) -> int:
    """Number of steps over which a line of `count` steps is averaged: odd, 1 for no smoothing."""
    return 1 if count < 10 else max(3, count // 25) | 1


def smooth(values: Values, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends; values that are not finite are skipped and stay gaps."""
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
    """At most MOST_POINTS points, with the lowest and the highest of every interval, so that no spike is lost."""
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
    """Draw one set of axes as `<svg>`.

    Args:
        name: unique on the page, ASCII; salts the ids.
        label: text alternative for screen readers.
        size: (width, height) in CSS pixels.
        x, y: labels of the axes, with units.
        paint: draws the data on the axes.
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
        if axes.get_yscale() == "linear" and len(ticks):
            axes.set_ylim(min(low, ticks[0]), max(high, ticks[-1]))  # the data end at grid lines
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), label)


def _tick(value: float, position: float) -> str:
    """An axis number without mathtext: 12,000 · 0.25 · −3."""
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}").replace("-", "−")


def _inline(svg: str, label: str) -> str:
    """matplotlib's file as an element of an HTML page: without prologue, metadata and global styles."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|[xy]tick|matplotlib\.axis|\w+Collection)_\d+"', "", svg)
    svg = re.sub(r"font(?:-family)?: [^;\"]*'DejaVu Sans'[^;\"]*;? ?", "", svg)  # the page's font
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = f'<svg {view[0]} role="img" aria-label="{html.escape(label)}">' + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"\s*\n\s*", " ", svg)
    # A hundredth of a pixel is enough; numbers in text are not changed.
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg


def _line(axes: Axes, x: Values, y: Values, *, colour: str = TRAIN) -> None:
    """The values, faint, and their smoothed line; few values are not smoothed."""
    window = smoothing_window(len(y))
    faint = window > 1
    marker = "." if len(y) < 10 else ""
    axes.plot(*thin(x, y), color=colour, alpha=0.4 if faint else 1.0, linewidth=1 if faint else 2, marker=marker)
    if faint:
        axes.plot(*thin(x, smooth(y, window).tolist()), color=colour, linewidth=2, solid_joinstyle="round")


def loss(
    name: str,
    size: tuple[int, int],
    steps: Values,
    losses: Values,
    held: Points,
    *,
    twin: tuple[Values, Values, Points] | None = None,
    level: float | None = None,
) -> str:
    """Training loss by step, and held-out points, in nats per token.

    twin: steps, losses and held-out points of a second model; then a colour stands for a model. level: a loss to compare with.
    """

    def points(axes: Axes, held: Points, colour: str, marker: str) -> None:
        if held:
            x, y, error = zip(*held, strict=True)
            if twin is None:  # with a twin there would be too many lines
                axes.plot(x, y, color=colour, linewidth=1, alpha=0.5, zorder=3)
            axes.errorbar(
                x, y, yerr=error, color=colour, fmt=marker, markersize=7, elinewidth=1.5, capsize=3, capthick=1.5, zorder=4
            )

    def paint(axes: Axes) -> None:
        if level is not None:
            axes.axhline(level, color=MUTED, linewidth=1.5, linestyle=(0, (5, 4)))
        if twin is not None:
            _line(axes, *twin[:2], colour=TWIN)
        _line(axes, steps, losses)
        if twin is not None:
            points(axes, twin[2], TWIN, "s")
        points(axes, held, HELD if twin is None else TRAIN, "o")

    label = "Training loss by step" + (" with held-out loss and its standard error" if held else "")
    label += " of the ternary model and of its float twin" if twin is not None else ""
    label += f"; a dashed line at {level:.3g}" if level is not None else ""
    return draw(name, label, size, x="step", y="loss (nats per token)", paint=paint)


def series(
    name: str,
    label: str,
    x: Values,
    y: Values,
    *,
    x_label: str,
    y_label: str,
    zero: bool,
    raw: bool = False,
    mark: float | None = None,
) -> str:
    """One quantity over steps or time. `zero`: both axes begin at 0; `raw`: without smoothing. `mark`: a value to
    compare with."""

    def paint(axes: Axes) -> None:
        if mark is not None:
            axes.axhline(mark, color=MUTED, linewidth=1.5, linestyle=(0, (5, 4)))
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


def stacked(
    name: str,
    label: str,
    size: tuple[int, int],
    bars: Sequence[tuple[str, str, Sequence[tuple[str, float]]]],
    *,
    x_label: str,
    mark: tuple[float, str] | None = None,
) -> str:
    """Horizontal stacked bars from top to bottom: (name, value as text, parts as (one of TERMS, value)).

    mark: a value to compare all of them with, and its label, drawn as a vertical line.
    """
    most = max([sum(value for _, value in parts) for _, _, parts in bars] + ([mark[0]] if mark else []))

    def paint(axes: Axes) -> None:
        for y, (bar, figure, parts) in enumerate(reversed(bars)):
            left = 0.0
            for term, value in parts:
                axes.barh(y, value, left=left, height=0.46, color=TERMS[term], edgecolor=PAPER, linewidth=1)
                left += value
            over = mark is not None and left > mark[0]
            text, colour = f"{bar}: {figure}", BAD if over else INK
            axes.annotate(text, (0, y + 0.23), (0, 4), textcoords="offset points", color=colour)
        if mark is not None:
            axes.axvline(mark[0], color=BAD, linewidth=1.5, linestyle=(0, (5, 4)), zorder=4)
            position: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(mark[1], (mark[0], 1), (0, 6), color=MUTED, ha="left" if mark[0] < most / 2 else "right", **position)
        box = axes.get_position()
        axes.set_position((0, box.y0, box.x1, box.height))  # the names are above the bars, and need no margin
        axes.set_yticks([])
        axes.grid(axis="x", color=RULE, linewidth=1)
        axes.set_xlim(0, 1.005 * most)
        axes.set_ylim(-0.35, len(bars) - 0.35)

    return draw(name, label, size, x=x_label, y="", paint=paint)


def gap(name: str, label: str, x: Values, y: Values) -> str:
    """A difference in nats over steps, with a line at 0."""

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.plot(*thin(x, y), color=TRAIN, linewidth=2, marker="o" if len(y) < 60 else "", markersize=5)
        axes.set_xlim(left=0)

    return draw(name, label, HALF, x="step", y="gap (nats per token)", paint=paint)


def spread(
    name: str,
    label: str,
    x: Values,
    y: Values,
    bounds: tuple[Values, Values],
    *,
    y_label: str,
    log: bool = False,
    mark: float | None = None,
    alarm: bool = False,
) -> str:
    """One quantity over steps with the range of its parts. `mark`: a value to compare with, red if it is an `alarm`.

    log: the axis is logarithmic; zeros are drawn at its lower end.
    """
    import numpy as np

    low, high = (np.asarray(values, dtype=float) for values in bounds)
    main = np.asarray(y, dtype=float)

    def paint(axes: Axes) -> None:
        least = None
        if log:
            positive = np.concatenate([main, low])
            positive = positive[np.isfinite(positive) & (positive > 0)]
            least = 10.0 ** math.floor(math.log10(positive.min())) if len(positive) else 1e-4
        values = [np.where(v > 0, v, least) if least is not None else v for v in (main, low, high)]
        edge, top = (thin(x, values[i].tolist()) for i in (1, 2))
        axes.fill(
            np.concatenate([edge[0], top[0][::-1]]), np.concatenate([edge[1], top[1][::-1]]), color=TRAIN, alpha=0.18, linewidth=0
        )
        axes.plot(*thin(x, values[0].tolist()), color=TRAIN, linewidth=2, marker="." if len(main) < 10 else "")
        if mark is not None:
            axes.axhline(mark, color=BAD if alarm else MUTED, linewidth=1.5, linestyle=(0, (5, 4)))
        if least is not None:
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(_tick)
            ceiling = max(float(np.nanmax(values[2])), mark or 0.0, least)
            axes.set_ylim(least, 10.0 ** math.ceil(math.log10(ceiling) + 1e-9))

    return draw(name, label, HALF, x="step", y=y_label, paint=paint)


def bundle(
    name: str, label: str, x: Values, groups: Sequence[tuple[str, Sequence[Values]]], *, y_label: str, log: bool = False
) -> str:
    """Thin lines, one for each part, with one colour per group: (colour, lines)."""
    every = max(1, math.ceil(len(x) * sum(len(lines) for _, lines in groups) / MOST_IN_ALL))
    kept = sorted({*range(0, len(x), every), len(x) - 1})  # the last value is shown

    def paint(axes: Axes) -> None:
        alone = all(len(lines) == 1 for _, lines in groups)
        for colour, lines in groups:
            for values in lines:
                axes.plot(
                    [x[i] for i in kept], [values[i] for i in kept], color=colour, linewidth=2 if alone else 1,
                    alpha=1 if alone else 0.6, marker="." if len(kept) < 10 else "",
                )  # fmt: skip
        if log:
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(_tick)

    return draw(name, label, HALF, x="step", y=y_label, paint=paint)
