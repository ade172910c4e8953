"""Several runs on one page: stored numbers in each run's own colour, and a difference only where errors allow it."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import zarr

from hessprobe.analysis import open_run
from hessprobe.cli import main
from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.answers import coupling_difference
from hessprobe.reading.labelled import labels
from hessprobe.reading.load_run import load_run
from hessprobe.reading.trend import standard_errors_of_largest
from hessprobe.report.asking import Asked, ask
from hessprobe.report.differences import differences
from hessprobe.report.findings import findings_of
from hessprobe.report.several_runs import write_runs_report
from tests.report.odd_text import HOSTILE
from tests.report.page_reading import numbers, script_json
from tests.report.runs import LAYERS, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that measured steps 0, 10 and 20 both, and each some others; the second has no layer kernels."""
    folder = tmp_path_factory.mktemp("several")
    return [
        write_run(folder / "first", steps=(0, 5, 10, 20), seed=1, sketches=(24, 4)),
        write_run(folder / "second", steps=(0, 10, 20, 30), seed=2, train_steps=21, device="cuda"),
    ]


@pytest.fixture(scope="module")
def text(runs: list[Path]) -> str:
    path = write_runs_report(runs)
    assert path == runs[0].parent / "report.html"
    return path.read_text(encoding="utf-8")


def asked_of(runs: list[Path]) -> Asked:
    return ask([load_run(run) for run in runs], labels(runs))


def stored(runs: list[Path], name: str, table: str = "cross_layer", upto: int = 20) -> list:
    logs = [open_run(run)[table].to_dataset() for run in runs]
    return [log[name].sel(step=log["step"] <= upto).values for log in logs]


def test_every_line_is_what_is_stored_and_matrices_are_of_the_last_common_step(text, runs):
    charts = script_json(text, "chart-data")
    assert "compared at step 20" in text
    energy = charts["off_block_energy"]["data"]
    assert [line["name"] for line in energy] == ["first", "second"]
    assert (
        len({line["line"]["color"] for line in energy}) == 2
        and charts["off_block_energy"]["layout"]["showlegend"]
    )
    for line, values, errors in zip(
        energy,
        stored(runs, "off_block_energy", upto=99),
        stored(runs, "off_block_energy_stderr", upto=99),
        strict=True,
    ):
        np.testing.assert_array_equal(numbers(line["y"]), values)
        np.testing.assert_array_equal(numbers(line["error_y"]["array"]), errors)
    for i, matrix in enumerate(stored(runs, "coupling")):
        shown = np.array(
            [
                [np.nan if v is None else v for v in row]
                for row in dense(charts[f"coupling-{i}"]["data"][0]["z"])
            ]
        )
        off = ~np.eye(len(LAYERS), dtype=bool)
        np.testing.assert_allclose(shown[off], matrix[-1][off], rtol=1e-6)
    means = [[np.diagonal(m[-1], offset=d).mean() for d in range(1, 6)] for m in stored(runs, "coupling")]
    for line, expected in zip(charts["coupling_by_distance"]["data"], means, strict=True):
        np.testing.assert_allclose(numbers(line["y"]), expected)
    for line, values in zip(charts["loss"]["data"], stored(runs, "held_out_loss", "train", 99), strict=True):
        np.testing.assert_array_equal(numbers(line["y"]), values[np.isfinite(values)])
    # Kernels and jacobi_radius are the first run's alone; of the second the page says how to record them.
    assert [line["name"] for line in charts["grouping_curve"]["data"]] == ["first"]
    assert "second: this cross_layer table holds no layer kernels; record with --set" in text


def test_held_out_losses_lie_along_the_clocks_that_every_run_has(text, runs, tmp_path):
    clocks = script_json(text, "frame-data")["training"]
    assert set(clocks) == {"step", "tokens", "seconds", "gradient_equivalents"}
    tables = [open_run(run)["train"].to_dataset().dropna("step", subset=["held_out_loss"]) for run in runs]
    for clock, drawn in clocks.items():
        for x, table in zip(drawn["x"], tables, strict=True):
            np.testing.assert_array_equal(x, table[clock])
    untold = write_run(tmp_path / "untold", steps=None)
    group = zarr.open_group(untold / "log.zarr" / "train", mode="r+", use_consolidated=False)
    group["tokens"][5] = np.nan  # pyright: ignore
    page = write_runs_report([runs[0], untold], tmp_path / "page.html")
    clocks = script_json(page.read_text(encoding="utf-8"), "frame-data")
    assert set(clocks["training"]) == {"step", "seconds", "gradient_equivalents"}


def dense(packed) -> list:
    if isinstance(packed, dict):
        return numbers(packed).reshape([int(n) for n in packed["shape"].split(",")]).tolist()
    return packed


def test_the_finding_claims_a_difference_only_beyond_its_error(text, runs):
    found = re.findall(
        r'data-name="off_block_energy" value="(.*?)" data-stderr="(.*?)">(.*?)</data>', text, re.DOTALL
    )
    (value, stderr, sentence), values = found[0], [x[-1] for x in stored(runs, "off_block_energy")]
    errors = [x[-1] for x in stored(runs, "off_block_energy_stderr")]
    assert float(value) == pytest.approx(abs(values[0] - values[1])) and "At step 20" in sentence
    assert float(stderr) == pytest.approx(np.hypot(*errors))
    assert ("no two can be told apart" in sentence) == (float(value) <= 2 * float(stderr))
    kept = json.loads((runs[0].parent / "findings.json").read_text(encoding="utf-8"))["findings"]
    assert unescape(sentence) in [each["sentence"] for each in kept]


@pytest.mark.parametrize(("apart", "resolved"), [(0.3, True), (0.01, False)])
def test_two_runs_are_told_apart_or_not(runs, apart, resolved):
    asked = asked_of(runs)
    assert asked.step == 20
    one = next(f for f in findings_of(asked) if f.name == "off_block_energy")
    found = [[replace(one, value=value, stderr=0.05)] for value in (0.2, 0.2 + apart)]
    finding = differences(asked, found)[0]
    assert finding.resolved is resolved and finding.value == pytest.approx(apart)
    assert ("second lies above first by 30.0 ± 7.1 percentage points" in finding.sentence) is resolved


def test_the_difference_of_couplings_is_blank_within_its_errors(runs):
    apart = coupling_difference(*(run.compared for run in asked_of(runs).runs["cross_layer"]))
    assert apart is not None
    (first, second), (e1, e2) = ([x[-1] for x in stored(runs, n)] for n in ("coupling", "coupling_stderr"))
    size, stderr = second - first, np.hypot(e1, e2)
    beyond = np.abs(size) > standard_errors_of_largest(15) * stderr
    np.testing.assert_array_equal(np.isfinite(apart["difference"]), beyond)
    np.testing.assert_allclose(apart["difference"].values[beyond], size[beyond])


def test_provenance_shows_what_differs_alone(text):
    section = re.findall(r'<section id="provenance">.*?</section>', text, re.DOTALL)[0]
    assert re.findall(r"<td>(.*?)</td>", section) == ["device", "cpu, 2 threads", "cuda"]


def test_runs_of_other_blocks_without_probes_or_of_one_name_stand_side_by_side_too(tmp_path, runs):
    other = write_run(tmp_path / "x" / "first", steps=(3,), blocks=["a", f"{HOSTILE}", "head"], train_steps=4)
    bare = write_run(tmp_path / "bare", steps=None, train_steps=4)
    assert labels([runs[0], other, bare]) == ["first (1)", "first (2)", "bare"]
    path = write_runs_report([runs[0], other, bare], tmp_path / "three.html")
    text = path.read_text(encoding="utf-8")
    assert "each at its last measured step" in text and "bare: This run holds no table" in text
    assert "coupling-difference" not in script_json(text, "chart-data") and "<img" not in text
    assert sorted(p.name for p in tmp_path.glob("three*")) == [
        "three.findings.json", "three.html", "three.summary.md"]  # fmt: skip
    text = write_runs_report([bare, bare], tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "--probe cross_layer records it" in unescape(text)
    with pytest.raises(UserError, match="no run at"):
        write_runs_report([runs[0], tmp_path / "none"])


def test_a_common_step_that_comes_too_early_is_not_taken(tmp_path):
    one = write_run(tmp_path / "one", steps=(0, 10, 20), train_steps=4)
    other = write_run(tmp_path / "other", steps=(0, 11, 21), train_steps=4)
    asked = asked_of([one, other])
    finding = differences(asked)[0]
    assert asked.step is None and "At their last measured steps" in finding.sentence
    assert finding.steps == (20, 21)


def test_the_command_takes_several_runs(runs, tmp_path, monkeypatch, capsys):
    words = ["hessprobe", "report", *map(str, runs), "--out", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code and capsys.readouterr().out == f"report   {tmp_path / 'page.html'}\n"
