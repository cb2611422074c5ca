"""Size against quality as geometry, drawn twice: as SVG in the page, and as PNG for cards.

A chart is made of plain numbers in pixels; what draws it decides nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import UnavailableError

# outlines within a circle of radius 1, one per format, so that formats are told apart without colour
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "pentagon", "triangle-down")
COLOURS = 8
# widths of a label's characters, pixels: names are mostly capitals, which are wider than text is
WIDEST, CAPITAL, CHARACTER = 12.0, 9.0, 7.3
LINE = 15.0
MARK = 6.5
LEFT, RIGHT, TOP, BOTTOM = 68.0, 18.0, 16.0, 46.0
PNG_COLOURS = ("#1d4ed8", "#b45309", "#0f766e", "#be185d", "#6d28d9", "#4d7c0f", "#0369a1", "#b91c1c")
PNG_MARKERS = ("o", "s", "^", "D", "P", "*", "p", "v")
# a star of the width of the others covers less than half of their area
WIDER = {"*": 1.6}


@dataclass(frozen=True)
class Measure:
    """What a chart shows over size.

    Attributes:
        key: of a point.
        title: of the chart.
        axis: of its vertical axis.
        log: whether that axis is logarithmic.
        file: name of the PNG.
    """

    key: str
    title: str
    axis: str
    log: bool
    file: str


MEASURES = (
    Measure("ratio", "Size against perplexity", "perplexity, source = 1", False, "size-perplexity.png"),
    Measure("mean_kld", "Size against divergence", "mean KL divergence, nats per token", True, "size-kld.png"),
)


@dataclass(frozen=True)
class Axis:
    """Values between `low` and `high`, with ticks in that range."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Dot:
    """A point of a chart, in pixels; `label` is None where its name would cover another."""

    point: dict[str, Any]
    x: float
    y: float
    label: tuple[float, float, str] | None


@dataclass(frozen=True)
class Chart:
    """A scatter plot of `width` x `height` pixels.

    Attributes:
        measure: what it shows.
        dots: its points, from small to large.
        columns, rows: ticks as (pixels, text).
        baseline: height in pixels at which the source stands, if it is in range.
        unit: of sizes.
        frame: left, top, right and bottom of the plotting area.
    """

    measure: Measure
    width: float
    height: float
    dots: tuple[Dot, ...]
    columns: tuple[tuple[float, str], ...]
    rows: tuple[tuple[float, str], ...]
    baseline: float | None
    unit: str
    frame: tuple[float, float, float, float]


def linear_axis(values: Sequence[float], *, include: float | None = None) -> Axis:
    """An axis that holds values with some air, with five to ten round ticks."""
    held = [*values, *([] if include is None else [include])]
    low, high = min(held), max(held)
    air = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    low, high = low - air, high + air
    step = _round_step((high - low) / 6)
    first = math.ceil(low / step)
    count = math.floor(high / step) - first + 1
    return Axis(low, high, False, tuple(round((first + index) * step, 12) for index in range(count)))


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis that holds positive values, with ticks at decades, and at 2 and 5 where there are few."""
    low, high = min(values) / 1.4, max(values) * 1.4
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    ticks = (digit * 10.0**decade for decade in decades for digit in digits)
    return Axis(low, high, True, tuple(float(f"{tick:.12g}") for tick in ticks if low <= tick <= high))


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1.0, 2.0, 2.5, 5.0, 10.0) if rough <= digit * power * 1.0001)


def drawable(points: Sequence[dict[str, Any]], measure: Measure) -> list[dict[str, Any]]:
    """Points that have a value on the measure's axis, from small to large; a logarithm has no zero."""
    found = [point for point in points if point[measure.key] is not None]
    if measure.log:
        found = [point for point in found if point[measure.key] > 0]
    return sorted(found, key=lambda point: (point["size_bytes"], point["label"]))


def beyond(points: Sequence[dict[str, Any]], measure: Measure) -> list[str]:
    """Labels of points that have a value, which the measure's axis cannot show."""
    drawn = {id(point) for point in drawable(points, measure)}
    return [point["label"] for point in points if point[measure.key] is not None and id(point) not in drawn]


def chart(points: Sequence[dict[str, Any]], measure: Measure, *, width: float, height: float) -> Chart | None:
    """The chart of a measure over size; None where no point has a value.

    Args:
        points: see `quantkit.report.page.report_of`.
        measure: what to show.
        width, height: pixels.
    """
    shown = drawable(points, measure)
    if not shown:
        return None
    unit, divisor = size_unit(shown)
    sizes = linear_axis([point["size_bytes"] / divisor for point in shown])
    values = [point[measure.key] for point in shown]
    heights = log_axis(values) if measure.log else linear_axis(values, include=1.0)
    frame = (LEFT, TOP, width - RIGHT, height - BOTTOM)

    def across(size: float) -> float:
        return round(frame[0] + sizes.share(size) * (frame[2] - frame[0]), 2)

    def down(value: float) -> float:
        return round(frame[3] - heights.share(value) * (frame[3] - frame[1]), 2)

    places = [(across(point["size_bytes"] / divisor), down(point[measure.key])) for point in shown]
    baseline = None if measure.log else down(1.0)
    labels = _labels([str(point["short"]) for point in shown], places, frame, baseline)
    return Chart(
        measure,
        width,
        height,
        tuple(Dot(point, *place, label) for point, place, label in zip(shown, places, labels, strict=True)),
        tuple((across(tick), f"{tick:g}") for tick in sizes.ticks),
        tuple((down(tick), f"{tick:g}") for tick in heights.ticks),
        baseline,
        unit,
        frame,
    )


def size_unit(points: Sequence[dict[str, Any]]) -> tuple[str, float]:
    """The unit that the largest size is well read in, and its bytes."""
    largest = max((point["size_bytes"] for point in points), default=0)
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def _labels(
    names: Sequence[str],
    places: Sequence[tuple[float, float]],
    frame: tuple[float, float, float, float],
    baseline: float | None,
) -> list[tuple[float, float, str] | None]:
    """Where names can stand beside their points without covering points, each other, or the frame: x, y, anchor.

    The baseline is covered only by names that have no other place.
    """
    line = [] if baseline is None else [(frame[0], baseline - 2, frame[2], baseline + 2)]
    taken = [(x - MARK, y - MARK, x + MARK, y + MARK) for x, y in places]
    found: list[tuple[float, float, str] | None] = []
    for name, (x, y) in zip(names, places, strict=True):
        wide = label_width(name)
        gap = MARK + 4
        tries = (
            (x + gap, y + 4, "start"),
            (x - gap, y + 4, "end"),
            (x, y - gap - 1, "middle"),
            (x, y + gap + 10, "middle"),
            (x + gap - 3, y - gap + 1, "start"),
            (x - gap + 3, y - gap + 1, "end"),
            (x + gap - 3, y + gap + 8, "start"),
            (x - gap + 3, y + gap + 8, "end"),
        )
        place = next(
            (one for blocked in ([*taken, *line], taken) for one in tries if _free(_box(one, wide), blocked, frame)),
            None,
        )
        found.append(place)
        if place is not None:
            taken.append(_box(place, wide))
    return found


def label_width(name: str) -> float:
    """About how wide a name is drawn, pixels."""
    return sum(WIDEST if one in "MW" else CAPITAL if one.isupper() else CHARACTER for one in name)


def _box(place: tuple[float, float, str], wide: float) -> tuple[float, float, float, float]:
    x, y, anchor = place
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return left, y - LINE + 4, left + wide, y + 4


def _free(
    box: tuple[float, float, float, float],
    taken: Sequence[tuple[float, float, float, float]],
    frame: tuple[float, float, float, float],
) -> bool:
    inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] + RIGHT and box[3] <= frame[3]
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
    )


def outline(shape: str, x: float, y: float, radius: float = MARK) -> str:
    """The SVG path of a mark."""
    if shape == "circle":
        return (
            f"M{x - radius:.2f} {y:.2f}a{radius} {radius} 0 1 0 {2 * radius} 0a{radius} {radius} 0 1 0 {-2 * radius} 0Z"
        )
    corners = {
        "square": _polygon(4, 45, 1.15),
        "triangle": _polygon(3, -90, 1.25),
        "triangle-down": _polygon(3, 90, 1.25),
        "diamond": _polygon(4, 0, 1.25),
        "pentagon": _polygon(5, -90, 1.15),
        "star": [corner for pair in zip(_polygon(5, -90, 1.4), _polygon(5, -54, 0.62), strict=True) for corner in pair],
        "cross": [(a * s, b * t) for s, t, ends in CROSS for a, b in ends],
    }[shape]
    return "M" + "L".join(f"{x + radius * dx:.2f} {y + radius * dy:.2f}" for dx, dy in corners) + "Z"


THICK, LONG = 0.38, 1.15
# quarter by quarter: signs of x and y, then three corners
CROSS = (
    (1, -1, ((THICK, LONG), (THICK, THICK), (LONG, THICK))),
    (1, 1, ((LONG, THICK), (THICK, THICK), (THICK, LONG))),
    (-1, 1, ((THICK, LONG), (THICK, THICK), (LONG, THICK))),
    (-1, -1, ((LONG, THICK), (THICK, THICK), (THICK, LONG))),
)


def _polygon(corners: int, turned: float, radius: float) -> list[tuple[float, float]]:
    angles = [math.radians(turned + 360 * index / corners) for index in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def require_matplotlib() -> None:
    """Stop where pictures cannot be drawn.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 (only whether it is there)
    except ImportError:
        raise UnavailableError(
            "matplotlib is not installed; it draws the PNG plots", where="report", fix='pip install "quantkit[report]"'
        ) from None


def draw_png(points: Sequence[dict[str, Any]], measure: Measure, title: str, path: Path) -> bool:
    """The same chart as a picture of 1600 x 1008 pixels; False, and no file, where no point has a value."""
    # the object interface draws without a display and leaves no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    wide, high, head = 800, 480, 24
    drawn = chart(points, measure, width=wide, height=high)
    if drawn is None:
        return False
    figure = Figure(figsize=(wide / 100, (high + head) / 100), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    left, top, right, bottom = drawn.frame
    tall = high + head
    axes = figure.add_axes((left / wide, (high - bottom) / tall, (right - left) / wide, (bottom - top) / tall))
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_xticks([x for x, _ in drawn.columns], [text for _, text in drawn.columns])
    axes.set_yticks([y for y, _ in drawn.rows], [text for _, text in drawn.rows])
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors="#4b5563")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    if drawn.baseline is not None:
        axes.axhline(drawn.baseline, color="#6b7280", linewidth=1, linestyle=(0, (4, 3)))
    formats = {dot.point["series"]: dot.point["format"] for dot in drawn.dots}
    for index, name in sorted(formats.items()):
        style = PNG_MARKERS[index % len(PNG_MARKERS)]
        size = 6 * WIDER.get(style, 1)
        axes.plot([], [], style, color=PNG_COLOURS[index % len(PNG_COLOURS)], markersize=size, label=name)
    if not all(dot.point["passed"] for dot in drawn.dots):
        (hollow,) = axes.plot([], [], PNG_MARKERS[0], linestyle="", markersize=6, label="hollow: did not pass")
        hollow.set(markerfacecolor="white", markeredgecolor="#4b5563")
    axes.legend(loc="upper right", frameon=False, fontsize=8.5, labelcolor="#374151")
    for dot in drawn.dots:
        index = dot.point["series"]
        colour, style = PNG_COLOURS[index % len(PNG_COLOURS)], PNG_MARKERS[index % len(PNG_MARKERS)]
        axes.plot(
            dot.x,
            dot.y,
            style,
            color=colour,
            markersize=8 * WIDER.get(style, 1),
            markerfacecolor=colour if dot.point["passed"] else "white",
            markeredgecolor="white" if dot.point["passed"] else colour,
        )
        if dot.label is not None:
            x, y, anchor = dot.label
            where = {"start": "left", "middle": "center", "end": "right"}[anchor]
            halo = [withStroke(linewidth=3, foreground="white")]
            axes.text(
                x, y, dot.point["short"], ha=where, va="baseline", fontsize=8.5, color="#111827", path_effects=halo
            )
    axes.set_xlabel(f"weights on disk, {drawn.unit}", fontsize=9.5, color="#374151")
    axes.set_ylabel(measure.axis, fontsize=9.5, color="#374151")
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color="#111827", pad=9)
    # no date and no version, so that the same report is the same picture
    figure.savefig(path, metadata={"Software": None})
    return True
