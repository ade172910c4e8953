"""The numbers of the study that hessprobe follows: Abreu et al. 2025 (arXiv 2510.09378), to set beside one's own."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

CITATION = "Abreu et al. 2025"
FILE = "reference_study.csv"


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One number of the study; NaN where it gives none.

    Attributes:
        quantity: "steps_to_loss", or "critical_batch": `batch_tokens` beyond which steps hardly fall.
        method: as in a recipe's optimizer.name.
        model, validation_loss: of which model; to which loss, nats per token.
        batch_tokens: of one outer step, its line search not counted.
        steps, ratio_to_full_gn: what the method needs.
        note: what the number leaves open.
    """

    quantity: str
    method: str
    model: str
    validation_loss: float
    batch_tokens: float
    steps: float
    ratio_to_full_gn: float
    note: str


def reference_study(quantity: str | None = None) -> tuple[StudyRow, ...]:
    """Returns the study's numbers, or those of one quantity, as data/reference_study.csv lists them."""
    lines = csv.DictReader(_text().read_text(encoding="utf-8").splitlines())
    rows = tuple(_row(line) for line in lines)
    return tuple(row for row in rows if quantity in (None, row.quantity))


def _text() -> Traversable:
    # A wheel carries data/ inside the package; a source tree, installed in place or not, has it beside the package.
    installed = resources.files("hessprobe") / "data" / FILE
    return installed if installed.is_file() else Path(__file__).parents[2] / "data" / FILE


def _row(line: dict[str, str]) -> StudyRow:
    return StudyRow(
        quantity=line["quantity"],
        method=line["method"],
        model=line["model"],
        validation_loss=float(line["validation_loss"]),
        batch_tokens=float(line["batch_tokens"]),
        steps=float(line["steps"] or "nan"),
        ratio_to_full_gn=float(line["ratio_to_full_gn"] or "nan"),
        note=line["note"],
    )
