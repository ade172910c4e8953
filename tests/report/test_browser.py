"""The page in a real browser: no network, no error, sections, slider, hover, both widths and schemes."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import open_run
from hessprobe.instruments.cross_layer.coupling import coupling
from hessprobe.report.page import write_report
from hessprobe.report.several_runs import write_runs_report
from tests.instruments.gn_hessian.runs import add_gn_hessian
from tests.instruments.preconditioner.runs import write_preconditioner_run
from tests.report.odd_text import HOSTILE
from tests.report.runs import LAYERS, write_long_run, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium found on PATH; Debian: apt-get install chromium"
    ),
]
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip
SECTIONS = [
    "findings", "cross_layer", "gn_hessian", "preconditioner", "training", "costs", "provenance", "reading",
]  # fmt: skip
CHARTS = [
    "coupling",
    "shares",
    "coupling_by_distance",
    "off_block_energy",
    "cross_share",
    "loss",
    "step_size",
    "decrease",
    "seconds",
]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser) -> Iterator[Callable]:
    """Returns the function (page file, width, scheme) -> an open page.

    At the end no page may have asked the network for anything or have complained on its console.
    """
    contexts, complaints = [], []

    def opened(path: Path, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        tab.on("request", lambda request: check_local(request.url, path))
        tab.goto(path.as_uri())
        tab.wait_for_selector("#chart-loss .main-svg")
        return tab

    def check_local(url: str, path: Path) -> None:
        if url != path.as_uri() and not url.startswith(("data:", "blob:")):
            complaints.append(f"request: {url}")

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_section_and_chart_shows_without_sideways_scrolling(visit, page, width, scheme):
    tab = visit(page, width, scheme)
    for name in SECTIONS:
        assert tab.locator(f"section#{name} h2").is_visible(), name
        assert tab.locator(f"section#{name}").bounding_box()["height"] > 60, name
    missing = [n for n in SECTIONS if tab.locator(f"section#{n} > h2 + .missing").count()]
    assert missing == ["gn_hessian", "preconditioner"]  # of which this run holds nothing, and says so
    for name in CHARTS:
        box = tab.locator(f"#chart-{name} .main-svg").first.bounding_box()
        assert box["width"] > 300 and box["height"] > 150 and box["x"] + box["width"] <= width, name
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def grouped(sketched, tmp_path_factory) -> Path:
    return write_report(sketched, tmp_path_factory.mktemp("page") / "grouped.html")


@pytest.mark.parametrize("width", [1280, 400])
def test_groupings_show_and_hovering_says_value_error_and_what_is_not_resolved(visit, grouped, width):
    tab = visit(grouped, width, "dark" if width == 400 else "light")
    for name in ("merge_gains", "grouping_curve", "importance", "jacobi_radius"):
        box = tab.locator(f"#chart-{name} .main-svg").first.bounding_box()
        assert box["width"] > 300 and box["x"] + box["width"] <= width, name
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    said = [hover(tab, "merge_gains", *place(tab, "merge_gains", trace, -1)) for trace in (0, 1)]
    assert all(re.search(r"\d% ± .*\d%", each) for each in said)
    assert "within 2 standard errors" not in said[0] and "within 2 standard errors" in said[1]
    said = hover(tab, "importance", across=0.5, down=0.9)
    assert re.search(r"head at step 10.*\d% ± .*\d%", said)
    assert re.search(
        r"6 groups: \d+.*% ± .*% of full", hover(tab, "grouping_curve", *place(tab, "grouping_curve", -1, 0))
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """Returns the page of a run with the tables gn_hessian and preconditioner."""
    folder = write_preconditioner_run(tmp_path_factory.mktemp("runs") / "run")
    add_gn_hessian(folder, density_blocks=LAYERS[:1])
    return write_report(folder)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_both_other_instruments_show_every_chart_without_sideways_scrolling(visit, both, width, scheme):
    tab = visit(both, width, scheme)
    assert tab.locator("section > h2 + .missing").count() == 1  # no cross_layer table
    for section in ("gn_hessian", "preconditioner"):
        boxes = tab.evaluate(
            """(section) => Object.fromEntries([...document.querySelectorAll(`section#${section} .chart`)].map((chart) => {
              const drawn = chart.querySelector(".main-svg");
              return [chart.dataset.chart, drawn ? drawn.getBoundingClientRect().toJSON() : null];
            }))""",
            section,
        )
        assert len(boxes) >= 5
        for name, box in boxes.items():
            assert box and box["width"] > 300 and box["height"] > 150 and box["right"] <= width, name
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(
    "chart", ["gn_gap", "gn_directions", "layerwise_over_full", "preconditioner_scoreboard"]
)
def test_hovering_their_charts_says_a_value(visit, both, chart):
    tab = visit(both)
    said = hover(tab, chart, *place(tab, chart, -1, 0))
    assert re.search(r"\d", said) and "undefined" not in said and "%{" not in said


def test_several_runs_stand_side_by_side(visit, run, sketched, tmp_path):
    path = write_runs_report([run, sketched], tmp_path / "both.html")
    for width in (1280, 400):
        tab = visit(path, width)
        for name in (
            "coupling-0",
            "coupling-1",
            "coupling_by_distance",
            "off_block_energy",
            "loss",
            "grouping_curve",
        ):
            assert tab.locator(f"#chart-{name} .main-svg").first.is_visible(), name
        legend = tab.locator("#chart-off_block_energy .legendtext").all_text_contents()
        assert legend == [run.name, sketched.name]
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_charts_follow_the_scheme(visit, page):
    tab = visit(page)

    def ink() -> str:
        return tab.evaluate("getComputedStyle(document.querySelector('#chart-loss .ytick text')).fill")

    def line() -> str:
        return tab.evaluate("document.getElementById('chart-loss').data[1].line.color")

    light = ink(), line()
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_timeout(300)
    dark = ink(), line()
    assert light[0] != dark[0] and light[1] != dark[1]
    assert "var(" not in dark[1]


def shown_matrix(tab, chart: str = "coupling") -> list[list[Any]]:
    return tab.evaluate(f"document.getElementById('chart-{chart}').data[0].z")


def move_slider(tab, index: int) -> None:
    slider = tab.locator("#step-slider")
    slider.focus()
    slider.press("Home")
    for _ in range(index):
        slider.press("ArrowRight")
    tab.wait_for_timeout(200)


def test_the_slider_shows_the_matrix_pairs_and_shares_of_its_step(visit, page, log: xr.DataTree):
    tab = visit(page)
    rows = coupling(log["cross_layer"].to_dataset())
    for index in (0, 3, rows.sizes["step"] - 1):
        move_slider(tab, index)
        row = rows.isel(step=index)
        assert tab.locator("#step-shown").inner_text() == str(int(row["step"]))
        matrix = shown_matrix(tab)
        for i in range(len(LAYERS)):
            for j in range(len(LAYERS)):
                stored = float(row["coupling"][i, j])
                assert matrix[i][j] is None if i == j else math.isclose(matrix[i][j], stored, rel_tol=1e-6)
        pairs = sorted(
            ((float(row["coupling"][i, j]), i, j) for i in range(len(LAYERS)) for j in range(i)), reverse=True
        )
        value, j, i = pairs[0]
        first = tab.locator("#strongest-pairs tr").first.inner_text().split("\t")
        assert first[0] == f"{LAYERS[i]} × {LAYERS[j]}"
        assert first[1].startswith(f"{value:.3f} ± {float(row['coupling_stderr'][i, j]):.3f}")
        assert tab.evaluate("document.getElementById('chart-off_block_energy').layout.shapes[0].x0") == int(
            row["step"]
        )


def test_the_direction_changes_the_shares(visit, page):
    tab = visit(page)
    update = shown_matrix(tab, "shares")
    tab.get_by_label("−gradient").check()
    tab.wait_for_timeout(200)
    assert shown_matrix(tab, "shares") != update


def hover(tab, chart: str, across: float, down: float) -> str:
    area = tab.locator(f"#chart-{chart} .nsewdrag").first
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    tab.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    tab.wait_for_selector(f"#chart-{chart} .hoverlayer .hovertext")
    return " ".join(tab.locator(f"#chart-{chart} .hoverlayer .hovertext").all_text_contents())


def place(tab, chart: str, trace: int, index: int) -> tuple[float, float]:
    """Returns where plotly drew one of a trace's points, as shares of the chart's width and height."""
    return tuple(
        tab.evaluate(
            """([name, trace, index]) => {
              const chart = document.getElementById("chart-" + name), { xaxis, yaxis } = chart._fullLayout;
              const points = chart.calcdata.at(trace), point = points.at(index);
              return [xaxis.c2p(point.x) / xaxis._length, yaxis.c2p(point.y) / yaxis._length];
            }""",
            [chart, trace, index],
        )
    )


def upper(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix), k=1)]


def test_hovering_says_which_pair_its_value_and_its_error(visit, page, log: xr.DataTree):
    tab = visit(page)
    last = coupling(log["cross_layer"].to_dataset()).isel(step=-1)
    said = hover(tab, "coupling", across=3.5 / 6, down=1.5 / 6)  # row 1, column 3
    value, stderr = float(last["coupling"][1, 3]), float(last["coupling_stderr"][1, 3])
    assert LAYERS[1] in said and LAYERS[3] in said
    assert f"{value:.3g} ± {stderr:.2g}" in said
    # The pair farthest from its distance's mean, whose dot the pointer cannot miss; pairs are in order of coupling.
    values, apart = upper(last["coupling"].values), upper(np.abs(np.subtract.outer(range(6), range(6))))
    far = np.abs(values - np.array([values[apart == d].mean() for d in apart])).argmax()
    said = hover(
        tab, "coupling_by_distance", *place(tab, "coupling_by_distance", 0, int((values > values[far]).sum()))
    )
    assert f"{values[far]:.3g}" in said and f" ± {upper(last['coupling_stderr'].values)[far]:.2g}" in said
    assert " × " in said
    said = hover(tab, "off_block_energy", across=0.99, down=0.1)
    energy = log["cross_layer"].to_dataset().sel(step=30)
    assert f"{float(energy['off_block_energy']):.4g} ± {float(energy['off_block_energy_stderr']):.2g}" in said


def test_the_loss_lies_along_the_clock_chosen_in_any_scheme(visit, page, log: xr.DataTree):
    tab, train = visit(page, 400), log["train"].to_dataset().load()
    evaluated = train.dropna("step", subset=["held_out_loss"])

    def drawn() -> list[float]:
        return tab.evaluate("Array.from(document.getElementById('chart-loss').data[1].x)")

    assert drawn() == list(evaluated["step"].values)
    for words, clock, title in (
        ("seconds", "seconds", "seconds of training steps"),
        ("tokens", "tokens", "tokens read to take steps"),
    ):
        tab.get_by_label(words, exact=True).check()
        assert drawn() == list(evaluated[clock].values)
        assert tab.locator("#chart-loss .xtitle").text_content() == title
    said = hover(tab, "loss", *place(tab, "loss", 1, -1))
    last = evaluated.isel(step=-1)
    assert f"step {int(last['step'])}, {int(last['tokens']):,} tokens" in said
    assert f"{float(last['held_out_loss']):.4g}" in said
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_timeout(300)
    assert drawn() == list(evaluated["tokens"].values)
    tab.get_by_label("steps", exact=True).check()
    assert drawn() == list(evaluated["step"].values)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 400


def test_names_stay_text_in_the_browser(visit, tmp_path):
    blocks = [f"{HOSTILE}{i}" for i in range(3)]
    tab = visit(write_report(write_run(tmp_path / "run", blocks=blocks, name=HOSTILE)))
    move_slider(tab, 1)
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.pwned") is None
    assert tab.locator("h1").inner_text() == HOSTILE and tab.title().startswith(HOSTILE)
    assert tab.locator("img, main b, .chart b, .chart a").count() == 0
    assert tab.locator("#strongest-pairs td").first.inner_text().count(HOSTILE) == 2
    # Plotly would have turned an unescaped <b>x</b> into a bold x; the tick must show its letters.
    ticks = tab.locator("#chart-coupling .ytick text").all_text_contents()
    assert ticks and all(tick.startswith("</script") for tick in ticks)


def test_a_page_without_probes_still_draws_training(visit, tmp_path):
    tab = visit(write_report(write_run(tmp_path / "run", steps=None)))
    assert "--probe cross_layer" in tab.locator("section#cross_layer .missing").inner_text()


def test_a_thousand_probed_and_ten_thousand_training_steps(visit, tmp_path):
    blocks = ("embedding", *(f"block.{i}" for i in range(12)), "head")
    folder = write_long_run(tmp_path / "run", blocks=blocks, every=10, train_steps=10_000)
    start = time.process_time()  # of this process: others may be at work
    path = write_report(folder)
    assert time.process_time() - start < 10
    assert path.stat().st_size < 15e6
    tab = visit(path)
    took = tab.evaluate(
        """async () => {
          const slider = document.getElementById("step-slider"), start = performance.now();
          for (let i = 0; i < 10; i++) {
            slider.value = 97 * i;
            slider.dispatchEvent(new Event("input"));
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          }
          return performance.now() - start;
        }"""
    )
    assert took / 10 < 1000  # milliseconds a move of the slider, on a busy two-core machine without a GPU
    assert tab.locator("#step-shown").inner_text() == "8,730"
    took = tab.evaluate(
        """async () => {
          const start = performance.now(), choices = document.querySelectorAll('input[name="clock"]');
          for (const choice of [...choices].reverse()) {
            choice.click();
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          }
          return (performance.now() - start) / choices.length;
        }"""
    )
    assert took < 1000
    rows = coupling(open_run(folder)["cross_layer"].to_dataset().sel(step=[8730]))
    assert math.isclose(shown_matrix(tab)[0][1], float(rows["coupling"][0, 0, 1]), rel_tol=1e-6)
