"""Pictures, script, terminal and several runs' page on Gauss-Newton against Hessian say what the store holds."""

from __future__ import annotations

import ast
import runpy
from html import unescape
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from hessprobe.analysis import open_run
from hessprobe.errors import UserError
from hessprobe.instruments.gn_hessian import ladder
from hessprobe.instruments.gn_hessian.answers import ASKED
from hessprobe.instruments.gn_hessian.ladder import ERRORS
from hessprobe.instruments.gn_hessian.norms import declared_dims
from hessprobe.instruments.gn_hessian.pictures import DIRECTION_LOOKS, MODEL_LOOKS, pictures
from hessprobe.instruments.gn_hessian.step_findings import ALONG
from hessprobe.instruments.gn_hessian.table import DIRECTIONS, MODELS
from hessprobe.pictures import matplotlib_pen, plotly_pen
from hessprobe.pictures.picture import Picture
from hessprobe.report.asking import ask
from hessprobe.report.differences import differences
from hessprobe.report.several_runs import write_runs_report
from hessprobe.report.terminal import show
from tests.instruments.gn_hessian.runs import STEPS, Truth, alone, write_gn_run
from tests.pictures.drawn import grid_on_paper, lines_on_page, lines_on_paper
from tests.report.page_reading import lines, numbers
from tests.report.runs import write_run

SCRIPT = Path(__file__).parents[3] / "analyses" / "gauss_newton_versus_hessian.py"
FOLDER = Path(ladder.__file__).parent
SOUND = [step for step in STEPS if step not in (12, 18)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Truth]]:
    """A run of six probed steps, of which step 12 failed and 18 holds no number, with densities of a block."""
    folder = tmp_path_factory.mktemp("gn") / "nano"
    return write_gn_run(folder, failed={12: "out of memory"}, blank=[18], density_blocks=["head"])


@pytest.fixture(scope="module")
def table(written) -> xr.Dataset:
    return open_run(written[0])["gn_hessian"].to_dataset().sel(step=SOUND).load()


@pytest.fixture(scope="module")
def drawn(written) -> dict[str, Picture]:
    return {each.name: each for each in pictures(alone(open_run(written[0])["gn_hessian"].to_dataset()))}


@pytest.mark.parametrize(
    ("name", "label", "variable", "at", "error"),
    [
        ("gn_gap", "‖H − G‖ / ‖G‖", "gn_gap", {}, "gn_gap_stderr"),
        ("gn_cosine", "cosine", "cosine", {}, "cosine_stderr"),
        ("gn_extremes", "H, smallest", "lambda_min", {"matrix": "hessian"}, "lambda_min_residual"),
        ("gn_extremes", "G, largest", "lambda_max", {"matrix": "gauss_newton"}, "lambda_max_residual"),
        ("gn_trace", "H − G", "trace", {"matrix": "residual"}, "trace_stderr"),
    ],
)
def test_page_and_paper_draw_the_stored_numbers_with_their_errors(
    drawn, table, name, label, variable, at, error
):
    page = lines_on_page(plotly_pen.draw(drawn[name]))
    place = [line["label"] for line in page].index(label)
    for line in (page[place], lines_on_paper(matplotlib_pen.draw(drawn[name]))[place]):
        np.testing.assert_array_equal(line["x"], SOUND)
        np.testing.assert_allclose(line["y"], table[variable].sel(at))
        np.testing.assert_allclose(line["stderr"], table[error].sel(at))


def test_paper_draws_blocks_densities_directions_and_both_errors(drawn, table):
    blocks = matplotlib_pen.draw(drawn["gn_block_gap"])
    np.testing.assert_array_equal(grid_on_paper(blocks), table["block_gn_gap"].values.T)
    density = drawn["gn_density"].data.sel(matrix="hessian")  # pyright: ignore
    line = lines_on_paper(matplotlib_pen.draw(drawn["gn_density"]))[1]
    np.testing.assert_allclose(np.nan_to_num(line["y"]), density["density"], atol=1e-8)
    assert np.trapezoid(density["density"], density["eigenvalue"]) == pytest.approx(1, abs=1e-8)
    line = lines_on_paper(matplotlib_pen.draw(drawn["gn_directions"]))[1]
    along = table["direction_curvature"].sel(direction="update")
    ratio = along.sel(matrix="hessian") / along.sel(matrix="gauss_newton")
    np.testing.assert_allclose(line["y"], ratio)
    figure = matplotlib_pen.draw(drawn["gn_model_errors"])
    assert [axes.get_title("left") for axes in figure.axes] == [
        "along the update, step 30",
        "along the Gauss-Newton step, step 30",
    ]
    row = table.sel(step=30, ladder_direction="gauss_newton_step")
    for line, name in zip(lines_on_paper(figure, 1), ("linearisation", "beyond_second_order"), strict=True):
        np.testing.assert_allclose(line["y"], row[name])
        np.testing.assert_allclose(line["stderr"], row[f"{name}_stderr"])


def test_what_was_not_measured_says_so_in_place_of_a_figure(written):
    table = open_run(written[0])["gn_hessian"].to_dataset().isel(step=[])
    for picture in pictures(alone(table)):
        if picture.where != "page":
            with pytest.raises(UserError, match="no row of the table 'gn_hessian' holds a"):
                matplotlib_pen.draw(picture)


def test_everything_that_is_read_is_declared(written):
    """Readers of older tables take a variable that is missing for NaN, so a wrong name would never be noticed."""
    named = {
        node.value
        for file in sorted(FOLDER.glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("measured", "sound_rows")
        for node in node.args
        if isinstance(node, ast.Constant)
    }
    declared = declared_dims()
    assert "lambda_min_residual" in named and named <= set(declared), named - set(declared)
    assert set(ERRORS) <= set(declared) and set(ASKED) <= set(declared)
    table = open_run(written[0])["gn_hessian"].to_dataset()
    assert {name: table[name].dims for name in declared} == declared
    assert set(DIRECTION_LOOKS) == set(ALONG) == set(DIRECTIONS) and set(MODEL_LOOKS) == set(MODELS)


def test_the_script_prints_findings_and_files(written, tmp_path, quick, capsys):
    script = runpy.run_path(str(SCRIPT))
    assert script["main"]([str(written[0]), "--out", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    assert all(path.name in said for path in (tmp_path / "figures").iterdir()) and "gn_gap.pdf" in said
    assert "Gauss-Newton matrix's norm away from it" in said and "held-out" not in said
    bare = write_run(tmp_path / "bare", steps=None, train_steps=2)
    assert script["main"]([str(bare), "--out", str(tmp_path)]) == 2
    assert "no table 'gn_hessian'" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 140])
def test_the_terminal_shows_the_last_row_with_errors(written, table, width):
    out = StringIO()
    show(written[0], Console(file=out, width=width), tables=["gn_hessian"])
    said, last = out.getvalue(), table.sel(step=30)
    assert "step 30  32 sequences, 2,048 tokens" in said and max(map(len, said.splitlines())) <= width
    assert f"|H - G| / |G|  {float(last['gn_gap']):.4f} ±" in said
    assert f"{float(last['block_gn_gap'][0]):.4f} ±" in said and "60.0 ± 2.4 %" in said
    assert "step 12 failed: out of memory" in said


def test_several_runs_stand_beside_each_other_up_to_their_common_step(tmp_path):
    one, _ = write_gn_run(tmp_path / "one", train_steps=4, steps=(0, 6, 12), seed=1)
    other, _ = write_gn_run(tmp_path / "other", train_steps=4, steps=(0, 6, 12, 18), seed=2)
    bare = write_run(tmp_path / "bare", steps=None, train_steps=4)
    text = write_runs_report([one, other, bare], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "bare: This run holds no table 'gn_hessian'" in unescape(text)
    tables = [open_run(run)["gn_hessian"].to_dataset() for run in (one, other)]
    for label, stored in zip(("one", "other"), tables, strict=True):
        np.testing.assert_array_equal(numbers(lines(text, "gn_gap")[label]["y"]), stored["gn_gap"])
        assert label in lines(text, "gn_density") and label in lines(text, "gn_linearisation")
    asked = ask([open_run(one), open_run(other)], ["one", "other"])
    apart = next(each for each in differences(asked) if each.name == "gn_gap")
    gaps = [float(stored["gn_gap"].sel(step=12)) for stored in tables]
    assert apart.value == pytest.approx(abs(gaps[0] - gaps[1])) and apart.steps == (12,)
    assert apart.stderr == pytest.approx(0.05 * np.hypot(*gaps))
    text = write_runs_report([bare, bare], tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "hessprobe train --probe gn_hessian records it" in unescape(text)
