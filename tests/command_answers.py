"""How a command ended, what it wrote, and what a refusal must look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
    """How a command ended, and what it wrote where."""

    code: int
    out: str
    error: str


Command = Callable[..., Answer]


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
