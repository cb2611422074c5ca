"""Axes, places of labels and outlines: what both the page and the pictures are drawn from."""

import itertools
import re

import pytest

from quantkit.report.plots import MEASURES, SHAPES, beyond, chart, draw_png, linear_axis, log_axis, outline


def point(size: float, ratio: float | None, *, kld: float | None = None, label: str = "Q4_K_M", **changes) -> dict:
    kld = (None if ratio is None else max(0.0, (ratio - 1) / 2)) if kld is None else kld
    common = {"artifact": "a", "format": "gguf", "series": 0, "passed": True, "variant": label}
    return common | {"size_bytes": size, "ratio": ratio, "mean_kld": kld, "label": label, "short": label} | changes


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [0.2, 17.0], [1e-9, 3e-9], [-5.0, 5.0], [9.99, 10.01]])
def test_a_linear_axis_holds_its_values_and_has_round_ticks(values):
    axis = linear_axis(values)
    assert all(0 < axis.share(value) < 1 for value in values)
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks)
    assert 2 <= len(axis.ticks) <= 13
    steps = {f"{later - earlier:.6g}" for earlier, later in itertools.pairwise(axis.ticks)}
    assert len(steps) == 1


@pytest.mark.parametrize("values", [[0.01], [1e-5, 0.3], [0.002, 0.004]])
def test_a_logarithmic_axis_holds_its_values(values):
    axis = log_axis(values)
    assert all(0 < axis.share(value) < 1 for value in values)
    assert axis.ticks
    assert all(re.fullmatch(r"[125](e[+-]\d+)?|0?\.0*[125]|[125]0*", f"{tick:g}") for tick in axis.ticks)


def test_points_stand_where_their_values_are():
    shown = chart([point(1e9, 1.1), point(3e9, 1.0), point(2e9, 1.05)], MEASURES[0], width=600, height=400)
    small, middle, large = shown.dots
    assert small.x < middle.x < large.x
    assert small.y < middle.y < large.y
    assert middle.x == pytest.approx((small.x + large.x) / 2, abs=0.02)
    assert large.y == pytest.approx(shown.baseline)
    assert shown.unit == "GB"


def test_what_has_no_value_is_not_drawn():
    points = [point(1e9, None), point(2e9, 1.0), point(3e9, 1.2)]
    assert [dot.point["size_bytes"] for dot in chart(points, MEASURES[0], width=600, height=400).dots] == [2e9, 3e9]
    # a divergence of zero has no logarithm
    assert [dot.point["size_bytes"] for dot in chart(points, MEASURES[1], width=600, height=400).dots] == [3e9]
    assert chart(points[:1], MEASURES[0], width=600, height=400) is None
    assert [beyond(points, measure) for measure in MEASURES[:2]] == [[], ["Q4_K_M"]]


def test_labels_cover_neither_each_other_nor_points():
    points = [point(1e9 + 2e7 * index, 1.01 + 1e-4 * index, label=f"variant-{index}") for index in range(12)]
    shown = chart(points, MEASURES[0], width=350, height=330)
    boxes = []
    for dot in shown.dots:
        if dot.label is not None:
            x, y, anchor = dot.label
            wide = 6.4 * len(dot.point["short"])
            left = x - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            boxes.append((left, y - 9, left + wide, y + 2))
    assert 2 <= len(boxes) < 12
    for one, other in itertools.combinations(boxes, 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for box in boxes:
        assert not any(box[0] < dot.x < box[2] and box[1] < dot.y < box[3] for dot in shown.dots)


def test_labels_of_capitals_do_not_reach_a_mark_beside_them():
    sizes = {"AWQ": (4.25e9, 1.013), "GPTQ": (4.25e9, 1.01), "Q4_K_S": (4.6e9, 1.014)}
    others = [point(2.6e9, 1.2), point(6.6e9, 1.001)]
    shown = chart(
        [*others, *(point(size, ratio, label=label) for label, (size, ratio) in sizes.items())],
        MEASURES[1],
        width=620,
        height=400,
    )
    awq = next(dot for dot in shown.dots if dot.point["label"] == "AWQ")
    near = next(dot for dot in shown.dots if dot.point["label"] == "Q4_K_S")
    x, y, anchor = awq.label
    # measured in the browsers' usual sans at 12 pixels
    assert anchor != "start" or x + 29.5 < near.x - 6 or abs(y - 4 - near.y) > 12


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_closed_and_centred(shape):
    path = outline(shape, 100, 50)
    assert path.startswith("M")
    assert path.endswith("Z")
    if shape != "circle":
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", path)]
        assert 90 < min(numbers[::2]) < 100 < max(numbers[::2]) < 110
        assert 40 < min(numbers[1::2]) < 50 < max(numbers[1::2]) < 60


def test_a_picture_is_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib", reason="of the extra `report`")
    points = [point(1e9, 1.1, label="żółw"), point(3e9, 1.0, passed=False)]
    for name in ("one.png", "two.png"):
        assert draw_png(points, MEASURES[0], "Źródło", tmp_path / name)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one == two
    assert one[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(one[16:20]), int.from_bytes(one[20:24])) == (1600, 1008)
    assert not draw_png([], MEASURES[0], "nothing", tmp_path / "three.png")
    assert not (tmp_path / "three.png").exists()
