"""A number judged from sketches: its error, whether to trust it, and why not where not.

Every answer says whether it is `resolved`, and the `reason` where it is not:
- damping: some solve leaves less than 0.25 of the sketches' freedom, 1 - d_eff(mu) / m. Against exact conjugate
  gradients (0.23 M decoder, 64 sequences, 4 groupings, mu = 1 ... .01, 2 to 16 rounds), 66 answers above that were
  all within 1.5 of their errors, their biases below 0.5; below it, where solves act like those of a larger damping,
  biases reached 26 errors. tests/benchmarks/grouping_validation.py repeats the comparison.
- error: the answer lies within two standard errors of "makes no difference".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessprobe.instruments.cross_layer.grouping.sketch_space import CrossFit, Group
from hessprobe.reading.trend import STANDARD_ERRORS

LEAST_FREEDOM = 0.25


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Numbers with what is known of each, all of one shape.

    Attributes:
        value, stderr: the numbers and their standard errors.
        reached: whether the sketches reach the damping, so that the number stands as far as its error goes.
        resolved: whether it also lies beyond two errors from "makes no difference".
        reason: why it is not resolved; "" where it is.
    """

    value: np.ndarray
    stderr: np.ndarray
    reached: np.ndarray
    resolved: np.ndarray
    reason: np.ndarray


def answer(fit: CrossFit, values: np.ndarray, *, neutral: float, groups: Group | np.ndarray) -> Answer:
    """Returns the answer for values (1 + b, ...): of all sequences, then with each left out.

    Args:
        neutral: the value that means "makes no difference".
        groups: the group that the sketches serve worst, for each value.
    """
    value, stderr = values[0], jackknife(values[1:])
    if isinstance(groups, tuple):
        groups = objects([groups]).reshape(())
    reason, reached = np.full(value.shape, "", dtype=object), np.zeros(value.shape, dtype=bool)
    too_small: dict[Group, str] = {}
    for at in np.ndindex(value.shape):
        group = tuple(groups[at])
        if fit.freedom(group) < LEAST_FREEDOM:
            if group not in too_small:
                too_small[group] = _too_small(fit, group)
            reason[at] = too_small[group]
        elif not (np.isfinite(value[at]) and np.isfinite(stderr[at])):
            reason[at] = _NOT_ABOVE_ZERO
        else:
            reached[at] = True
            # A grouping against itself makes exactly no difference, without an error.
            if stderr[at] > 0 and abs(value[at] - neutral) <= STANDARD_ERRORS * stderr[at]:
                reason[at] = _WITHIN_ERRORS
    return Answer(value=value, stderr=stderr, reached=reached, resolved=reason == "", reason=reason)


_NOT_ABOVE_ZERO = (
    "the held-out curvature is not above zero within its errors; measure with more rounds or sequences"
)
_WITHIN_ERRORS = f"within {STANDARD_ERRORS:g} standard errors of no difference; measure with more sequences"


def _too_small(fit: CrossFit, group: Group) -> str:
    return (
        f"damping {fit.damping:g} is too small for {fit.sketches.rounds} rounds of {len(fit.sketches.tokens)} sequences: "
        f"the solve of {fit.name(group)} leaves {fit.freedom(group):.0%} of the sketches' freedom, below "
        f"{LEAST_FREEDOM:.0%}; measure with more rounds, or judge at damping "
        f"{fit.least_damping(group, LEAST_FREEDOM):.2g} or above"
    )


def weakest(fit: CrossFit, groups: Sequence[Group]) -> Group:
    """Returns the group whose solves leave the least of the sketches' freedom."""
    return min(groups, key=fit.freedom)


def objects(groups: Sequence[Group]) -> np.ndarray:
    """Returns groups as the entries of an array, which numpy would take apart."""
    held = np.empty(len(groups), dtype=object)
    held[:] = list(groups)
    return held


def jackknife(left_out: np.ndarray) -> np.ndarray:
    """Returns the standard error (...) from values (b, ...) with each of b sequences left out."""
    count = len(left_out)
    return np.sqrt(((left_out - left_out.mean(0)) ** 2).sum(0) * (count - 1) / count)
