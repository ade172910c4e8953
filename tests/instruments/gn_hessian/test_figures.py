"""Figures, script, terminal and several runs' page on Gauss-Newton against Hessian say what the store holds."""

from __future__ import annotations

import runpy
from html import unescape
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from hessprobe.analysis import open_run
from hessprobe.instruments.gn_hessian import figures
from hessprobe.reading.labelled import labels
from hessprobe.reading.load_run import load_run
from hessprobe.report.asking import ask
from hessprobe.report.differences import differences
from hessprobe.report.figure_set import save_drawings
from hessprobe.report.several_runs import write_runs_report
from hessprobe.report.terminal import show
from tests.instruments.gn_hessian.runs import STEPS, Truth, write_gn_run
from tests.report.page_reading import lines, numbers
from tests.report.runs import write_run

SCRIPT = Path(__file__).parents[3] / "analyses" / "gauss_newton_versus_hessian.py"
SOUND = [step for step in STEPS if step not in (12, 18)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Truth]]:
    """A run of six probed steps, of which step 12 failed and 18 holds no number, with densities of a block."""
    folder = tmp_path_factory.mktemp("gn") / "nano"
    return write_gn_run(folder, failed={12: "out of memory"}, blank=[18], density_blocks=["head"])


@pytest.fixture(scope="module")
def table(written) -> xr.Dataset:
    return open_run(written[0])["gn_hessian"].to_dataset().sel(step=SOUND).load()


def test_figures_draw_what_they_return(written, table, tmp_path, quick):
    run = open_run(written[0])
    figure, gap = figures.gap_over_training(run)
    np.testing.assert_array_equal(figure.axes[0].containers[0].lines[0].get_ydata(), table["gn_gap"])
    np.testing.assert_array_equal(gap["cosine"], table["cosine"])
    figure, blocks = figures.block_gap_over_training(run)
    image = np.ma.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(image, table["block_gn_gap"].values.T)
    figure, density = figures.density(run)
    line = figure.axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(np.nan_to_num(line), density["density"].sel(matrix="hessian"), atol=1e-8)
    assert np.trapezoid(density["density"].sel(matrix="hessian"), density["eigenvalue"]) == pytest.approx(
        1, abs=1e-8
    )
    figure, ends = figures.extremes_over_training(run)
    np.testing.assert_array_equal(
        figure.axes[0].containers[-1].lines[0].get_ydata(), table["lambda_min"].sel(matrix="hessian")
    )
    figure, ratio = figures.curvature_along_directions(run)
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), ratio.sel(direction="update"))
    figure, errors = figures.model_errors(run)
    assert len(figure.axes) == 2 and int(errors["step"]) == 30
    np.testing.assert_array_equal(
        figure.axes[1].containers[0].lines[0].get_ydata(),
        table["linearisation"].sel(step=30, ladder_direction="gauss_newton_step"),
    )
    assert len(save_drawings(figures.discrepancy_drawings(run), tmp_path).written) == 12


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
    asked = ask([load_run(one), load_run(other)], labels([one, other]))
    apart = next(each for each in differences(asked) if each.name == "gn_gap")
    gaps = [float(stored["gn_gap"].sel(step=12)) for stored in tables]
    assert apart.value == pytest.approx(abs(gaps[0] - gaps[1])) and apart.steps == (12,)
    assert apart.stderr == pytest.approx(0.05 * np.hypot(*gaps))
    text = write_runs_report([bare, bare], tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "hessprobe train --probe gn_hessian records it" in unescape(text)
