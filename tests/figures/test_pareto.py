"""The figure of cost against loss tells what nothing cheaper beats."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmark.report import canvas
from benchmark.report.figures.pareto import COLUMNS, FEWEST, Pareto, beats
from benchmark.report.rows import SuiteRows

ROLES = ("calibrator", "rival", "control", "trained", None)


def frame_of(models: int, methods: int, metric: str = "accuracy", spread: float = 60.0) -> pd.DataFrame:
    draw, lines = random.Random(models * methods), []
    for model in range(models):
        points = [(10 ** draw.uniform(-1, 3), draw.uniform(0, spread)) for _ in range(methods)]
        points[0] = (0.0, points[0][1])
        for number, (seconds, loss) in enumerate(points, start=1):
            best = not any(beats(other, (seconds, loss)) for other in points)
            about = (
                f"model {model}",
                "W6A6",
                number,
                f"method_{number}",
                ROLES[number % 5],
                seconds,
                loss,
                best,
            )
            lines.append((*about, 100.0, 0, metric, metric == "accuracy"))
    return pd.DataFrame(lines, columns=list(COLUMNS))


def drawn(frame: pd.DataFrame) -> Figure:
    with canvas.style():
        return Pareto("pareto").draw(frame)


def test_a_line_a_method_and_precision(rows: SuiteRows, data: dict[str, Any]) -> None:
    frame = data["pareto"]
    assert list(frame["precision"].unique()) == ["W8A8", "W6A6"]
    assert list(frame["method"].unique()) == ["minmax", "mse", "finetune", "quanttune"]
    records = {
        (record.cell.label, record.cell.precision): record
        for record in rows.records.values()
        if not record.cell.is_reference
    }
    for line in frame.to_dict("records"):
        record = records[line["method"], line["precision"]]
        assert record.result is not None
        assert line["loss"] == record.result.drop
        assert line["seconds"] > 0
    trained = frame[frame["role"].isin(["control", "trained"])]
    assert trained["seconds"].min() > frame[frame["method"] == "minmax"]["seconds"].max()


def test_the_best_are_those_that_nothing_beats(data: dict[str, Any]) -> None:
    for _, part in data["pareto"].groupby("precision"):
        points = list(zip(part["seconds"], part["loss"], strict=True))
        for point, best in zip(points, part["best"], strict=True):
            no_worse = [one for one in points if one[0] <= point[0] and one[1] <= point[1] and one != point]
            assert best == (not no_worse)
        assert part["best"].any()


@pytest.mark.parametrize(
    ("one", "other", "beaten"),
    [((1, 1), (2, 2), True), ((1, 2), (2, 2), True), ((2, 1), (2, 2), True), ((2, 2), (2, 2), False),
     ((1, 3), (2, 2), False), ((3, 1), (2, 2), False)],
)  # fmt: skip
def test_beating(one: tuple[float, float], other: tuple[float, float], beaten: bool) -> None:
    assert beats(one, other) == beaten


def test_too_few_methods_or_records_without_costs_give_no_figure(rows: SuiteRows) -> None:
    figure = Pareto("pareto")
    few = {
        key: record for key, record in rows.records.items() if record.cell.method in ("fp32", "minmax", "mse")
    }
    assert FEWEST == 3
    unfinished = {cell.cell_id: "missing" for cell in rows.cells if cell.cell_id not in few}
    assert len(figure.frame(dataclasses.replace(rows, records=few, unfinished=unfinished))) == 0
    old = {key: dataclasses.replace(record, cost={}) for key, record in rows.records.items()}
    empty = figure.frame(dataclasses.replace(rows, records=old))
    assert (len(empty), list(empty.columns)) == (0, list(COLUMNS))


def test_the_line_joins_the_best_and_the_last_precision_is_shown(data: dict[str, Any]) -> None:
    frame = data["pareto"]
    last = frame[frame["precision"] == "W6A6"]
    (axes,) = (axes for axes in drawn(frame).axes if axes.get_visible())
    front, *marks = axes.get_lines()
    best = last[last["best"]].sort_values("seconds")
    assert list(front.get_xdata()) == [max(x, 0.01) for x in best["seconds"]]
    assert list(front.get_ydata()) == list(best["loss"])
    assert len([mark for mark in marks if len(mark.get_xdata())]) == len(last)
    assert axes.get_xscale() == "log"
    assert axes.get_title(loc="left") == "tiny_vit W6A6"
    assert {text.get_text() for text in axes.texts} == {str(number) for number in last["number"]}


@pytest.mark.parametrize(("models", "methods"), [(1, 3), (3, 23), (4, 12)])
def test_numbers_do_not_cover_each_other_and_a_key_names_them(models: int, methods: int) -> None:
    figure = drawn(frame_of(models, methods))
    figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == models
    for axes in panels:
        boxes = [text.get_window_extent().shrunk(0.7, 0.7) for text in axes.texts]
        assert len(boxes) == methods
        covered = sum(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert covered <= methods // 8
    (key,) = figure.legends
    assert [text.get_text() for text in key.get_texts()] == [
        f"{number} method_{number}" for number in range(1, methods + 1)
    ]
    box = key.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    looks = {(handle.get_marker(), str(handle.get_markerfacecolor())) for handle in key.legend_handles}  # type: ignore[union-attr]
    assert len(looks) == min(methods, len(ROLES))


def test_what_explodes_goes_by_powers_and_no_difference_looks_like_none() -> None:
    (axes,) = drawn(frame_of(1, 5, "perplexity", 50_000.0)).axes[:1]
    assert axes.get_yscale() == "symlog"
    assert axes.get_ylabel() == "rise (perplexity)"
    (axes,) = drawn(frame_of(1, 5, spread=0.0)).axes[:1]
    low, high = axes.get_ylim()
    assert high - low >= 2.0
