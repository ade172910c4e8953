"""The version stands in the package alone; everything else that names it reads it there, or is compared with it here."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import hessprobe
from hessprobe import cli

ROOT = Path(__file__).parents[2]


def test_the_project_file_takes_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"] == {"path": "hessprobe/__init__.py"}


def test_the_installed_one_is_the_packages():
    assert version("hessprobe") == hessprobe.__version__, (
        "pip install -e . again: its metadata are of another version"
    )


def test_a_citation_names_it():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [hessprobe.__version__]


def test_the_command_line_says_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hessprobe", "--version"])
    with pytest.raises(SystemExit) as end:
        cli.main()
        raise SystemExit(0)
    assert (end.value.code or 0, capsys.readouterr().out) == (0, f"hessprobe {hessprobe.__version__}\n")
