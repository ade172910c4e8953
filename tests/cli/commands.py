"""A command called in this process, and what its answer should be: exit code, results on stdout, one line on stderr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from hessprobe.cli import main


class Answer(NamedTuple):
    """How a command ended, and what it wrote where."""

    code: int
    out: str
    error: str


Command = Callable[..., Answer]


def answered(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Answer:
    """Returns how `hessprobe WORDS...` ends."""
    monkeypatch.setattr("sys.argv", ["hessprobe", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
        raise SystemExit(0)
    return Answer(int(end.value.code or 0), *capsys.readouterr())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(answer: Answer, *parts: str) -> None:
    """One line that says what was wanted, exit 2, no traceback, no result."""
    assert answer.code == 2, answer
    assert answer.out == ""
    lines = [line for line in answer.error.splitlines() if not line.startswith("no --probe given")]
    assert len(lines) == 1 and lines[0].startswith("error: "), answer.error
    for part in parts:
        assert part in lines[0], answer.error
