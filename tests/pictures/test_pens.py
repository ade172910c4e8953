"""Both pens draw the same numbers of every kind of picture, whatever the numbers and the names."""

from __future__ import annotations

import re
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import plotly.io
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hessprobe.errors import UserError
from hessprobe.pictures import matplotlib_pen, plotly_pen
from hessprobe.pictures.looks import PALETTE, Look, by_position
from hessprobe.pictures.picture import (
    Axis,
    Density,
    Dots,
    Heatmap,
    Line,
    Lines,
    Panels,
    Picture,
    Points,
    is_empty,
)
from tests.pictures.drawn import (
    grid_on_page,
    grid_on_paper,
    half_lengths,
    lines_on_page,
    lines_on_paper,
)

HOSTILE = (
    "$x_1",
    r"$\bad{",
    "<b>bold</b>",
    "&amp;",
    "_private",
    "%{y}",
    "two\nlines",
    "a" * 80,
    "{x}",
    "α → β",
)
names = st.one_of(st.sampled_from(HOSTILE), st.text("ab$_<>&\\{}^%", min_size=1, max_size=30))
numbers = st.one_of(st.just(np.nan), st.floats(-1e6, 1e6, width=32))
scales = st.sampled_from(["linear", "log", "ratio"])


def values_of(size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(float, size, elements=numbers)


@st.composite
def lines(draw: Any) -> Line:
    size = draw(st.sampled_from([1, 2, 5, 60, 61, 90]))
    stderr = draw(st.none() | st.just(size).flatmap(values_of))
    notes = draw(st.none() | st.lists(names, min_size=size, max_size=size)) if size <= 5 else None
    return Line(
        label=draw(names), x=np.arange(1, size + 1), y=draw(values_of(size)),
        stderr=None if stderr is None else abs(stderr), notes=notes, look=by_position(draw(st.integers(0, 30))),
        dots=draw(st.booleans()), fill=draw(st.booleans()), markers=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def axes(draw: Any) -> Axis:
    return Axis(
        words=draw(names), units=draw(names), scale=draw(scales), percent=draw(st.booleans()),
        from_zero=draw(st.booleans()), reverse=draw(st.booleans()), whole=draw(st.booleans()),
        at=draw(st.none() | st.just(0.5)), at_words=draw(st.just("") | names),
    )  # fmt: skip


def on_page(picture: Picture) -> Any:
    return plotly_pen.draw(picture)


def both(picture: Picture) -> tuple[Any, Any]:
    """Returns the picture drawn by both pens, and fails where either cannot be shown."""
    page, paper = on_page(picture), matplotlib_pen.draw(picture)
    plotly.io.to_json(page)
    paper.savefig(BytesIO(), format="png", dpi=40)
    return page, paper


@settings(max_examples=25, deadline=None)
@given(st.lists(lines(), max_size=4), axes())
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout not applied", "ignore:Attempt to set")
def test_lines_are_the_same_on_page_and_paper(drawn, axis):
    picture = Lines(name="lines", lines=drawn, y=axis)
    assume(not is_empty(picture))
    page, paper = both(picture)
    known = [line for line in drawn if np.isfinite(line.y).any()]
    ones, others = lines_on_page(page), lines_on_paper(paper)
    assert len(ones) == len(others) == len(known)
    for line, one, other in zip(known, ones, others, strict=True):
        for each in (one, other):
            np.testing.assert_array_equal(each["x"], line.x)
            np.testing.assert_array_equal(each["y"], line.y)
        assert one["label"] == line.label
        if line.stderr is not None and line.y.size <= 60:
            np.testing.assert_array_equal(one["stderr"], line.stderr)
            shown = np.isfinite(line.y) & np.isfinite(line.stderr)
            np.testing.assert_allclose(other["stderr"][shown], line.stderr[shown], rtol=1e-4, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(names, min_size=1, max_size=4, unique=True), st.integers(1, 5), st.booleans(), scales,
    st.booleans(), st.data(),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout not applied")
def test_heatmaps_are_the_same_on_page_and_paper(rows, width, signed, scale, percent, data):
    values = data.draw(arrays(float, (len(rows), width), elements=numbers))
    stderr = data.draw(st.none() | arrays(float, values.shape, elements=numbers))
    marked = data.draw(st.none() | arrays(bool, values.shape))
    picture = Heatmap(
        name="grid", rows=rows, columns=np.arange(width) * 1000, values=values, stderr=stderr, marked=marked,
        signed=signed, value=Axis(words="share", scale=scale, percent=percent), x=Axis(words="step"),
    )  # fmt: skip
    assume(not is_empty(picture))
    page, paper = both(picture)
    z, image = grid_on_page(page), grid_on_paper(paper)
    expected = values
    if scale == "ratio":
        with np.errstate(divide="ignore", invalid="ignore"):
            expected = np.where(values > 0, np.log2(values), np.where(np.isnan(values), np.nan, -2)).clip(
                -2, 2
            )
    np.testing.assert_array_equal(z, expected)
    np.testing.assert_allclose(image, (100 if percent and scale != "ratio" else 1) * expected)
    assert [unescape(row).replace("<br>", "\n") for row in page.data[0].y] == rows
    assert list(page.data[0].x) == [f"{1000 * i:,}" for i in range(width)]
    if marked is not None:
        assert len(page.data[1].x) == marked.sum() == len(paper.axes[0].lines[0].get_xdata())


@settings(max_examples=25, deadline=None)
@given(st.lists(names, min_size=1, max_size=6, unique=True), st.booleans(), axes(), st.data())
@pytest.mark.filterwarnings("ignore:Glyph", "ignore:constrained_layout not applied", "ignore:Attempt to set")
def test_dots_are_the_same_on_page_and_paper(rows, bars, axis, data):
    points = [
        Points(
            label=data.draw(names), values=data.draw(values_of(len(rows))),
            stderr=None if bars else np.abs(data.draw(values_of(len(rows)))),
            look=by_position(i), notes=data.draw(st.none() | st.just(rows)),
        )
        for i in range(data.draw(st.integers(0, 3)))
    ]  # fmt: skip
    picture = Dots(name="dots", rows=rows, points=points, x=axis, bars=bars)
    assume(not is_empty(picture))
    page, paper = both(picture)
    traces = [trace for trace in page.data if trace.name is not None]
    known = [each for each in points if np.isfinite(each.values).any()]
    assert len(traces) == len(known)
    assert [unescape(row).replace("<br>", "\n") for row in page.layout.yaxis.categoryarray] == rows[::-1]
    for each, trace in zip(known, traces, strict=True):
        at = np.isfinite(each.values)
        np.testing.assert_array_equal(trace.x, each.values[at])
        assert [unescape(row).replace("<br>", "\n") for row in trace.y] == [
            rows[i] for i in np.flatnonzero(at)
        ]
    drawn: Any = paper.axes[0].containers
    assert len(drawn) == len(points)
    for each, container in zip(points, drawn, strict=True):
        at = np.isfinite(each.values)
        found = [bar.get_width() for bar in container] if bars else container.lines[0].get_xdata()[at]
        np.testing.assert_allclose(found, each.values[at], rtol=1e-12, atol=1e-9)
        if each.stderr is not None:
            shown = at & np.isfinite(each.stderr)
            ends = half_lengths(container.lines[2][0], 0)
            np.testing.assert_allclose(ends[shown], each.stderr[shown], rtol=1e-4, atol=1e-9)


def test_a_density_is_drawn_down_to_its_floor_with_its_range():
    x = np.linspace(-1, 1, 50)
    y = np.exp(-40 * x**2)
    line = Line(label="H", x=x, y=y, low=y / 2, high=2 * y, look=Look(color="series-2"))
    picture = Density(name="density", lines=[line])
    page, paper = both(picture)
    expected = np.where(y > 1e-9 * y.max(), y, np.nan)
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(lines_on_page(page)[0]["y"], expected)
    np.testing.assert_array_equal(lines_on_paper(paper)[0]["y"], expected)
    edges = [trace.y for trace in page.data if trace.name is None]
    kept = np.where(y / 2 > 1e-9, y / 2, np.nan)
    np.testing.assert_array_equal(edges[0], kept)
    assert page.layout.yaxis.type == "log" and paper.axes[0].get_yscale() == "log"
    assert len(paper.axes[0].collections) == 1
    assert (
        "at %{x:.3g}: %{y:.2e} (probes: %{customdata[0]:.1e} to %{customdata[1]:.1e})"
        in page.data[-1].hovertemplate
    )


def test_panels_are_one_figure_on_paper_and_a_chart_each_on_the_page():
    panels = [
        Lines(
            name=f"errors-{i}",
            at=f"along {i}",
            lines=[Line(label="linearising", x=np.arange(3), y=np.arange(3.0) + i)],
        )
        for i in range(2)
    ]
    picture = Panels(name="errors", panels=panels)
    paper, page = matplotlib_pen.draw(picture), plotly_pen.charts([picture])
    assert list(page) == ["errors-0", "errors-1"]
    for i in range(2):
        np.testing.assert_array_equal(
            lines_on_paper(paper, i)[0]["y"], lines_on_page(page[f"errors-{i}"])[0]["y"]
        )
    assert [axes.get_title(loc="left") for axes in paper.axes] == ["along 0", "along 1"]
    assert [axes.get_xlabel() for axes in paper.axes] == ["", "step"]


def test_of_a_long_line_the_page_keeps_every_extreme_and_errors_are_a_band():
    rng = np.random.default_rng(0)
    y = rng.standard_normal(9000)
    y[[17, 4567]] = 50, -60
    picture = Lines(name="long", lines=[Line(label="loss", x=np.arange(9000), y=y, stderr=np.ones(9000))])
    page, paper = both(picture)
    low, high, line = page.data
    assert 1000 < line.y.size <= 4002 and line.y.max() == 50 and line.y.min() == -60
    np.testing.assert_array_equal(line.y, y[line.x])
    np.testing.assert_allclose(high.y - low.y, 2)
    assert line.error_y.array is None and line.mode == "lines" and len(paper.axes[0].collections) == 1
    np.testing.assert_array_equal(lines_on_paper(paper)[0]["y"], y)
    few = Lines(name="dots", lines=[Line(label="step size", x=np.arange(9000), y=y, dots=True)])
    assert on_page(few).data[0].x.size == 1000 and on_page(few).data[0].mode == "markers"


def test_many_names_are_short_and_stay_apart():
    rows = [f"block.{i}.attention.output.projection.{i}" for i in range(50)]
    values = np.random.default_rng(0).random((50, 50))
    for count, square in ((30, True), (50, True), (50, False)):
        few = rows[:count]
        picture = Heatmap(name="grid", rows=few, columns=few, values=values[:count, :count], square=square)
        page, paper = both(picture)
        # Names that are cut short may be alike, and must not share a row.
        assert len(set(page.data[0].y)) == count and len(page.layout.yaxis.tickvals or ()) in (0, count)
        assert (page.layout.xaxis.tickvals is not None) == (count <= 40)
        ticks = [label.get_text() for label in paper.axes[0].get_xticklabels()]
        assert len(ticks) <= 50 and all(len(tick) <= 18 for tick in ticks)
    assert list(page.data[0].y) == rows


def test_steps_of_a_heatmap_are_thinned_on_the_page_alone():
    picture = Heatmap(
        name="grid", rows=["a", "b"], columns=np.arange(200), values=np.arange(400.0).reshape(2, 200)
    )
    page, paper = both(picture)
    assert len(page.data[0].x) == 60 and page.data[0].x[-1] == "199" and page.data[0].z.shape == (2, 60)
    np.testing.assert_array_equal(page.data[0].z[0], [int(step) for step in page.data[0].x])
    assert grid_on_paper(paper).shape == (2, 200)


@pytest.mark.parametrize("kind", [Lines, Density, Heatmap, Dots, Panels])
def test_a_picture_of_nothing_is_no_chart_and_says_why(kind):
    picture = kind(name="none", missing="nothing was measured")
    assert is_empty(picture) and plotly_pen.charts([picture, Panels(name="none")]) == {}
    for pen in (plotly_pen, matplotlib_pen):
        with pytest.raises(UserError, match="nothing was measured"):
            pen.draw(picture)
    with pytest.raises(UserError, match="no number for the picture none; nothing to draw"):
        matplotlib_pen.draw(Panels(name="none"))


def test_no_name_is_markup_or_a_formula():
    line = Line(label="<b>x</b>", x=np.arange(2), y=np.ones(2), notes=["<img src=x>", "a\nb"])
    (trace,) = on_page(Lines(name="lines", lines=[line], y=Axis(words="<i>y</i>"))).data
    assert trace.name == "&lt;b&gt;x&lt;/b&gt;" and "<b>" not in trace.hovertemplate
    assert trace.customdata == (["", "<br>&lt;img src=x&gt;"], ["", "<br>a<br>b"])
    grid = Heatmap(name="g", rows=["<b>"], columns=["<i>"], values=np.ones((1, 1)), notes=[["<u>"]])
    text = str(plotly.io.to_json(on_page(grid)))
    assert not re.search("<[biu]>", text) and "&lt;u&gt;" in text
    axes = matplotlib_pen.draw(Lines(name="lines", lines=[line], y=Axis(words="$y"))).axes[0]
    assert axes.get_ylabel() == r"\$y"


def test_errors_are_said_as_numbers_and_as_nothing_where_there_is_none():
    line = Line(label="a", x=np.arange(2), y=np.ones(2), stderr=np.array([0.123, np.nan]))
    whole = Line(label="b", x=np.arange(2), y=np.ones(2), stderr=np.array([0.1, 0.2]))
    one, other = on_page(Lines(name="lines", lines=[line, whole], y=Axis(words="y", percent=True))).data
    assert list(one.customdata) == [" ± 12%", ""]
    assert other.hovertemplate == "b<br>step %{x}: %{y:.1%} ± %{customdata:.2p}<extra></extra>"
    values, stderr = np.array([[8.0, np.nan]]), np.array([[1, np.nan]])
    axis = Axis(scale="ratio", number=".3g")
    grid = Heatmap(name="g", rows=["a"], columns=["x", "y"], values=values, stderr=stderr, value=axis)
    assert on_page(grid).data[0].customdata[0][0] == "8 ± 1"


def test_a_legend_names_a_group_once():
    x = np.arange(3)
    drawn = [Line(label=f"GN, seed {i}", group="GN", x=x, y=x + i) for i in range(3)]
    picture = Lines(name="loss", lines=[*drawn, Line(label="", x=x, y=x)], legend=True)
    page, paper = both(picture)
    assert [trace.showlegend for trace in page.data] == [True, False, False, False]
    assert "GN, seed 2" in page.data[2].hovertemplate and page.data[3].hoverinfo == "skip"
    assert [text.get_text() for text in paper.axes[0].get_legend().get_texts()] == ["GN"]


def test_the_pages_style_sheet_and_the_paper_have_one_palette():
    (sheet,) = (Path(plotly_pen.__file__).parents[1]).rglob("style.css")
    light = dict(re.findall(r"--([\w-]+): (#\w+)", sheet.read_text(encoding="utf-8").split("@media")[0]))
    assert {name: light[name] for name in PALETTE} == PALETTE
    with pytest.raises(ValueError, match="no color named 'teal'"):
        Look(color="teal")


def test_saved_as_pdf_with_text_and_png_at_column_width(tmp_path):
    line = Line(label="$bad", x=np.arange(3), y=np.arange(3.0))
    figure = matplotlib_pen.draw(Lines(name="loss", lines=[line], at="step 3"))
    paths = matplotlib_pen.save(figure, tmp_path / "figures", "loss")
    assert [path.name for path in paths] == ["loss.pdf", "loss.png"]
    pdf = paths[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf
    assert paths[1].read_bytes().startswith(b"\x89PNG") and figure.get_figwidth() == pytest.approx(3.35)
