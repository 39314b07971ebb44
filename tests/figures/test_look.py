"""Figures look the same every time, and can be read in black and white."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib
import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmark.report import canvas
from benchmark.report.figures.figure import FIGURES
from benchmark.report.gallery import csv_of, svg_of
from benchmark.report.html import inline
from quanttune.errors import ConfigError
from tests.figures.conftest import DRAWN


def drawn(name: str, data: dict[str, Any]) -> Figure:
    with canvas.style():
        return FIGURES.get(name)(name).draw(data[name])


@pytest.mark.parametrize("name", DRAWN)
def test_files_are_whole_and_carry_no_date(name: str, data: dict[str, Any]) -> None:
    with canvas.style():
        figure = FIGURES.get(name)(name).draw(data[name])
        contents = {form: canvas.rendered(figure, form) for form in ("svg", "pdf", "png")}
    root = ElementTree.fromstring(contents["svg"])  # noqa: S314 - our own file
    assert root.tag.endswith("svg")
    assert contents["pdf"].startswith(b"%PDF")
    assert contents["png"].startswith(b"\x89PNG")
    for content in contents.values():
        assert b"CreationDate" not in content
        assert not re.search(rb"20\d\d-\d\d-\d\dT", content)
        assert b"matplotlib" not in content.lower() or b"Matplotlib v" not in content
    with pytest.raises(ConfigError, match="pdf"):
        canvas.rendered(figure, "bmp")


def test_lines_differ_without_colour(data: dict[str, Any]) -> None:
    for name in ("outliers", "saturation"):
        for axes in drawn(name, data).axes:
            looks = [(str(line._dash_pattern), line.get_marker()) for line in axes.get_lines()]
            assert len(set(looks)) == len(looks) >= 3
    for axes in drawn("histograms", data).axes:
        looks = [str(patch._dash_pattern) for patch in axes.patches]
        assert len(set(looks)) == len(looks) == 3
    seven = [canvas.line_style(index) for index in range(7)]
    assert len({(str(style["linestyle"]), style["marker"]) for style in seven}) == 7


def test_bars_differ_without_colour(data: dict[str, Any]) -> None:
    looks = {}
    for bars in drawn("decomposition", data).axes[0].containers:
        face = bars.patches[0].get_facecolor()
        looks[bars.get_label()] = (
            round(0.3 * face[0] + 0.59 * face[1] + 0.11 * face[2], 2),
            bars.patches[0].get_hatch(),
        )
    named = {label: look for label, look in looks.items() if not label.startswith("_")}
    assert len(named) == len(set(named.values())) == 4


def test_markers_of_the_overview_differ_without_colour(data: dict[str, Any]) -> None:
    (legend,) = drawn("overview", data).legends
    assert [text.get_text() for text in legend.get_texts()] == ["W8A8", "W6A6", "own weights, unquantized"]
    assert len({handle.get_marker() for handle in legend.legend_handles}) == 3  # type: ignore[union-attr]


def test_every_method_and_model_has_its_place_in_the_overview(data: dict[str, Any]) -> None:
    frame = data["overview"]
    twice = pd.concat([frame, frame.assign(panel="other model", drop=0.0, low=0.0, high=0.0)])
    with canvas.style():
        figure = FIGURES.get("overview")("overview").draw(twice)
    assert [axes.get_title(loc="left").partition("\n")[0] for axes in figure.axes] == [
        "tiny_vit",
        "other model",
    ]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(
        dict.fromkeys(frame["method"])
    )
    low, high = figure.axes[1].get_xlim()
    assert high - low >= 2  # no difference does not look like one


def test_headings_of_panels_keep_apart_however_long_the_methods_names_are(data: dict[str, Any]) -> None:
    frame = data["overview"]
    longest = "ptq4vit[metric=mse,twin_softmax=False,twin_gelu=False]"
    named = frame.assign(method=frame["method"].where(frame["method"] != "minmax", longest))
    both = pd.concat([named.assign(panel=f"dinov2_vits14 {profile}") for profile in ("full", "matmul")])
    with canvas.style():
        figure = FIGURES.get("overview")("overview").draw(both)
        figure.draw_without_rendering()
    first, second = (axes._left_title.get_window_extent() for axes in figure.axes)
    assert first.x1 < second.x0
    assert second.x1 <= figure.bbox.x1


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (5, (3, 2))])
def test_two_panels_of_the_overview_stand_side_by_side(count: int, shape: tuple[int, int]) -> None:
    line = {"method": "minmax", "precision": "W8A8", "drop": 1.0, "low": 0.5, "high": 1.5, "value": 84.0}
    rest = {"fp32": 85.0, "metric": "accuracy", "higher_is_better": True}
    frame = pd.DataFrame([{"panel": f"model {index}", **line, **rest} for index in range(count)])
    with canvas.style():
        figure = FIGURES.get("overview")("overview").draw(frame)
    drawn = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(drawn) == count
    assert figure.axes[0].get_gridspec().get_geometry() == shape


def test_a_rise_of_perplexity_is_drawn_to_the_right_and_by_powers_if_it_explodes(
    data: dict[str, Any],
) -> None:
    frame = data["overview"].assign(metric="perplexity", higher_is_better=False, fp32=30.0)
    frame = frame.assign(drop=-5.0, low=-6.0, high=-4.0)
    exploded = frame.assign(panel="exploded", drop=-40_000.0, low=-41_000.0, high=-39_000.0)
    with canvas.style():
        figure = FIGURES.get("overview")("overview").draw(pd.concat([frame, exploded]))
    first, second = figure.axes
    assert first.get_xlabel() == "rise (perplexity); left is better"
    assert first.get_title(loc="left") == "tiny_vit\nFP32 perplexity 30.00"
    points = {float(x) for line in first.lines if line.get_marker() != "None" for x in line.get_xdata()}
    assert points == {5.0}
    assert (first.get_xscale(), second.get_xscale()) == ("linear", "symlog")


def test_drawing_leaves_the_users_settings_alone(data: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "lines.linewidth": 9}):
        mine = dict(matplotlib.rcParams)
        changed = svg_of(FIGURES.get("outliers")("outliers"), data["outliers"])
        assert dict(matplotlib.rcParams) == mine
    assert dict(matplotlib.rcParams) == before
    assert changed == svg_of(FIGURES.get("outliers")("outliers"), data["outliers"])
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_numbers_are_written_short() -> None:
    assert csv_of(pd.DataFrame({"a": [1 / 3, 2.0], "b": ["x,y", None]})) == 'a,b\n0.333333333,"x,y"\n2,\n'


def test_inlined_figures_do_not_share_ids() -> None:
    svg = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg xmlns="x"><metadata>made by</metadata>'
        '<path id="m1"/><use xlink:href="#m1" clip-path="url(#m1)"/></svg>'
    )
    made = inline(svg, "fig", 'a "b"')
    assert made == (
        '<svg role="img" aria-label="a &quot;b&quot;" xmlns="x">'
        '<path id="fig-m1"/><use xlink:href="#fig-m1" clip-path="url(#fig-m1)"/></svg>'
    )


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 3))])
@pytest.mark.parametrize("name", ["saturation", "decomposition"])
def test_labels_of_many_models_do_not_run_into_each_other(
    name: str, count: int, shape: tuple[int, int], data: dict[str, Any]
) -> None:
    frame = pd.concat([data[name].assign(model=f"model {index}") for index in range(count)])
    with canvas.style():
        figure = FIGURES.get(name)(name).draw(frame)
        figure.canvas.draw()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == count
    assert shown[0].get_gridspec().get_geometry() == shape
    boxes = [axes.xaxis.label.get_window_extent() for axes in shown]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)


def test_a_long_name_of_a_site_stays_above_its_panel(data: dict[str, Any]) -> None:
    site = "bert.encoder.layer.1.intermediate.intermediate_act_fn/gelu.output"
    frame = data["histograms"]
    with canvas.style():
        figure = FIGURES.get("histograms")("histograms").draw(frame.assign(site=site))
        figure.canvas.draw()
    (axes,) = (axes for axes in figure.axes if axes.get_visible())
    assert "".join(axes.get_title(loc="left").split("\n")[1:]) == site
