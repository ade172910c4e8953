"""Pictures hold what is stored, and both pens draw them; figures are written as PDF with real text and as PNG."""

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
from hessprobe.instruments.cross_layer.answers import NO_ROWS, CrossLayerAnswers
from hessprobe.instruments.cross_layer.pictures import pictures
from hessprobe.pictures.matplotlib_pen import draw, save
from hessprobe.pictures.picture import Picture
from hessprobe.reading.labelled import Labelled
from hessprobe.report.figure_set import save_figures
from tests.pictures.drawn import lines_on_paper
from tests.report.runs import write_run

SCRIPT = Path(__file__).parents[3] / "analyses" / "cross_layer_importance.py"
TRAINING = {"loss", "loss_by_tokens", "loss_by_seconds", "step_size", "decrease"}


def drawn(log: xr.DataTree, step: int | None = None) -> dict[str, Picture]:
    """Returns a run's pictures by name."""
    table = log["cross_layer"].to_dataset() if "cross_layer" in log.children else NO_ROWS
    answers = CrossLayerAnswers(table)
    return {
        each.name: each
        for each in pictures([Labelled(label="", answers=answers, compared=answers, run=log)], step)
    }


def test_the_heatmap_draws_the_stored_row_with_the_diagonal_blank(log: xr.DataTree):
    picture = drawn(log, step=20)["coupling"]
    figure = draw(picture)
    image = np.ma.asarray(figure.axes[0].images[0].get_array())
    stored = log["cross_layer"].to_dataset().sel(step=20)
    off = ~np.eye(6, dtype=bool)
    assert np.ma.getmaskarray(image).diagonal().all() and figure.axes[0].get_title(loc="left") == "step 20"
    np.testing.assert_array_equal(np.asarray(image)[off], stored["coupling"].values[off])
    assert picture.data is not None
    np.testing.assert_array_equal(
        picture.data["coupling_stderr"].values[off], stored["coupling_stderr"].values[off]
    )
    assert drawn(log)["coupling"].at == "step 30"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(stored["block"].values)


def test_the_lines_are_what_is_stored(log: xr.DataTree):
    table, found = log["cross_layer"].to_dataset(), drawn(log)
    figure = draw(found["cross_share"])
    for line, direction in zip(lines_on_paper(figure), ("update", "negative_gradient"), strict=True):
        matrices = table["step_curvature"].sel(step=line["x"], direction=direction).values
        expected = [(matrix.sum() - np.trace(matrix)) / matrix.sum() for matrix in matrices]
        np.testing.assert_allclose(line["y"], expected, rtol=1e-12)
    (line,) = lines_on_paper(draw(found["off_block_energy"]))
    stored = table.sel(step=line["x"])
    np.testing.assert_allclose(line["y"], stored["off_block_energy"].values)
    np.testing.assert_allclose(line["stderr"], stored["off_block_energy_stderr"].values)
    pairs, means = lines_on_paper(draw(found["coupling_by_distance"]))
    row = table.sel(step=30)["coupling"].values
    np.testing.assert_allclose(means["y"], [np.diagonal(row, offset=d).mean() for d in range(1, 6)])
    np.testing.assert_allclose(np.sort(pairs["y"]), np.sort(row[np.triu_indices(6, k=1)]))


def test_saved_as_pdf_with_text_and_png_at_column_width(log: xr.DataTree, tmp_path):
    figure = draw(drawn(log)["off_block_energy"])
    paths = save(figure, tmp_path / "figures", "energy")
    assert [path.name for path in paths] == ["energy.pdf", "energy.png"]
    pdf = paths[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType embedded, not letters as drawings
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert figure.get_figwidth() == pytest.approx(3.35)


def test_what_cannot_be_drawn_is_said(log: xr.DataTree, tmp_path):
    with pytest.raises(UserError, match="step 7 was not measured; measured: 0, 5, 20, 25, 30"):
        drawn(log, step=7)
    bare = open_run(write_run(tmp_path / "bare", steps=None))
    blank = open_run(write_run(tmp_path / "blank", steps=[0], blank=[0]))
    for run in (bare, blank):
        for picture in drawn(run).values():
            with pytest.raises(UserError):
                draw(picture)
        with pytest.raises(UserError, match="holds a step_curvature; nothing to draw"):
            draw(drawn(run)["cross_share"])
    told = save_figures(bare, tmp_path / "figures", training=False).left_out
    assert (
        told["cross_layer"]
        == "this run holds no table 'cross_layer'; hessprobe train --probe cross_layer records it"
    )
    with pytest.raises(UserError, match="step 7 was not measured; measured: 0, 5, 20, 25, 30"):
        save_figures(log, tmp_path / "figures", step=7)


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
    run = open_run(write_run(tmp_path / "run", blocks=["$x_1", "$\\bad{", "head"]))
    save(draw(drawn(run)["coupling"]), tmp_path, "coupling")


def test_every_figure_a_run_can_give_is_drawn_and_the_others_say_why(sketched, tmp_path, quick):
    found = save_figures(open_run(sketched), tmp_path / "all")
    names = {path.stem for path in found.written}
    assert names >= {"jacobi_radius", "merge_gains", "grouping_curve", "importance", *TRAINING}
    assert not found.left_out.keys() & {"coupling", *names} and len(found.written) == 2 * len(names)
    bare = save_figures(open_run(write_run(tmp_path / "bare", steps=None)), tmp_path / "some")
    assert {path.stem for path in bare.written} == TRAINING
    assert bare.left_out.keys() == {"cross_layer", "gn_hessian", "preconditioner"}


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
    assert "no figure cross_layer: this run holds no table 'cross_layer'" in told.err
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
