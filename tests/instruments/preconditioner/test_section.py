"""The section on preconditioners says what the store holds, in the page, in figures, in words; what is missing is said."""

from __future__ import annotations

import json
import re
import runpy
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from hessprobe.analysis import open_run, preconditioner_rows
from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.efficiency_pictures import efficiency_over_training
from hessprobe.instruments.preconditioner.findings import findings
from hessprobe.instruments.preconditioner.pictures import pictures
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.pictures import matplotlib_pen
from hessprobe.pictures.picture import Picture
from hessprobe.reading.labelled import Labelled
from hessprobe.report.asking import ask
from hessprobe.report.differences import differences
from hessprobe.report.figure_set import save_figures
from hessprobe.report.page import write_report
from hessprobe.report.several_runs import write_runs_report
from hessprobe.report.terminal import show
from tests.instruments.preconditioner.runs import write_preconditioner_run
from tests.pictures.drawn import grid_on_paper, lines_on_paper
from tests.report.odd_text import HOSTILE
from tests.report.page_reading import finding, numbers, script_json
from tests.report.runs import write_run

SCRIPT = Path(__file__).parents[3] / "analyses" / "preconditioner_quality.py"
ON_BOTH = {
    "layerwise_over_full", "preconditioner_scoreboard", "over_layerwise", "block_efficiency", "block_step_sizes",
    "block_step_gains",
}  # fmt: skip
ON_PAGE = ON_BOTH | {"layerwise_over_full_steps", "efficiency_own", "efficiency_held_out"}
ON_PAPER = ON_BOTH | {"efficiency_over_training"}


def drawn(*folders: Path) -> dict[str, Picture]:
    """Returns the pictures of runs by name."""
    tables = [open_run(folder)["preconditioner"].to_dataset() for folder in folders]
    answers = [PreconditionerAnswers(table) for table in tables]
    runs = [Labelled(label=f.name, answers=a, compared=a) for f, a in zip(folders, answers, strict=True)]
    return {picture.name: picture for picture in pictures(runs)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run with three sound rows out of four, in which one candidate always raised."""
    folder = tmp_path_factory.mktemp("runs") / "quality"
    return write_preconditioner_run(
        folder, failing={"sophia": f"ValueError: {HOSTILE}"}, failed={20: "out of memory"}
    )


@pytest.fixture(scope="module")
def rows(measured: Path) -> xr.Dataset:
    table = open_run(measured)["preconditioner"].to_dataset()
    assert preconditioner_rows(table) is not None
    return table.sel(step=[0, 10, 30]).load()


@pytest.fixture(scope="module")
def text(measured: Path) -> str:
    return write_report(measured).read_text(encoding="utf-8")


def grid(text: str, chart: str) -> tuple[list[str], list[str], np.ndarray]:
    """Returns a heatmap's columns, rows and numbers."""
    trace = script_json(text, "chart-data")[chart]["data"][0]
    return trace["x"], trace["y"], numbers(trace["z"]).reshape(len(trace["y"]), len(trace["x"]))


def decreases_of(rows: xr.Dataset, candidate: str, damping: float, size: int) -> np.ndarray:
    """Returns held-out decreases (t, d) along the best step from the stored parts."""
    at = rows.sel(candidate=candidate, damping=damping, curvature_sequences=size)
    bend = at["curvature_held_out"].sum("fold") + damping * at["norm2"]
    return (at["slope_held_out"].sum("fold") ** 2 / (2 * bend)).values


def test_the_headline_series_is_that_of_the_stored_parts(text, rows):
    traces = script_json(text, "chart-data")["layerwise_over_full"]["data"]
    lines = {trace["name"]: trace for trace in traces if "name" in trace}
    for damping in (0.1, 0.01):
        expected = [
            np.exp(
                np.log(
                    decreases_of(rows, "layerwise_gn", damping, size)
                    / decreases_of(rows, "full_gn", damping, size)
                ).mean()
            )
            for size in (4, 16, 64)
        ]
        np.testing.assert_allclose(numbers(lines[f"μ {damping:g}, held out"]["y"]), expected, rtol=1e-10)
        at = rows.sel(damping=damping)
        own = [
            np.exp(np.log(at["efficiency"].sel(candidate="layerwise_gn", curvature_sequences=size)).mean())
            for size in (4, 16, 64)
        ]  # of full's, which is 1 on its own batch
        np.testing.assert_allclose(numbers(lines[f"μ {damping:g}, own batch"]["y"]), own, rtol=1e-8)
    value, stderr, sentence = finding(text, "layerwise_over_full")
    assert value == pytest.approx(numbers(lines["μ 0.1, held out"]["y"])[-1], rel=1e-12) and stderr
    assert f"{value:.3f} ± {stderr:.3f}" in sentence
    over = script_json(text, "chart-data")["layerwise_over_full_steps"]["data"][0]
    ratio = decreases_of(rows, "layerwise_gn", 0.1, 64) / decreases_of(rows, "full_gn", 0.1, 64)
    np.testing.assert_array_equal(numbers(over["x"]), [0, 10, 30])
    np.testing.assert_allclose(numbers(over["y"]), np.exp(np.log(ratio).mean(1)), rtol=1e-10)


def test_the_scoreboard_and_efficiencies_are_those_stored(text, rows):
    kept = ["efficiency", "efficiency_held_out", "best_alpha", "cosine"]
    at = rows[kept].sel(damping=0.1, curvature_sequences=64).mean("draw")
    columns, names, shown = grid(text, "efficiency_held_out")
    assert columns == ["0", "10", "30"] and set(names) == set(rows["candidate"].values)
    np.testing.assert_allclose(shown, at["efficiency_held_out"].sel(candidate=names).T, rtol=1e-10)
    np.testing.assert_allclose(grid(text, "efficiency_own")[2], at["efficiency"].sel(candidate=names).T)
    last = at["efficiency_held_out"].sel(step=30)
    assert names[:-1] == list(last.dropna("candidate").sortby(-last.dropna("candidate"))["candidate"].values)
    assert names[-1] == "sophia"  # not judged
    board = script_json(text, "chart-data")["preconditioner_scoreboard"]["data"]
    for trace, name in zip(board, ("efficiency", "efficiency_held_out"), strict=True):
        np.testing.assert_allclose(
            numbers(trace["x"]), at[name].sel(step=30, candidate=trace["y"]), rtol=1e-10
        )
    cells = re.findall(r"<td>(.*?)</td>", re.findall(r'<table id="board">.*?</table>', text, re.DOTALL)[0])
    muon = cells[cells.index("muon") :][:8]
    assert muon[4:6] == [
        f"{float(at[n].sel(step=30, candidate='muon')):.3g}" for n in ("best_alpha", "cosine")
    ]
    assert cells[cells.index("full_gn") + 2] == "100.0 %"  # by definition, without an error
    assert cells[cells.index("sophia (not judged)") :][:8] == ["sophia (not judged)", *["–"] * 7]


def test_ratios_and_blocks_are_those_of_the_stored_numbers(text, rows):
    columns, names, shown = grid(text, "over_layerwise")
    assert columns[:3] == ["4 · μ 0.1", "16 · μ 0.1", "64 · μ 0.1"] and "layerwise_gn" not in names
    ratio = decreases_of(rows, "muon", 0.01, 16) / decreases_of(rows, "layerwise_gn", 0.01, 16)
    expected = np.log2(np.exp(np.log(ratio).mean()))
    assert shown[names.index("muon"), columns.index("16 · μ 0.01")] == pytest.approx(expected, rel=1e-8)
    blocks, names, shown = grid(text, "block_efficiency")
    assert blocks == list(rows["block"].values)
    np.testing.assert_allclose(shown, rows["block_efficiency"].sel(step=30, candidate=names), rtol=1e-12)
    blocks, names, shown = grid(text, "block_step_sizes")
    at = rows.sel(step=30, candidate="update")
    S = at["block_curvature_held_out"].sum("fold").values + 0.1 * np.diag(at["block_norm2"])
    slope = at["block_slope_held_out"].sum("fold").values
    rates = np.linalg.solve(S, slope) / (slope.sum() / S.sum())
    colours = np.where(rates > 0, np.log2(np.maximum(rates, 1e-9)), -2.0).clip(-2, 2)
    np.testing.assert_allclose(shown[names.index("update")], colours, rtol=1e-8)
    assert set(script_json(text, "chart-data")) >= ON_PAGE


def test_failures_are_listed_and_nothing_is_injected(text):
    plain = unescape(text)
    assert (
        "1 candidate could not be judged" in plain
        and f"sophia: ValueError: {HOSTILE} (steps 0, 10, 30)" in plain
    )
    assert "step 20: out of memory" in plain
    assert "<b>x</b>" not in text and "window.pwned=1</script>" not in text


def test_hostile_names_stay_text(tmp_path):
    recipe = PreconditionerRecipe(
        curvature_sequences=(4,), held_out_sequences=4, folds=2, dampings=(0.1,),
        candidates=("gradient", "layerwise_gn", "full_gn"), groupings={"<b>x</b>": (("embedding",),)},
    )  # fmt: skip
    blocks = [f"{HOSTILE}{i}" for i in range(3)]
    folder = write_preconditioner_run(
        tmp_path / "run", recipe=recipe, blocks=blocks, steps=(0,), name=HOSTILE
    )
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<b>x</b>" not in text and "<img" not in text
    assert "<" not in "".join(grid(text, "block_efficiency")[1])
    write_runs_report([folder, folder], tmp_path / "both.html")
    assert "<b>x</b>" not in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_a_missing_table_says_which_flag_records_it(tmp_path):
    text = write_report(write_run(tmp_path / "run", steps=None, train_steps=1)).read_text(encoding="utf-8")
    assert "hessprobe train --probe preconditioner records it" in unescape(text)


SMALL = PreconditionerRecipe(
    curvature_sequences=(4,),
    held_out_sequences=4,
    folds=4,
    dampings=(0.1,),
    candidates=("gradient", "full_gn"),
)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"steps": (0,), "failed": {0: "no memory"}}, "could be measured (step 0: no memory)"),
        ({"steps": (0, 5), "blank": (0, 5)}, "holds a number yet"),
        ({"steps": ()}, "holds no recorded row yet"),
        ({"steps": (0,)}, "holds no layerwise_gn beside full_gn"),
        ({"steps": (0, 5), "blank": (5,)}, "Efficiency at step 0"),
        ({"steps": (0,), "failing": {"gradient": "a", "full_gn": "b"}}, "holds a number yet"),
        ({"steps": (0,), "failing": {"full_gn": "b"}}, "full_gn: b (step 0)"),
        ({"steps": (0,), "recipe": SMALL.model_copy(update={"held_out_sequences": 1})}, "1 held-out"),
        ({"steps": (0,), "blocks": ("all",)}, "Layer by layer"),
    ],
)
def test_empty_and_odd_tables_give_a_page(tmp_path, arguments, said):
    folder = write_preconditioner_run(tmp_path / "run", **{"recipe": SMALL, "train_steps": 1} | arguments)
    text = unescape(write_report(folder).read_text(encoding="utf-8"))
    assert said in text and "How to read this page" in text
    read = re.sub(r"<(script|style).*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|infinity)\b", read, re.IGNORECASE)
    json.loads((folder / "findings.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "arguments", [{"blank": (0, 5)}, {"failing": {"full_gn": "b"}}, {"blocks": ("all",)}]
)
def test_odd_tables_give_a_terminal_and_figures_or_a_reason(tmp_path, arguments):
    folder = write_preconditioner_run(
        tmp_path / "run", **{"recipe": SMALL, "train_steps": 1, "steps": (0, 5)} | arguments
    )
    out = StringIO()
    show(folder, Console(file=out, width=120), ["preconditioner"])
    assert ("no row holds a number" in out.getvalue()) == ("blank" in arguments)
    left_out = 0
    for picture in drawn(folder).values():
        try:
            matplotlib_pen.draw(picture)
        except UserError as error:
            left_out += "table 'preconditioner'" in str(error)
    assert left_out >= 2


def test_paper_shows_what_pictures_hold(measured, rows):
    found = drawn(measured)
    assert {name for name, picture in found.items() if picture.where != "page"} == ON_PAPER
    pays: Any = found["layerwise_over_full"].data
    lines = lines_on_paper(matplotlib_pen.draw(found["layerwise_over_full"]))
    ends = [line["y"] for line in lines if line["y"].size == 3]
    for i in range(2):  # held out, then own batch, for each damping
        np.testing.assert_array_equal(ends[2 * i], pays["ratio"][i])
        np.testing.assert_array_equal(ends[2 * i + 1], pays["own_ratio"][i])
    board: Any = found["preconditioner_scoreboard"].data
    at = rows["efficiency_held_out"].sel(step=30, damping=0.1, curvature_sequences=64).mean("draw")
    figure = matplotlib_pen.draw(found["preconditioner_scoreboard"])
    np.testing.assert_allclose(lines_on_paper(figure)[1]["x"], at.sel(candidate=board["candidate"]))
    ratios: Any = found["over_layerwise"].data
    first = grid_on_paper(matplotlib_pen.draw(found["over_layerwise"]))[:, :3]
    np.testing.assert_allclose(first, np.log2(ratios["ratio"].sel(damping=0.1)), rtol=1e-12)
    over: Any = found["efficiency_over_training"].data
    assert "update" in over["candidate"].values and over.sizes["candidate"] <= 8
    line = lines_on_paper(matplotlib_pen.draw(found["efficiency_over_training"]))[0]
    np.testing.assert_allclose(line["y"], over["held_out"].isel(candidate=0))
    losses: Any = found["block_efficiency"].data
    shown = grid_on_paper(matplotlib_pen.draw(found["block_efficiency"]))
    np.testing.assert_allclose(shown, 100 * losses["efficiency"])
    steps: Any = found["block_step_gains"].data
    gain = steps["gain"].sel(found="other sequences", known="together")
    np.testing.assert_array_equal(
        lines_on_paper(matplotlib_pen.draw(found["block_step_gains"]))[0]["x"], gain
    )
    assert np.isfinite(grid_on_paper(matplotlib_pen.draw(found["block_step_sizes"]))).any()


def test_chosen_candidates_alone_are_drawn_over_training(measured):
    answers = PreconditionerAnswers(open_run(measured)["preconditioner"].to_dataset())
    run = Labelled(label="", answers=answers, compared=answers)
    picture: Any = efficiency_over_training([run], ["muon", "gradient"])
    assert [line.label for line in picture.lines] == ["muon", "gradient"]


@pytest.fixture
def quick(monkeypatch):
    """Writing PDF takes half a second a figure; where files are counted, their names are enough."""

    def touched(figure, folder: Path, name: str) -> list[Path]:
        assert figure.axes
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.pdf").touch()
        return [folder / f"{name}.pdf"]

    monkeypatch.setattr("hessprobe.pictures.matplotlib_pen.save", touched)


def test_all_figures_are_written_and_a_run_without_the_table_has_none(measured, tmp_path, quick):
    names = {path.stem for path in save_figures(open_run(measured), tmp_path / "all").written}
    assert names >= ON_PAPER
    bare = open_run(write_run(tmp_path / "bare", steps=None, train_steps=2))
    assert not {path.stem for path in save_figures(bare, tmp_path / "some").written} & ON_PAPER
    alone = write_preconditioner_run(tmp_path / "alone", recipe=SMALL, steps=(0,), train_steps=1)
    left_out = save_figures(open_run(alone), tmp_path / "alone").left_out
    assert set(left_out) & ON_PAPER == {"layerwise_over_full", "over_layerwise"}


def test_the_script_prints_findings_the_series_and_its_files(measured, tmp_path, quick, capsys):
    script = runpy.run_path(str(SCRIPT))
    assert script["main"]([str(measured), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "curvature between layers" in said and "wrote" in said
    assert re.search(
        r"damping 0.1, layerwise over full by curvature sequences  4: 1\.\d+ ± 0\.\d+  16:", said
    )
    bare = write_run(tmp_path / "bare", steps=None, train_steps=1)
    assert script["main"]([str(bare), "--out", str(tmp_path)]) == 2
    assert "no table 'preconditioner'" in capsys.readouterr().err


def test_the_terminal_shows_the_scoreboard(measured, rows):
    out = StringIO()
    show(measured, Console(file=out, width=140), ["preconditioner"])
    text = out.getvalue()
    value = float(
        rows["efficiency"].sel(step=30, damping=0.1, curvature_sequences=64, candidate="muon").mean()
    )
    assert f"{100 * value:.1f} ± " in text and "layerwise over full, held out, damping 0.01" in text
    assert "sophia failed: ValueError" in text and "[" not in text.split("sophia failed")[0]


def test_several_runs_stand_side_by_side(measured, tmp_path):
    other = write_preconditioner_run(tmp_path / "other", steps=(0, 10), seed=4, train_steps=2)
    bare = write_run(tmp_path / "bare", steps=None, train_steps=2)
    text = write_runs_report([measured, other, bare], tmp_path / "page.html").read_text(encoding="utf-8")
    charts = script_json(text, "chart-data")
    for name in ("layerwise_over_full", "layerwise_over_full_steps", "update_efficiency", "over_layerwise"):
        assert [trace["name"] for trace in charts[name]["data"]] == ["quality", "other"]
    assert "bare: This run holds no table 'preconditioner'" in unescape(text)
    value, _, sentence = finding(text, "layerwise_over_full")
    stated = [
        findings(PreconditionerAnswers(open_run(run)["preconditioner"].to_dataset()))[0]
        for run in (measured, other)
    ]
    assert value == pytest.approx(abs(stated[0].value - stated[1].value))
    assert "Over their measured steps, the held-out decrease of layerwise over full" in sentence
    # Other dampings, other numbers: such runs are not compared.
    recipe = PreconditionerRecipe(curvature_sequences=(4,), held_out_sequences=8, folds=4, dampings=(1.0,))
    apart = write_preconditioner_run(tmp_path / "apart", recipe=recipe, steps=(0,), train_steps=1)
    asked = ask([open_run(measured), open_run(apart)], ["measured", "apart"])
    assert "layerwise_over_full" not in {each.name for each in differences(asked)}
