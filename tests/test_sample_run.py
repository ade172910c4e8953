"""The run that ships in data/: small, whole, of the default recipe, and every reader of logs works on it as it lies."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import open_run
from hessprobe.cli import main
from hessprobe.reading.rows import failed_rows
from hessprobe.recipe import build_recipe, differences, read_recipe
from hessprobe.recipe.sections import PROBES
from hessprobe.report.page import write_report

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "data" / "sample_run"
# Left out of the repository, whoever makes the run anew or looks at its report.
IGNORED = ("checkpoint/", ".log.zarr.*", "report.html", "findings.json", "summary.md")


@pytest.fixture(scope="module")
def log() -> xr.DataTree:
    return open_run(SAMPLE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    page = write_report(SAMPLE, tmp_path_factory.mktemp("sample") / "report.html")
    return page.read_text(encoding="utf-8")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes no figure: they are drawn all the same, and test_figures sees that they come out whole."""
    kept: list[Path] = []

    def named(figure, folder: Path, name: str) -> list[Path]:
        kept.append(folder / f"{name}.pdf")
        return kept[-1:]

    monkeypatch.setattr("hessprobe.pictures.matplotlib_pen.save", named)


def test_it_is_small_and_a_fresh_one_leaves_nothing_else_behind():
    shipped = [SAMPLE / "recipe.toml", *(f for f in SAMPLE.glob("log.zarr/**/*") if f.is_file())]
    assert sum(file.stat().st_size for file in shipped) < 2e6
    assert len(shipped) < 500
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"data/sample_run/{name}" for name in IGNORED} <= set(ignored)


def test_it_is_the_default_recipes_run_with_every_probe(log):
    stored = build_recipe(json.loads(log.attrs["recipe"]))
    assert not differences(stored, build_recipe(read_recipe("nano"), [f"probes={list(PROBES)}"]))
    assert log["train"].sizes["step"] == stored.training.steps
    for name in PROBES:
        table = log[name].to_dataset()
        assert list(table["step"].values) == list(
            range(0, stored.training.steps, getattr(stored, name).every)
        )
        assert failed_rows(table) == {} and np.isfinite(table["loss"].values).all()


def test_it_says_where_it_comes_from_and_nothing_of_the_machine_but_its_kind(log):
    assert log.attrs["git_commit"] and json.loads(log.attrs["data"])["sha256"]
    home = re.compile(r"/(home|root|work|tmp|Users)/")
    assert not home.search(json.dumps({key: str(value) for key, value in log.attrs.items()}))
    assert not home.search((SAMPLE / "recipe.toml").read_text(encoding="utf-8"))


def test_every_section_of_its_report_shows(text):
    sections = re.findall(r'<section id="(\w+)">\s*<h2>.*?</h2>\s*(.{40})', text, re.DOTALL)
    assert {name for name, _ in sections} >= {
        "findings",
        *PROBES,
        "training",
        "costs",
        "provenance",
        "reading",
    }
    assert [name for name, first in sections if 'class="missing"' in first] == []


def test_plain_xarray_opens_it():
    for name in ("train", *PROBES):
        table = xr.open_zarr(SAMPLE / "log.zarr", group=name, consolidated=False)
        assert table["recorded"].values.all()


def test_the_readmes_examples_run_on_it(capsys):
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[
        0
    ]
    exec(compile(example.replace("runs/nano", str(SAMPLE)), "README.md", "exec"), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["show", str(SAMPLE)], ["report", str(SAMPLE), "--out", "page.html", "--figures", "f"]]
)
def test_the_commands_work_on_it(words, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hessprobe", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert not stop.value.code, said.err
    assert said.out and "Traceback" not in said.err


@pytest.mark.parametrize("script", sorted((ROOT / "analyses").glob("*.py")), ids=lambda path: path.stem)
def test_every_analysis_runs_on_it(script, quick, tmp_path, capsys):
    module = runpy.run_path(str(script))
    assert module["main"]([str(SAMPLE), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out
