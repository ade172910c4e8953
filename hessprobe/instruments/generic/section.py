"""The page's section on any table: every picture, and what the rows rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hessprobe.instruments.generic.answers import StoredScalars
from hessprobe.instruments.generic.pictures import lines_and_heatmaps
from hessprobe.reading.labelled import Labelled


def content(runs: Sequence[Labelled[StoredScalars]]) -> dict[str, Any]:
    """Returns what the template takes: names, titles and captions of the pictures, and the last rows' basis."""
    said = [run.answers.basis if len(runs) == 1 else f"{run.label}: {run.answers.basis}" for run in runs]
    return {
        "pictures": [
            {"name": each.name, "title": each.title, "caption": each.caption or each.at}
            for each in lines_and_heatmaps(runs)
        ],
        "said": [words for words in said if words.removesuffix(": ")],
    }
