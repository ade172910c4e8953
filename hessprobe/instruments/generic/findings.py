"""What the scalars of any table show, in sentences: the last value with its error, and the trend over training."""

from __future__ import annotations

import numpy as np

from hessprobe.instruments.generic.answers import Stored, StoredScalars
from hessprobe.reading.finding import Finding
from hessprobe.reading.trend import STANDARD_ERRORS, trend
from hessprobe.reading.trend_finding import trend_finding
from hessprobe.reading.wording import plus_minus


def trends_of_scalars(answers: StoredScalars) -> list[Finding]:
    """Returns a finding on the last value of every scalar, then those on trends."""
    scalars = [each for each in answers.scalars.values() if np.isfinite(each.values.values[-1])]
    trends = [_trend(each, answers) for each in scalars]
    return [*(_last(each, answers) for each in scalars), *(each for each in trends if each is not None)]


def _last(scalar: Stored, answers: StoredScalars) -> Finding:
    value, step = float(scalar.values.values[-1]), int(scalar.steps[-1])
    error = None if scalar.stderr is None else float(scalar.stderr.values[-1])
    error = error if error is not None and np.isfinite(error) else None
    return Finding(
        name=f"{answers.name}.{scalar.name}",
        sentence=f"At step {step:,}, {scalar.words}: {plus_minus(value, error, scalar.units)}.",
        value=value,
        stderr=error,
        basis=answers.basis,
        steps=(step,),
        resolved=error is None or abs(value) > STANDARD_ERRORS * error,
    )


def _trend(scalar: Stored, answers: StoredScalars) -> Finding | None:
    errors = None if scalar.stderr is None else scalar.stderr.values
    line = trend(scalar.steps, scalar.values.values, errors)
    name = f"{answers.name}.{scalar.name}.trend"
    return None if line is None else trend_finding(name, scalar.words, line, answers.basis)
