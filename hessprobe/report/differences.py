"""Several runs beside each other: what each found at the same step and settings, and which differences errors allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from hessprobe.instruments.instrument import Quantity, loaded
from hessprobe.instruments.registry import reader_of
from hessprobe.reading.finding import Finding
from hessprobe.reading.trend import standard_errors_of_largest
from hessprobe.reading.wording import percent, plus_minus
from hessprobe.report.asking import Asked
from hessprobe.report.findings import findings_of


def differences(asked: Asked, found: Sequence[Sequence[Finding]] | None = None) -> list[Finding]:
    """Returns a finding for each quantity that two or more runs state with an error: who differs, or that none does.

    Errors add in squares, as of independent runs (sequences that runs share make a difference surer than that). Of
    several pairs the largest difference must lie beyond as many errors as make noise as rare as two do for one.

    Args:
        asked: the runs.
        found: the findings of each up to the step of comparison, where they are known.
    """
    found = found or [findings_of(asked, run) for run in range(len(asked.trees))]
    stated = [
        _difference(quantity, _stated(quantity, name, asked, found))
        for name in asked.runs
        for quantity in reader_of(name).quantities()
    ]
    return [finding for finding in stated if finding is not None]


def _stated(
    quantity: Quantity, instrument: str, asked: Asked, found: Sequence[Sequence[Finding]]
) -> list[tuple[str, Finding]]:
    """Returns the label and finding of each run that states a quantity as the first that does was asked for it."""
    stated = [
        (run, finding)
        for run, findings in enumerate(found)
        for finding in findings
        if finding.name == quantity.name and finding.stderr is not None
    ]
    if quantity.alike is not None:
        how = [loaded(quantity.alike)(asked.tables[instrument][run]) for run, _ in stated]
        stated = [each for each, settings in zip(stated, how, strict=True) if settings == how[0]]
    return [(asked.labels[run], finding) for run, finding in stated]


def _points(value: float, stderr: float | None) -> str:
    return plus_minus(100 * value, None if stderr is None else 100 * stderr, "percentage points")


def _difference(quantity: Quantity, stated: Sequence[tuple[str, Finding]]) -> Finding | None:
    if len(stated) < 2:
        return None
    write, write_difference = (percent, _points) if quantity.share else (plus_minus, plus_minus)
    pairs = list(combinations(stated, 2))
    sizes = [_apart(one, other) for (_, one), (_, other) in pairs]
    far = [abs(size) / stderr if stderr > 0 else np.inf * abs(size) for size, stderr in sizes]
    at = int(np.nanargmax(far)) if np.isfinite(far).any() else 0
    size, stderr = sizes[at]
    (first, _), (second, _) = pairs[at]
    resolved = bool(far[at] > standard_errors_of_largest(len(pairs)))
    if size < 0:
        first, second, size = second, first, -size
    numbers = "; ".join(f"{label} {write(each.value, each.stderr)}" for label, each in stated)
    where = sorted({step for _, each in stated for step in each.steps})
    several = any(len(each.steps) > 1 for _, each in stated)
    at_step = f"At step {where[0]:,}" if len(where) == 1 else "At their last measured steps"
    at_step = "Over their measured steps" if several else at_step
    verdict = (
        f"{first} lies above {second} by {write_difference(size, stderr)}"
        if resolved
        else f"no two can be told apart (the largest difference is {write_difference(size, stderr)})"
    )
    return replace(
        stated[0][1],
        sentence=f"{at_step}, {quantity.words}: {numbers}; {verdict}.",
        value=size,
        stderr=stderr,
        basis="; ".join(f"{label}: {each.basis}" for label, each in stated),
        steps=tuple(where),
        headline="",
        label="",
        resolved=resolved,
    )


def _apart(one: Finding, other: Finding) -> tuple[float, float]:
    """Returns the difference of two independent numbers and its standard error."""
    return one.value - other.value, float(np.hypot(one.stderr or 0.0, other.stderr or 0.0))
