"""The section on Gauss-Newton against Hessian: stored numbers in charts, tables, figures and terminal; odd tables a page."""

from __future__ import annotations

import json
import re
from html import unescape
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from rich.console import Console

from hessprobe.analysis import open_run
from hessprobe.instruments.gn_hessian.pictures import pictures
from hessprobe.instruments.gn_hessian.section import content
from hessprobe.pictures.plotly_pen import charts
from hessprobe.report.figure_set import save_figures
from hessprobe.report.page import write_report
from hessprobe.report.terminal import show
from tests.instruments.gn_hessian.runs import ALPHAS, STEPS, Truth, add_gn_hessian, alone, write_gn_run
from tests.report.odd_text import HOSTILE
from tests.report.page_reading import finding, lines, numbers, script_json
from tests.report.runs import LAYERS, write_run

SCRIPT = Path(__file__).parents[3] / "analyses" / "gauss_newton_versus_hessian.py"
SOUND = [step for step in STEPS if step not in (12, 18)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Truth]]:
    """A run of six probed steps, of which step 12 failed and 18 holds no number, with densities of a block."""
    folder = tmp_path_factory.mktemp("gn") / "nano"
    return write_gn_run(folder, failed={12: "out of memory"}, blank=[18], density_blocks=["head"])


@pytest.fixture(scope="module")
def text(written) -> str:
    return write_report(written[0]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table(written) -> xr.Dataset:
    return open_run(written[0])["gn_hessian"].to_dataset().sel(step=SOUND).load()


def dense(packed) -> np.ndarray:
    if isinstance(packed, dict):
        return numbers(packed).reshape([int(n) for n in packed.get("shape", str(-1)).split(",")])
    return np.array(packed, dtype=float)


def section(text: str) -> str:
    return re.findall(r'<section id="gn_hessian">.*?</section>', text, re.DOTALL)[0]


def test_lines_over_training_are_those_stored(text, table):
    charts = script_json(text, "chart-data")
    for chart, name in (("gn_gap", "gn_gap"), ("gn_cosine", "cosine")):
        line = charts[chart]["data"][0]
        np.testing.assert_array_equal(numbers(line["x"]), SOUND)
        np.testing.assert_array_equal(numbers(line["y"]), table[name])
        np.testing.assert_array_equal(numbers(line["error_y"]["array"]), table[f"{name}_stderr"])
    blocks = charts["gn_block_gap"]["data"][0]
    np.testing.assert_array_equal(dense(blocks["z"]), table["block_gn_gap"].values.T)
    np.testing.assert_array_equal(dense(blocks["customdata"]), table["block_gn_gap_stderr"].values.T)
    assert blocks["y"] == list(LAYERS)
    for label, matrix in (("G", "gauss_newton"), ("H", "hessian"), ("H − G", "residual")):
        line = lines(text, "gn_trace")[label]
        np.testing.assert_array_equal(numbers(line["y"]), table["trace"].sel(matrix=matrix))
    for end, variable in (("largest", "lambda_max"), ("smallest", "lambda_min")):
        line = lines(text, "gn_extremes")[f"H, {end}"]
        np.testing.assert_array_equal(numbers(line["y"]), table[variable].sel(matrix="hessian"))
        np.testing.assert_array_equal(
            numbers(line["error_y"]["array"]), table[f"{variable}_residual"].sel(matrix="hessian")
        )
    curvature = table["direction_curvature"]
    line = lines(text, "gn_directions")["update"]
    ratio = curvature.sel(matrix="hessian", direction="update") / curvature.sel(
        matrix="gauss_newton", direction="update"
    )
    np.testing.assert_allclose(numbers(line["y"]), ratio, rtol=1e-12)
    value, weight = (table[n].sel(matrix="hessian").values for n in ("ritz_value", "ritz_weight"))
    size = np.abs(value) * weight
    share = (size * (value < 0)).sum((1, 2)) / size.sum((1, 2))
    np.testing.assert_allclose(numbers(charts["gn_negative"]["data"][0]["y"]), share)


def test_drawn_densities_integrate_to_one(text):
    charts = script_json(text, "chart-data")
    assert set(lines(text, "gn_density")) == {"G", "H", "H − G"}
    assert set(lines(text, "gn_density_training")) == {f"step {step}" for step in SOUND}
    for chart in ("gn_density", "gn_density_training", "gn_density-0"):
        for line in charts[chart]["data"]:
            if "name" in line:
                y = np.nan_to_num(numbers([np.nan if v is None else v for v in dense(line["y"])]))
                assert np.trapezoid(y, dense(line["x"])) == pytest.approx(1, abs=1e-6)


def test_the_ladder_is_the_last_rows(text, table):
    for direction in ("update", "gauss_newton_step"):
        row = table.sel(step=30, ladder_direction=direction)
        drawn = lines(text, f"gn_models-{direction}")
        names = {
            "loss": "loss",
            "linearised network": "prox_linear",
            "G's quadratic": "gauss_newton",
            "H's quadratic": "hessian",
        }
        for label, model in names.items():
            np.testing.assert_array_equal(numbers(drawn[label]["x"]), ALPHAS)
            np.testing.assert_array_equal(numbers(drawn[label]["y"]), row["change"].sel(model=model))
        drawn, later = lines(text, f"gn_errors-{direction}"), lines(text, f"gn_errors_training-{direction}")
        for label, name in (("linearising", "linearisation"), ("higher orders", "beyond_second_order")):
            np.testing.assert_array_equal(numbers(drawn[label]["y"]), row[name])
            np.testing.assert_array_equal(numbers(drawn[label]["error_y"]["array"]), row[f"{name}_stderr"])
            at = table.sel(ladder_direction=direction, alpha=1.0)
            promised = abs(at["change"].sel(model="gauss_newton"))
            np.testing.assert_allclose(numbers(later[label]["y"]), at[name] / promised)


def test_tables_and_findings_state_the_stored_numbers(text, table, written):
    cells = re.findall(r'<table id="directions-table">.*?</table>', section(text), re.DOTALL)[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", cells)[1:]]
    last = table.sel(step=30)
    curvature = last["direction_curvature"]
    for cell, name in zip(rows, table["direction"].values, strict=True):
        of_g, of_h = (float(curvature.sel(matrix=m, direction=name)) for m in ("gauss_newton", "hessian"))
        values = (float(last["direction_norm"].sel(direction=name)), of_g, of_h, of_h / of_g)
        assert cell[1:] == [f"{value:.3g}".replace("-", "−", 1) for value in values]
    cells = re.findall(r'<table id="ladder-table">.*?</table>', section(text), re.DOTALL)[0]
    assert "60.0 ± 2.4 %" in cells and "−0.0300 ± 0.0015" in cells and "0.0200 ± 0.0010" in cells
    value, stderr, sentence = finding(text, "gn_gap")
    assert (value, stderr) == (float(last["gn_gap"]), float(last["gn_gap_stderr"])) and "step 30" in sentence
    said = unescape(section(text))
    r = written[1][30].matrices[2]
    shares = np.array([(r[4 * b : 4 * b + 4, 4 * b : 4 * b + 4] ** 2).sum() for b in range(6)])
    assert f"At the last row {LAYERS[shares.argmax()]} holds" in said
    assert f"{100 * shares.max() / shares.sum():.2f} ±" in said
    assert "solved to a residual of 0.009 in 15 iterations" in re.sub(r"\s+", " ", said)
    assert "1 row failed" in said and "step 12: out of memory" in said and "4 measured rows" in said
    assert json.loads((written[0] / "findings.json").read_text(encoding="utf-8"))["findings"]


def test_a_missing_table_says_which_flag_records_it(tmp_path):
    said = unescape(write_report(write_run(tmp_path / "run", steps=None)).read_text(encoding="utf-8"))
    assert "This run holds no table 'gn_hessian'. hessprobe train --probe gn_hessian records it" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": [3], "probes": 1}, "1 measured row;"),
        ({"steps": [0, 6], "blank": [0, 6]}, "No row of the table 'gn_hessian' holds a number yet"),
        ({"steps": [0], "failed": {0: "no memory"}}, "could be measured (step 0: no memory)"),
        ({"steps": []}, "holds no recorded row yet"),
        ({"steps": [0, 6], "blocks": ["all"]}, "2 measured rows"),
        (
            {"steps": [0], "changes": dict.fromkeys(("gn_gap", "sequences", "tokens"), np.nan)},
            "basis not recorded",
        ),
    ],
)
def test_few_and_odd_rows_give_a_page_a_show_and_figures(tmp_path, options, said, quick):
    folder, _ = write_gn_run(tmp_path / "run", train_steps=2, **options)
    assert said in unescape(check_page(folder))
    show(folder, Console(file=StringIO(), width=80))
    save_figures(open_run(folder), tmp_path / "figures", training=False)


def check_page(folder: Path) -> str:
    text = write_report(folder).read_text(encoding="utf-8")
    read = re.sub(r"<(script|style).*?</\1>|<[^>]*>", "", unescape(text), flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|infinity|None)\b", read)
    json.loads((folder / "findings.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    return text


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    folder = tmp_path_factory.mktemp("gn") / "small"
    write_gn_run(
        folder, train_steps=2, steps=(0, 6, 12), blocks=["embedding", "head"], density_blocks=["head"]
    )
    return open_run(folder)["gn_hessian"].to_dataset().load()


@pytest.mark.parametrize(
    "starts", ["gn_gap cosine fro2 block_ trace", "lambda ritz", "direction gauss change linear"]
)
def test_any_variables_may_be_missing_nan_or_infinite(small, starts):
    names = [str(n) for n in small.data_vars if str(n).startswith(tuple(starts.split()))]
    assert len(names) > 2
    lost = small.assign(
        {n: small[n].where(small["step"] < 12, np.inf).where(small["step"] > 0) for n in names}
    )
    for changed in (small.drop_vars(names), lost):
        assert content(alone(changed)) and charts(pictures(alone(changed)))


def test_an_update_that_is_not_known_leaves_its_own_entries_out(small):
    table = small.copy(deep=True)
    for name in ("change", "linearisation", "beyond_second_order"):
        table[name].loc[{"ladder_direction": "update"}] = np.nan
    table["direction_curvature"].loc[{"direction": "update"}] = np.nan
    drawn = charts(pictures(alone(table)))
    assert "gn_models-update" not in drawn and "gn_models-gauss_newton_step" in drawn
    assert [row["key"] for row in content(alone(table))["ladder"]] == ["gauss_newton_step"]


def test_block_names_cannot_inject_markup(tmp_path):
    blocks = [f"{HOSTILE}{i}" for i in range(2)]
    folder, _ = write_gn_run(
        tmp_path / "run", train_steps=2, steps=(0,), blocks=blocks, density_blocks=blocks
    )
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<img" not in text and "<b>" not in text and "window.pwned=1</script>" not in text
    assert "<" not in script_json(text, "chart-data")["gn_block_gap"]["data"][0]["y"][0]
    show(folder, Console(file=StringIO(), width=100))


def test_a_thousand_rows_of_fourteen_blocks_stay_small(tmp_path):
    folder, _ = write_gn_run(
        tmp_path / "run", train_steps=2, steps=(0, 6), blocks=[f"block.{i}" for i in range(14)]
    )
    table = open_run(folder)["gn_hessian"].to_dataset().load()
    long = table.isel(step=np.arange(1000) % 2).assign_coords(step=np.arange(1000))
    assert content(alone(long))["measured"] == 1000
    assert sum(len(chart.to_json()) for chart in charts(pictures(alone(long))).values()) < 2e6


def test_the_section_stands_between_coupling_and_training(tmp_path):
    folder = write_run(tmp_path / "run", steps=(0, 5), train_steps=6)
    add_gn_hessian(folder, steps=(0, 5))
    text = write_report(folder).read_text(encoding="utf-8")
    found = re.findall(r'<section id="(\w+)">', text)
    assert found.index("cross_layer") < found.index("gn_hessian") < found.index("training")
    assert "gn_hessian" in re.findall(r'<section id="costs">.*?</section>', text, re.DOTALL)[0]
