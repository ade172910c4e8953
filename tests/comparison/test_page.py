"""A comparison in terminal and page: the stored numbers, wide and narrow, names as text, no network."""

from __future__ import annotations

import re
import shutil
from html import unescape
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from hessprobe import cli
from hessprobe.comparison.compared import Comparison, compare
from hessprobe.comparison.page import write_comparison
from hessprobe.comparison.terminal import show_comparison
from tests.comparison.study_runs import falling, write_losses, write_study
from tests.report.odd_text import HOSTILE
from tests.report.page_reading import numbers, script_json


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("runs") / "study")


@pytest.fixture(scope="module")
def compared(study: Path) -> Comparison:
    return compare([study], 2.0)


@pytest.fixture(scope="module")
def page(compared: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(compared, tmp_path_factory.mktemp("pages") / "deep" / "page.html")


@pytest.fixture(scope="module")
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def printed(comparison: Comparison, width: int = 140) -> str:
    out = StringIO()
    show_comparison(comparison, Console(file=out, width=width))
    return out.getvalue()


def cells(text: str, table: str) -> list[list[str]]:
    """Returns a page table's body as a reader sees it."""
    found = re.search(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    assert found, table
    rows = re.findall(r"<tr>(.*?)</tr>", found[1], re.DOTALL)
    return [
        [
            unescape(re.sub(r"<[^>]*>", " ", cell)).strip()
            for cell in re.findall(r"<td>(.*?)</td>", row, re.DOTALL)
        ]
        for row in rows
    ]


class TestTerminal:
    def test_a_row_a_method_with_steps_ratio_and_the_studys(self, compared):
        lines = printed(compared).splitlines()
        rows = {line.split("  ")[0]: re.split(r"\s{2,}", line.strip()) for line in lines}
        assert rows["layerwise GN"][-1] != "" and lines[0] == "steps to a held-out loss of 2  as given"
        found = [re.split(r"\s{2,}", line.strip()) for line in lines[2:8]]
        assert found[0] == ["method", "rate", "seeds", "steps", "least to most", "times", "study"]
        assert found[1] == ["full GN", "0.02", "3", "11.00 ± 0.58", "10 to 12", "1", "1"]
        assert found[2] == ["layerwise GN", "0.02", "3", "14.33 ± 0.88", "13 to 16", "1.302 ± 0.025", "1.44"]
        assert found[5] == ["SOAP", "0.01", "3", "2 of 3 reached", "5.4"]

    def test_costs_sweeps_findings_and_what_was_left_out(self, compared):
        text = printed(compared)
        assert "22.5 ± 1.2 k      33.8 ± 1.8 k  22.0 ± 1.2              264 ± 14" in text
        assert "not reached in 60" in text and "best, the largest tried" in text
        assert "layerwise GN needs 1.302 ± 0.025 times as many steps" in text
        assert "warm-up/seed-2: others started from it" in text
        assert "Abreu et al. 2025, 150M, loss 3.25" in text

    @pytest.mark.parametrize("width", [40, 60, 80])
    def test_a_narrow_terminal_loses_no_number(self, compared, width):
        text = printed(compared, width)
        assert max(map(len, text.splitlines())) <= width and "…" not in text
        flat = " ".join(text.split())
        for said in (
            "14.33 ± 0.88",
            "1.302 ± 0.025",
            "174.8 ± 8.3 k",
            "683 ± 32",
            "not reached in 60",
            "2.736",
        ):
            assert said in flat

    def test_without_a_terminal_there_are_no_control_codes_and_names_stay_text(self, tmp_path):
        write_losses(tmp_path / "a", falling(3), method="[bold]x")
        write_losses(tmp_path / "[red]odd[/]", [])
        text = printed(compare([tmp_path], 2.0))
        assert (
            "[bold]x" in text and "[red]odd[/]: it holds no training step yet" in text and "\x1b" not in text
        )


class TestPage:
    def test_the_tables_hold_the_stored_numbers(self, text, study):
        steps = {}
        for method in ("full-gn", "layerwise-gn"):
            logs = [study / method / "learning_rate-0.02" / f"seed-{seed}" / "log.zarr" for seed in range(3)]
            tables = [xr.open_zarr(log, group="train", consolidated=False) for log in logs]
            steps[method] = np.array([int((t["held_out_loss"].values > 2.0).sum()) + 1 for t in tables])
        full, layerwise = steps["full-gn"], steps["layerwise-gn"]
        ratio = np.exp(np.log(layerwise / full).mean())
        rows = cells(text, "steps-table")
        assert rows[0] == ["full GN", f"{full.mean():.2f} ± {full.std(ddof=1) / 3**0.5:.2f}", "10 to 12", "3", "1", "1",
                           "0.02, best of 3"]  # fmt: skip
        assert rows[1][:4] == ["layerwise GN", f"{layerwise.mean():.2f} ± 0.88", "13 to 16", "3"]
        assert rows[1][4].startswith(f"{ratio:.3f} ± ") and rows[1][5:] == ["1.44", "0.02"]
        assert rows[3][-1] == "0.03, the largest of 2" and rows[4][1:5] == ["2 of 3 reached", "–", "3", "–"]
        costs = cells(text, "costs-table")
        assert costs[0][1].split("  ")[0] == f"{full.mean() * 2048 / 1e3:.1f} ± 1.2 k"
        assert costs[1][4].split(maxsplit=3)[:3] == [f"{layerwise.mean() * 24:.0f}", "±", "21"]
        assert costs[4][1:] == ["–"] * 4

    def test_sweeps_and_the_study_beside_ours(self, text):
        rates = cells(text, "rates-table")
        assert [row[1] for row in rates[:3]] == ["0.01", "0.02", "0.04"]
        assert (
            rates[1][-1] == "best"
            and rates[5][3] == "not reached in 60"
            and rates[6][-1] == "best, the largest tried"
        )
        study = {row[0].split("  ")[0]: row[1:] for row in cells(text, "study-table")}
        assert study["full GN"] == ["240 M", "54", "1", "1"]
        assert study["layerwise GN"][:3] == ["120 M", "78", "1.44"] and study["layerwise GN"][3].startswith(
            "1.302 ±"
        )
        assert study["SOAP"] == ["240 M", "292", "5.4", "2 of 3 reached"]
        assert study["Muon"][1:] == ["–", "16", "not among these runs"]
        assert ["AdamW", "4 M", "flattens near this batch"] in cells(text, "critical-table")

    def test_the_charts_hold_the_stored_curves(self, text, study):
        charts = script_json(text, "chart-data")
        log = xr.open_zarr(
            study / "layerwise-gn/learning_rate-0.02/seed-1/log.zarr", group="train", consolidated=False
        )
        log = log.load()
        x = {
            "steps": np.arange(1, 15),
            "tokens_with_line_search": (log["tokens"] + log["line_search_tokens"]).values,
            "gradient_equivalents": log["gradient_equivalents"].values,
        }
        for measure, spent in x.items():
            chart = charts[f"loss_against_{measure}"]
            lines = [line for line in chart["data"] if line["name"] == "layerwise GN"]
            assert len(lines) == 3 and len(chart["data"]) == 15
            np.testing.assert_allclose(numbers(lines[1]["y"]), log["held_out_loss"])
            np.testing.assert_allclose(numbers(lines[1]["x"]), spent)
            assert chart["layout"]["shapes"][0]["y0"] == 2.0
        bars = [bar for bar in charts["steps_to_target"]["data"] if bar["type"] == "bar"]
        assert [numbers(bar["x"])[0] for bar in bars] == pytest.approx([11, 43 / 3, 128 / 3, 43, 0])
        spread = bars[0]["error_x"]
        assert [list(numbers(spread[end])) for end in ("array", "arrayminus")] == [[1], [1]]
        assert "error_x" not in bars[4]
        sweep = charts["learning_rates"]["data"][0]
        np.testing.assert_allclose(numbers(sweep["x"]), [0.01, 0.02, 0.04])
        np.testing.assert_allclose(numbers(sweep["y"]), [14, 11, 14])

    def test_how_the_target_was_chosen_is_said(self, text, compared, tmp_path):
        assert "a held-out loss of" in text and ">2</data> nats per token, as given." in text
        assert "at or below it; steps count from the run's first row" in unescape(text)
        runs = cells(text.replace('<div class="scroll"><table>', '<table id="all-runs">'), "all-runs")
        assert len(runs) == 19 and ["adamw/learning_rate-0.01/seed-0", "AdamW at 2,048 tokens a step", "0",
                                    "not reached in 60", "2.736"] in runs  # fmt: skip

    def test_no_name_can_inject_markup(self, tmp_path):
        write_losses(tmp_path / "<b>x<b>&amp;" / "a", falling(3), method=HOSTILE, device=HOSTILE)
        write_losses(
            tmp_path / "<b>x<b>&amp;" / "b", falling(3), optimizer={HOSTILE: HOSTILE}, learning_rate=0.1
        )
        write_losses(tmp_path / "<b>x<b>&amp;" / "c", falling(3), optimizer={HOSTILE: "y"}, learning_rate=0.2)
        write_losses(tmp_path / "<b>x<b>&amp;" / "d<b>", [], method=HOSTILE)
        write_losses(tmp_path / "<b>x<b>&amp;" / "e", [np.nan], method="diverged")
        text = write_comparison(compare([tmp_path], 2.0), tmp_path / "page.html").read_text(encoding="utf-8")
        assert "window.pwned=1</script>" not in text and "<img" not in text and "<b>" not in text
        assert "&lt;/script&gt;" in text
        names = {line["name"] for line in script_json(text, "chart-data")["loss_against_steps"]["data"]}
        # The one that diverged has no line.
        assert len(names) == 3 and not any("<" in name for name in names)

    def test_a_single_run_gives_a_page(self, tmp_path):
        run = write_losses(tmp_path / "only", [3.0, 2.5], method="adamw")
        text = write_comparison(compare([run]), tmp_path / "page.html").read_text(encoding="utf-8")
        assert cells(text, "steps-table") == [["AdamW", "2", "–", "1", "–", "–", "0.01"]]
        assert {row[0]: row[-1] for row in cells(text, "study-table")}["full GN"] == "not among these runs"
        assert "learning_rates" not in script_json(text, "chart-data") and 'id="rates-table"' not in text

    def test_it_carries_plotly_once_and_asks_for_nothing(self, text):
        assert text.count("plotly.js v") == 1
        without_plotly = re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", text, flags=re.DOTALL)
        assert not re.search(r'(src|href)\s*=\s*"(https?:)?//', without_plotly)
        said = re.sub(r'<script.*?</script>|value="[^"]*"', "", without_plotly, flags=re.DOTALL)
        assert not re.search(r"\b(nan|None|inf)\b", said)


@pytest.mark.browser
def test_in_a_browser_every_chart_shows_with_no_network_and_no_error(page):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium found on PATH; Debian: apt-get install chromium")
    complaints: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        for width, scheme in ((1280, "light"), (400, "dark")):
            tab = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            ).new_page()
            tab.on("console", lambda message: complaints.append(message.text))
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on(
                "request",
                lambda request: complaints.append(request.url) if request.url[:5] == "http:" else None,
            )
            tab.on(
                "request",
                lambda request: complaints.append(request.url) if request.url[:5] == "https" else None,
            )
            tab.goto(page.as_uri())
            tab.wait_for_selector("#chart-learning_rates .main-svg")
            for name in (
                "loss_against_steps",
                "loss_against_tokens_with_line_search",
                "loss_against_gradient_equivalents",
                "steps_to_target",
            ):
                box = tab.locator(f"#chart-{name} .main-svg").first.bounding_box()
                assert box["width"] > 300 and box["height"] > 150 and box["x"] + box["width"] <= width, name
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            colors = tab.evaluate(
                "document.getElementById('chart-loss_against_steps').data.map((line) => line.line.color)"
            )
            assert len(set(colors)) == 5 and not any("var(" in color for color in colors)
        browser.close()
    assert complaints == []


class TestCommand:
    """`hessprobe compare`: results on stdout, mistakes in one line."""

    @pytest.fixture
    def hessprobe(self, monkeypatch, capsys):
        def run(*words: str) -> tuple[int, str, str]:
            monkeypatch.setattr("sys.argv", ["hessprobe", "compare", *words])
            with pytest.raises(SystemExit) as end:
                cli.main()
                raise SystemExit(0)
            return int(end.value.code or 0), *capsys.readouterr()

        return run

    def test_it_prints_the_table_and_names_the_files_it_wrote(self, hessprobe, study, tmp_path):
        page, figures = tmp_path / "page.html", tmp_path / "figures"
        code, out, error = hessprobe(
            str(study), "--target", "2", "--out", str(page), "--figures", str(figures)
        )
        assert (code, error) == (0, "") and "14.33 ± 0.88" in out
        assert out.splitlines()[-1] == f"report   {page}" and page.is_file()
        written = [
            line.removeprefix("figure   ") for line in out.splitlines() if line.startswith("figure   ")
        ]
        assert sorted(written) == sorted(map(str, figures.iterdir())) and len(written) == 10

    def test_the_default_target_is_said(self, hessprobe, tmp_path):
        write_losses(tmp_path / "a", [3.0, 2.25])
        write_losses(tmp_path / "b", [3.0, 2.5], seed=1)
        code, out, _ = hessprobe(str(tmp_path))
        assert code == 0
        assert "held-out loss of 2.5 the loss that every run reached, the lowest of b the first" in " ".join(
            out.split()
        )

    def test_a_mistake_is_one_line(self, hessprobe, tmp_path, study):
        for words, said in (
            ([str(tmp_path / "none")], "there is no such folder"),
            ([str(tmp_path)], "neither it nor a folder below it holds a log.zarr"),
            ([str(study), "--target", "nan"], "--target nan: a held-out loss"),
            ([str(study), "--target", "-2"], "--target -2.0: a held-out loss"),
        ):
            code, out, error = hessprobe(*words)
            assert code == 2 and out == "" and error.count("\n") == 1 and said in error, error

    def test_a_page_that_cannot_be_written_is_one_line(self, hessprobe, study, tmp_path):
        (tmp_path / "file").touch()
        code, out, error = hessprobe(str(study / "soap"), "--out", str(tmp_path / "file" / "page.html"))
        assert code == 2 and "SOAP" in out and error.count("\n") == 1 and "cannot write" in error
