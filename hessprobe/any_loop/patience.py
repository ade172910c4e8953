"""A probe that fails again and again for the same reason is tried ever more seldom: its rows in between cost nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

PATIENCE = 3  # rows that may fail alike before one is left out


@dataclass
class _Failing:
    kind: str
    reason: str
    rows: int = 0  # that were tried and failed alike, one after the other
    waiting: int = 0  # rows still to be left out


class Patience:
    """Which rows are worth a try. After 3 that failed alike a probe is tried at the next row, the 2nd after it, the 4th ...

    One row that can be measured, or fails otherwise, ends it: what was transient is over. Reasons that differ in numbers
    alone are alike.
    """

    def __init__(self) -> None:
        self._failing: dict[str, _Failing] = {}

    def waits(self, probe: str) -> bool:
        """Tells whether the probe's next row is left out."""
        return probe in self._failing and self._failing[probe].waiting > 0

    def left_out(self, probe: str) -> str:
        """Counts a row that is left out; returns why."""
        failing = self._failing[probe]
        failing.waiting -= 1
        return f"not tried again yet, after {failing.rows} rows in a row that failed alike: {failing.reason}"

    def heard(self, probe: str, failure: str) -> bool:
        """Takes what a row that was tried came to ("" where it was measured); tells whether a pause has just begun."""
        if not failure:
            self._failing.pop(probe, None)
            return False
        kind = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", failure)
        failing = self._failing.get(probe)
        if failing is None or failing.kind != kind:
            failing = self._failing[probe] = _Failing(kind=kind, reason=failure)
        failing.rows += 1
        failing.reason = failure
        failing.waiting = max(0, 2 ** (failing.rows - PATIENCE) - 1) if failing.rows >= PATIENCE else 0
        return failing.rows == PATIENCE + 1

    def forget(self, probe: str | None = None) -> None:
        """Tries a probe (default: all) again at its next row."""
        for name in list(self._failing) if probe is None else [probe]:
            self._failing.pop(name, None)
