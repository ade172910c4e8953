"""One figure of a validation: a check with its limit, a measurement, or what was left out and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("check", "measurement", "skipped")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a validation found at one place.

    Attributes:
        name: what it is of, unique within its stage.
        value: the number; None where there is none (left out, or failed before there was one).
        unit: as a reader would say it; "1" for a pure number, "truth" for 1 (holds) or 0.
        kind: "check" (has a limit, and passes or not), "measurement", or "skipped".
        limit: of a check: the most that `value` may be, or the least where `at_least`.
        passed: of a check.
        note: where the number comes from, or why there is none.
        stage, seconds: in which stage, and how long after the figure before; the runner sets both.
    """

    name: str
    value: float | None
    unit: str
    kind: str
    limit: float | None = None
    at_least: bool = False
    passed: bool | None = None
    note: str = ""
    stage: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether this is a check that did not pass."""
        return self.kind == "check" and not self.passed

    @property
    def line(self) -> str:
        """The figure as one line for a terminal."""
        word = {True: "ok", False: "FAILED", None: "skipped" if self.kind == "skipped" else ""}[self.passed]
        limit = f" (limit {self.bound})" if self.limit is not None and self.unit != "truth" else ""
        note = f"  {self.note}" if self.note else ""
        return f"{word:<8}{self.name:<64}{self.text}{limit}{note}".rstrip()

    @property
    def text(self) -> str:
        """The value with its unit."""
        if self.value is None:
            return "-"
        if self.unit == "truth":
            return "yes" if self.value else "no"
        return said(self.value) + ("" if self.unit == "1" else f" {self.unit}")

    @property
    def bound(self) -> str:
        """The limit of a check, and on which side of it the value must be."""
        if self.limit is None or self.unit == "truth":
            return ""
        return f"{'at least' if self.at_least else 'at most'} {said(self.limit)}"

    def as_json(self) -> dict[str, Any]:
        """Returns the fields, numbers that JSON has no word for as None with the note saying which."""
        found = asdict(self)
        if self.value is not None and not math.isfinite(self.value):
            found |= {"value": None, "note": f"{self.note} (value {self.value})".strip()}
        return found


def check(
    name: str, value: float, limit: float, unit: str = "1", *, at_least: bool = False, note: str = ""
) -> Figure:
    """Returns a check that passes where the value is at most (or at least) the limit; NaN never does."""
    value = float(value)
    passed = value >= limit if at_least else value <= limit
    return Figure(
        name=name,
        value=value,
        unit=unit,
        kind="check",
        limit=limit,
        at_least=at_least,
        passed=bool(passed),
        note=note,
    )


def holds(name: str, truth: bool, note: str = "") -> Figure:
    """Returns a check of a statement."""
    return check(name, float(truth), 1.0, "truth", at_least=True, note=note)


def measured(name: str, value: float, unit: str, note: str = "") -> Figure:
    """Returns a measurement."""
    return Figure(name=name, value=float(value), unit=unit, kind="measurement", note=note)


def skipped(name: str, reason: str) -> Figure:
    """Returns what was left out, and why."""
    return Figure(name=name, value=None, unit="1", kind="skipped", note=reason)


def failure(name: str, error: BaseException) -> Figure:
    """Returns a failed check for something that raised."""
    words = str(error).strip().split("\n")[0] or "no message"
    reason = f"{type(error).__name__}: {words}"
    return Figure(name=name, value=None, unit="1", kind="check", passed=False, note=reason)


def failures(figures: Iterable[Figure]) -> list[Figure]:
    """Returns the checks that did not pass."""
    return [figure for figure in figures if figure.failed]


def said(value: float) -> str:
    """Returns a number with three digits that mean something."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.2e}"
