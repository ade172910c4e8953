"""Where the READMEs are, and their text without code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / name for name in ("hessprobe", "analyses", "tests", "data")]
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in folder.rglob("README.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in READMES]


def prose(text: str) -> str:
    """Returns Markdown without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def blocks(path: Path, language: str = r"\w*") -> list[str]:
    """Returns the code blocks of a README that are in this language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
