"""A page that cannot be written, or is of no run, is one line, and the log is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from hessprobe.report import page
from tests.cli.commands import refused
from tests.training.runs import tables


@pytest.mark.parametrize("verb", ["report", "show"])
def test_a_run_that_is_not_there_is_told(verb, hessprobe):
    refused(hessprobe(verb, "runs/none"), "no run at runs/none")
    assert not any(Path.cwd().iterdir())


def test_a_page_that_does_not_fit_loses_nothing(hessprobe, small, monkeypatch):
    def full(run: Path, out: Path | None = None) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page, "write_report", full)
    refused_at_the_end = hessprobe("train", *small, "--out", "runs/a")
    assert refused_at_the_end.code == 2
    last = refused_at_the_end.error.splitlines()[-1]
    assert "cannot write the report of runs/a (No space left on device)" in last
    assert "hessprobe report runs/a --out FILE" in last
    assert tables(Path("runs/a"))["train"].sizes["step"] == 2
