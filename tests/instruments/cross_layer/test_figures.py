"""Figures draw what is stored, return what they drew, and are written as PDF with real text and as PNG."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import open_run
from hessprobe.cli import main
from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.figures import (
    coupling_by_distance,
    coupling_heatmap,
    cross_share_over_training,
    off_block_energy_over_training,
)
from hessprobe.pictures.paper import save
from hessprobe.report.figure_set import save_figures
from tests.report.runs import write_run

SCRIPT = Path(__file__).parents[3] / "analyses" / "cross_layer_importance.py"
TRAINING = {"loss", "loss_by_tokens", "loss_by_seconds", "step_size", "decrease"}


def test_the_heatmap_draws_the_row_it_returns_with_the_diagonal_blank(log: xr.DataTree):
    figure, drawn = coupling_heatmap(log, step=20)
    image = np.ma.asarray(figure.axes[0].images[0].get_array())
    stored = log["cross_layer"].to_dataset().sel(step=20)
    off = ~np.eye(6, dtype=bool)
    assert np.ma.getmaskarray(image).diagonal().all()
    np.testing.assert_array_equal(np.asarray(image)[off], stored["coupling"].values[off])
    np.testing.assert_array_equal(drawn["coupling_stderr"].values[off], stored["coupling_stderr"].values[off])
    assert int(coupling_heatmap(log)[1]["step"]) == 30
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(stored["block"].values)


def test_the_lines_are_the_data_returned(log: xr.DataTree):
    figure, shares = cross_share_over_training(log)
    for line, direction in zip(figure.axes[0].lines, ("update", "negative_gradient"), strict=False):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), 100 * shares.sel(direction=direction).values)
    matrix = log["cross_layer"].to_dataset()["step_curvature"].sel(step=30, direction="update").values
    expected = (matrix.sum() - np.trace(matrix)) / matrix.sum()
    assert float(shares.sel(step=30, direction="update")) == pytest.approx(expected, rel=1e-12)
    figure, energy = off_block_energy_over_training(log)
    stored = log["cross_layer"].to_dataset().sel(step=energy["step"].values)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), 100 * stored["off_block_energy"].values)
    figure, means = coupling_by_distance(log, step=20)
    row = log["cross_layer"].to_dataset().sel(step=20)["coupling"].values
    expected = [np.diagonal(row, offset=d).mean() for d in range(1, 6)]
    np.testing.assert_allclose(means["coupling"], expected)
    np.testing.assert_allclose(figure.axes[0].containers[0].lines[0].get_ydata(), expected)


def test_saved_as_pdf_with_text_and_png_at_column_width(log: xr.DataTree, tmp_path):
    figure, _ = off_block_energy_over_training(log)
    paths = save(figure, tmp_path / "figures", "energy")
    assert [path.name for path in paths] == ["energy.pdf", "energy.png"]
    pdf = paths[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType embedded, not letters as drawings
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert figure.get_figwidth() == pytest.approx(3.35)


def test_what_cannot_be_drawn_is_said(log: xr.DataTree, tmp_path):
    with pytest.raises(UserError, match="step 7 was not measured; measured: 0, 5, 20, 25, 30"):
        coupling_heatmap(log, step=7)
    bare = open_run(write_run(tmp_path / "bare", steps=None))
    with pytest.raises(UserError, match="no table 'cross_layer'"):
        coupling_heatmap(bare)
    blank = open_run(write_run(tmp_path / "blank", steps=[0], blank=[0]))
    with pytest.raises(UserError, match="nothing to draw"):
        cross_share_over_training(blank)


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
    run = open_run(write_run(tmp_path / "run", blocks=["$x_1", "$\\bad{", "head"]))
    save(coupling_heatmap(run)[0], tmp_path, "coupling")


def test_every_figure_a_run_can_give_is_drawn_and_the_others_say_why(sketched, tmp_path, quick):
    found = save_figures(open_run(sketched), tmp_path / "all")
    names = {path.stem for path in found.written}
    assert names >= {"jacobi_radius", "merge_gains", "grouping_curve", "importance", *TRAINING}
    assert not found.left_out.keys() & {"coupling", *names} and len(found.written) == 2 * len(names)
    bare = save_figures(open_run(write_run(tmp_path / "bare", steps=None)), tmp_path / "some")
    assert {path.stem for path in bare.written} == TRAINING
    assert len(bare.left_out) >= 8 and "--probe cross_layer" in bare.left_out["merge_gains"]


def test_the_command_writes_figures_and_says_which_are_missing(tmp_path, monkeypatch, capsys):
    run, folder = write_run(tmp_path / "run", steps=None), tmp_path / "figures"
    words = ["hessprobe", "report", str(run), "--figures"]
    monkeypatch.setattr(sys, "argv", [*words, str(folder)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == f"report   {run / 'report.html'}"
    assert sorted(line.split()[1] for line in told.out.splitlines()[1:]) == sorted(map(str, folder.iterdir()))
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{kind}" for name in TRAINING for kind in ("pdf", "png")
    }
    assert "no figure merge_gains: this run holds no table 'cross_layer'" in told.err
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "give another --figures DIR" in capsys.readouterr().err


def test_the_script_saves_figures_and_prints_findings_and_files(run: Path, tmp_path, quick, capsys):
    other = write_run(tmp_path / "other" / "nano", seed=1, train_steps=0)
    script = runpy.run_path(str(SCRIPT))
    assert script["main"]([str(run), str(other), "--out", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    drawn = ("coupling", "coupling_by_distance", "off_block_energy", "cross_share")
    names = [f"nano-{i}-{name}" for i in (0, 1) for name in drawn] + [f"nano-0-{name}" for name in TRAINING]
    assert written == sorted(f"{name}.{kind}" for name in names for kind in ("pdf", "png"))
    assert all(name in said for name in written) and "lies between layers" in said
    assert "no figure merge_gains: this cross_layer table holds no layer kernels" in said
    assert script["main"]([str(run), "--out", str(tmp_path), "--step", "7"]) == 2
    assert "step 7 was not measured" in capsys.readouterr().err


@pytest.mark.processes
def test_the_script_answers_a_mistake_with_one_line(tmp_path):
    call = [sys.executable, str(SCRIPT), str(tmp_path / "none"), "--out", str(tmp_path)]
    result = subprocess.run(call, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no run at" in result.stderr
