"""Figures of a comparison draw the stored numbers, return what they drew, and are saved by the script."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from hessprobe.comparison.compared import Comparison, compare
from hessprobe.comparison.pictures import learning_rates, loss_against, save_figures, steps_to_target
from hessprobe.errors import UserError
from hessprobe.pictures import matplotlib_pen
from hessprobe.pictures.picture import Picture
from tests.comparison.study_runs import falling, write_losses, write_study

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "analyses" / "iteration_complexity.py"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("runs") / "study")


@pytest.fixture(scope="module")
def compared(study: Path) -> Comparison:
    return compare([study], 2.0)


def on_paper(picture: Picture) -> tuple[Figure, Any]:
    """Returns a picture as a figure, and the numbers it says it draws."""
    return matplotlib_pen.draw(picture), picture.data


@pytest.mark.parametrize(
    ("measure", "a_step"),
    [("steps", 1), ("tokens_with_line_search", 1.5 * 8 * 4 * 64), ("gradient_equivalents", 24)],
)
def test_loss_against_what_was_spent(compared, measure, a_step):
    figure, drawn = on_paper(loss_against(compared, measure))
    lines = [line for line in figure.axes[0].lines if len(np.asarray(line.get_xdata())) > 2]
    assert len(lines) == drawn.sizes["run"] == 15
    for line, run in zip(lines, drawn["run"].values, strict=True):
        one = drawn.sel(run=run).dropna("evaluation")
        np.testing.assert_array_equal(line.get_xdata(), one[measure])
        np.testing.assert_array_equal(line.get_ydata(), one["held_out_loss"])
    one = drawn.sel(run="layerwise-gn/learning_rate-0.02/seed-2").dropna("evaluation")
    np.testing.assert_allclose(one[measure], a_step * np.arange(1, 17))
    np.testing.assert_allclose(one["held_out_loss"], falling(16))
    target = figure.axes[0].lines[-1]
    assert set(np.asarray(target.get_ydata())) == {2.0}
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == [
        "full GN",
        "layerwise GN",
    ]


def test_bars_of_steps_with_the_range_over_seeds(compared):
    figure, drawn = on_paper(steps_to_target(compared))
    axes = figure.axes[0]
    bars: Any = axes.patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], [11, 43 / 3, 128 / 3, 43, 0])
    assert np.isnan(drawn["mean"].sel(measure="steps").values[-1])
    drawn_ends: Any = axes.collections
    ends = np.array([segment[:, 0] for bars in drawn_ends for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, [[10, 12], [13, 16], [39, 46], [40, 45]])
    assert [text.get_text() for text in axes.texts][-1] == "2 of 3 reached"


def test_steps_against_learning_rate(compared, tmp_path):
    figure, drawn = on_paper(learning_rates(compared))
    assert drawn["learning_rate"].values.tolist() == [0.01, 0.02, 0.04, 0.03, 0.1]
    np.testing.assert_allclose(drawn["mean"].sel(measure="steps"), [14, 11, 14, 128 / 3, 50])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [14, 11, 14])
    write_losses(tmp_path / "run", [3.0, 2.0])
    with pytest.raises(UserError, match="no method reached the target at two learning rates"):
        matplotlib_pen.draw(learning_rates(compare([tmp_path])))


def test_they_are_saved_as_pdf_with_text_and_png(tmp_path):
    write_losses(tmp_path / "runs" / "a", falling(3), method="$odd_{name")
    write_losses(tmp_path / "runs" / "b", [np.nan], method="diverged")
    written = save_figures(compare([tmp_path], 2.0), tmp_path / "figures")
    names = [f"loss_against_{m}" for m in ("steps", "tokens_with_line_search", "gradient_equivalents")]
    names.append("steps_to_target")  # one rate: no sweep to draw
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("pdf", "png")]
    assert b"/Type3" not in written[0].read_bytes() and written[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
def test_the_script_prints_the_findings_and_the_files_it_wrote(study, tmp_path):
    call = [sys.executable, str(SCRIPT), str(study), "--target", "2", "--out", str(tmp_path / "figures")]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert len(written) == 10 and all(name in done.stdout for name in written)
    assert "target 2 nats per token, as given" in done.stdout
    assert "layerwise GN needs 1.302 ± 0.025 times as many steps as full GN" in done.stdout


@pytest.mark.processes
def test_the_script_answers_a_mistake_with_one_line(tmp_path):
    call = [sys.executable, str(SCRIPT), str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no run at" in done.stderr
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 120


def test_the_studys_numbers_ship_with_the_package():
    """A wheel holds data/reference_study.csv where hessprobe.comparison.reference_study looks first."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    forced = build["targets"]["wheel"]["force-include"]
    assert forced["data/reference_study.csv"] == "hessprobe/data/reference_study.csv"
    assert (ROOT / "data" / "reference_study.csv").is_file()
