"""The README's command, on a small recipe: it trains, measures, reports, and says where everything is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr

from tests.training.runs import text_file, tiny

pytestmark = pytest.mark.processes


COMMAND = Path(sys.executable).with_name("hessprobe")


def hessprobe(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the installed command in a folder, with no terminal."""
    command = [str(COMMAND)] if COMMAND.exists() else [sys.executable, "-m", "hessprobe"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, cwd=folder, env=environment, timeout=240
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Returns the folder that `hessprobe train --probe cross_layer` ran in, and what it said."""
    folder = tmp_path_factory.mktemp("readme")
    small = [f"--set={setting}" for setting in tiny(text_file(folder))]
    return folder, hessprobe("train", "--probe", "cross_layer", "--steps", "4", *small, folder=folder)


def test_it_exits_with_0_and_the_last_lines_name_log_report_and_next_command(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    lines = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    assert lines == [
        ["log", "runs/nano/log.zarr"],
        ["report", "runs/nano/report.html"],
        ["next", "hessprobe show runs/nano"],
    ]
    assert (folder / "runs/nano/log.zarr").is_dir()
    assert (folder / "runs/nano/recipe.toml").is_file()
    assert (folder / "runs/nano/report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_progress_is_plain_lines_on_stderr_costs_first_then_one_a_step_and_one_a_probed_step(trained):
    _, done = trained
    assert "\x1b" not in done.stderr + done.stdout
    lines = done.stderr.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("step")] == [
        ["step", "0", "warm-up"],
        *(["step", str(step), "full_gn"] for step in (1, 2, 3)),
    ]
    assert [line.split()[1] for line in lines if "cross_layer: off-block energy" in line] == ["0", "2"]
    # Before the first step what measuring will cost.
    assert lines[0].split()[:2] == ["measuring", "cross_layer"]
    assert len(lines) == 7


def test_the_log_opens_in_plain_xarray_with_a_row_a_step_and_a_row_a_probed_step(trained):
    folder, _ = trained
    for table, rows in (("train", [0, 1, 2, 3]), ("cross_layer", [0, 2])):
        opened = xr.open_zarr(folder / "runs/nano/log.zarr", group=table, consolidated=False)
        assert opened.step.values.tolist() == rows
        assert opened.recorded.values.all()
        assert not any(opened.failure.values)
        for variable in opened.data_vars.values():
            assert {"long_name", "units", "estimator"} <= set(variable.attrs)
        assert {"block", "other_block"} <= set(opened.coords) or table == "train"


def test_the_next_command_prints_the_tables(trained):
    folder, _ = trained
    shown = hessprobe("show", "runs/nano", folder=folder)
    assert shown.returncode == 0, shown.stderr
    assert "cross_layer" in shown.stdout and "block.0" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_the_report_can_be_made_again(trained):
    folder, _ = trained
    made = hessprobe("report", "runs/nano", "--out", "page.html", folder=folder)
    assert (made.returncode, made.stdout.split()) == (0, ["report", "page.html"])
    assert (folder / "page.html").is_file()


def test_help_and_a_slip_answer_without_a_traceback(tmp_path):
    shown = hessprobe("--help", folder=tmp_path)
    assert shown.returncode == 0
    for verb in ("train", "report", "show"):
        assert verb in shown.stdout
    slip = hessprobe("trian", folder=tmp_path)
    assert slip.returncode == 2
    assert "Traceback" not in slip.stderr and "trian" in slip.stderr
    assert not list(tmp_path.iterdir())


def test_the_readmes_example_of_reading_a_log_runs(trained, monkeypatch, capsys):
    folder, _ = trained
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    blocks = list(
        xr.open_zarr(folder / "runs/nano/log.zarr", group="cross_layer", consolidated=False)["block"].values
    )
    # The tiny run has fewer layers than the default one: the first and the last stand in for the README's pair.
    example = example.replace("block.1", blocks[0]).replace("block.2", blocks[-1])
    monkeypatch.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})
    value, stderr = (float(word) for word in capsys.readouterr().out.split(" +- "))
    assert -1 < value < 2 and stderr > 0


def test_the_readmes_examples_on_the_shipped_run_run(tmp_path, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    example = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)[
        1
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    (tmp_path / "data").symlink_to(root / "data")
    exec(compile(example, "README.md", "exec"), {})
    table = (tmp_path / "efficiency.csv").read_text(encoding="utf-8").splitlines()
    assert table[0].startswith("candidate,") and any(line.startswith("full_gn,") for line in table)
    assert capsys.readouterr().out.rstrip().endswith("0.0")
