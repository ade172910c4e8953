"""The command in a folder of its own, and the flags of a run that takes an instant."""

from __future__ import annotations

from pathlib import Path

import pytest

from hessprobe.report import page
from tests.cli.commands import Answer, Command, answered
from tests.training.runs import text_file, tiny


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends without drawing the report, which has tests of its own."""
    monkeypatch.setattr(page, "write_report", lambda run, out=None: Path(out or run / "report.html"))


@pytest.fixture
def hessprobe(tmp_path, monkeypatch, capsys) -> Command:
    """Returns the function words... -> Answer, run in a folder of its own with a small text beside it."""
    work = tmp_path / "work"
    work.mkdir()
    text_file(tmp_path)
    monkeypatch.chdir(work)

    def run(*words: str) -> Answer:
        return answered(words, monkeypatch, capsys)

    return run


@pytest.fixture
def small(tmp_path) -> list[str]:
    """Returns the flags of a tiny run of two steps."""
    return [*(f"--set={s}" for s in tiny(text_file(tmp_path))), "--steps=2", "--optimizer=adamw"]
