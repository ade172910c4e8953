"""Every README leads somewhere: links, headings, pictures, files and flags that it names exist; the first is short."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts.readmes import NAMES, READMES, ROOT, blocks, prose

PICTURES = ROOT / "data" / "pictures"
WORDS, PICTURE_BYTES = 1300, 300_000
# Any module, its test, and what a wheel holds where a source tree has it beside the package.
NOT_HERE = {"hessprobe/kernels/x.py", "tests/kernels/test_x.py", "hessprobe/data/reference_study.csv"}


def targets(text: str) -> list[str]:
    """Returns what Markdown links to and shows, but for other machines' addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'src="([^"]+)"', text)
    return [target for target in found if "://" not in target]


def headings(text: str) -> set[str]:
    """Returns the anchors of a text's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def linked() -> set[Path]:
    """Returns all files that some README links to or shows."""
    texts = {path: path.read_text(encoding="utf-8") for path in READMES}
    return {
        (path.parent / target.partition("#")[0]).resolve()
        for path, text in texts.items()
        for target in targets(text)
    }


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_links_and_pictures_exist(path):
    for target in targets(path.read_text(encoding="utf-8")):
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        assert file.exists() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in headings(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", READMES, ids=NAMES)
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:analyses|tests|hessprobe|data)/[\w/]+\.(?:py|toml|csv|md)\b", text))
    assert [name for name in sorted(named - NOT_HERE) if not (ROOT / name).is_file()] == []
    for row in re.findall(r"^\| ((?:`\w+\.py`(?:, )?)+) \|", text, re.MULTILINE):
        for name in re.findall(r"`(\w+\.py)`", row):
            assert (path.parent / name).is_file(), name


def test_the_first_readme_is_short_and_every_other_one_is_linked():
    assert len(READMES[0].read_text(encoding="utf-8").split()) <= WORDS
    assert [name for path, name in zip(READMES[1:], NAMES[1:], strict=True) if path not in linked()] == []


def test_pictures_are_small_and_all_shown():
    kept = sorted(PICTURES.iterdir())
    assert [picture.name for picture in kept if picture not in linked()] == []
    assert sum(picture.stat().st_size for picture in kept) < PICTURE_BYTES


def test_commands_have_the_flags_that_are_typed():
    commands = "\n".join(block.replace("\\\n", " ") for path in READMES for block in blocks(path))
    typed = re.findall(r"(?:^|bin/|-m )hessprobe (\w+)(.*?)(?: {2,}#.*)?$", commands, re.MULTILINE)
    flags: dict[str, set[str]] = {}
    for verb, words in typed:
        flags.setdefault(verb, set()).update(re.findall(r"(?<!\S)--[a-z-]+", words))
    assert {"train", "probe", "report", "show", "compare", "validate"} <= set(flags)
    wide = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    for verb, wanted in flags.items():
        command = [sys.executable, "-m", "hessprobe", verb, "--help"]
        help_text = subprocess.run(command, capture_output=True, text=True, env=wide, check=True).stdout
        assert wanted <= set(re.findall(r"--[a-z-]+", help_text)), verb
