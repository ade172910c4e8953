"""The tables of a run in the terminal: the stored numbers, wide and narrow, with a terminal and without."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import xarray as xr
from rich.console import Console

from hessprobe.errors import UserError
from hessprobe.report.terminal import show
from tests.report.runs import LAYERS, write_run


def printed(run: Path, width: int = 140, **options) -> str:
    out = StringIO()
    show(run, Console(file=out, width=width), **options)
    return out.getvalue()


def test_the_last_row_of_cross_layer_with_its_errors(run: Path, log: xr.DataTree):
    text, last = printed(run), log["cross_layer"].to_dataset().sel(step=30).load()
    for i in range(len(LAYERS)):
        for j in range(i + 1, len(LAYERS)):
            assert f"{float(last['coupling'][i, j]):.3f}".replace("-", "−") in text
    energy, error = float(last["off_block_energy"]), float(last["off_block_energy_stderr"])
    assert f"{100 * energy:.1f} ± {100 * error:.1f} %" in text
    matrix = last["step_curvature"].sel(direction="update").values
    share = 100 * (matrix.sum() - matrix.trace()) / matrix.sum()
    assert f"cross share along update  {share:.1f} %".replace("-", "−") in text
    assert f"{float(last['seconds']):.4g} s" in text and "64 gradient equivalents" in text
    assert "step 10 failed: out of memory: 8 rows need 3.2 GB" in text


def test_train_shows_its_first_and_last_rows(run: Path, log: xr.DataTree):
    text, loss = printed(run, tables=["train"]), log["train"].to_dataset()["loss"].values
    for step in (0, 5, 25, 30):
        assert f"{loss[step]:.4g}" in text
    assert f"{loss[15]:.4g}" not in text and "…" in text and "cross_layer" not in text


def test_a_narrow_terminal_gets_numbers_that_fit(tmp_path):
    blocks = ("embedding", *(f"block.{i}" for i in range(12)), "head")
    text = printed(write_run(tmp_path / "run", blocks=blocks), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "strongest pairs" in text and "±" in text


def test_without_a_terminal_there_are_no_control_codes(run: Path):
    assert "\x1b" not in printed(run)


def test_empty_missing_and_hostile(tmp_path, run: Path):
    assert "nothing recorded yet" in printed(write_run(tmp_path / "empty", steps=[], train_steps=0))
    assert "no row holds a number" in printed(write_run(tmp_path / "blank", steps=[0], blank=[0]))
    with pytest.raises(UserError, match="no table 'preconditioner'"):
        printed(run, tables=["preconditioner"])
    with pytest.raises(UserError, match="no run at"):
        printed(tmp_path / "none")
    odd = write_run(
        tmp_path / "odd", blocks=["[red]a[/]", "[/nope]", "c"], name="[bold]x", failed={5: "[/x]"}
    )
    text = printed(odd)
    assert "[red]a[/]" in text and "[/nope]" in text and "[bold]x" in text and "step 5 failed: [/x]" in text
