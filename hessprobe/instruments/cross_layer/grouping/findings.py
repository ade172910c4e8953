"""What the groupings of one run show, in sentences: does joining layers pay, which, how many, and who matters most."""

from __future__ import annotations

import numpy as np

from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy
from hessprobe.reading.finding import Finding
from hessprobe.reading.trend import STANDARD_ERRORS, standard_errors_of_largest
from hessprobe.reading.wording import percent

CLOSED = 0.9  # of the gap between layerwise and full
NAMED_UP_TO = 90  # letters


def grouping_findings(study: GroupingStudy) -> list[Finding]:
    """Returns the findings on groupings, most important first; none where there is nothing to say."""
    if study.reason:
        return []
    found = [ask(study) for ask in (full_over_layerwise, best_pair, groups_needed, most_important)]
    return [finding for finding in found if finding is not None]


def full_over_layerwise(study: GroupingStudy) -> Finding | None:
    """Returns how much more held-out decrease full Gauss-Newton reaches than layerwise."""
    ratio, stderr, resolved = _scalar(study, "full_over_layerwise")
    if not bool(study.last["full_over_layerwise_reached"]):
        return None
    step, gain = int(study.last["step"]), ratio - 1
    size = percent(abs(gain) if resolved else gain, stderr)
    sentence = (
        f"At step {step:,}, joining all layers in the preconditioner {'adds' if gain > 0 else 'costs'} {size} "
        f"{'to' if gain > 0 else 'of'} the decrease that layerwise Gauss-Newton reaches on held-out sequences."
        if resolved
        else f"At step {step:,}, full and layerwise Gauss-Newton cannot be told apart by their decrease on "
        f"held-out sequences ({size})."
    )
    return Finding(
        name="full_over_layerwise",
        sentence=sentence,
        value=gain,
        stderr=stderr,
        basis=study.basis,
        steps=(step,),
        headline=percent(gain, stderr),
        label="held-out decrease of full Gauss-Newton above layerwise",
        resolved=resolved,
    )


def best_pair(study: GroupingStudy) -> Finding | None:
    """Returns the pair of layers whose joining adds most, or how many share the top."""
    if not study.has("merge_gain"):
        return None
    names = [str(name) for name in study.last["block"].values]
    rows, columns = np.triu_indices(len(names), k=1)
    pairs = [f"{names[i]} and {names[j]}" for i, j in zip(rows, columns, strict=True)]
    gains, errors, reached = (_array(study, "merge_gain", part)[rows, columns] for part in _PARTS)
    return _largest(
        study,
        name="best_merge",
        names=pairs,
        values=gains,
        errors=errors,
        reached=reached,
        one="joining {name} adds most to the layerwise decrease on held-out sequences, {number}",
        several="{count} pairs of layers add most to the layerwise decrease on held-out sequences and cannot be told "
        "apart within their errors; the first is {name} ({number})",
        none="no pair of layers adds a resolved share to the layerwise decrease when joined",
    )


def most_important(study: GroupingStudy) -> Finding | None:
    """Returns the layer whose cross-layer curvature is missed most when it is cut."""
    if not study.has("importance"):
        return None
    values, errors, reached = (_array(study, "importance", part) for part in _PARTS)
    return _largest(
        study,
        name="most_important_block",
        names=[str(name) for name in study.last["block"].values],
        values=values,
        errors=errors,
        reached=reached,
        one="cutting {name} off the other layers costs most of full Gauss-Newton's held-out decrease, {number}",
        several="cutting any of {count} layers off the others costs most of full Gauss-Newton's held-out decrease, and "
        "they cannot be told apart within their errors; the first is {name} ({number})",
        none="cutting any one layer off the others costs no resolved share of the held-out decrease",
    )


def groups_needed(study: GroupingStudy) -> Finding | None:
    """Returns how few groups close most of the gap between layerwise and full; None where there is no gap."""
    if not study.has("captured"):
        return None
    captured, errors, reached = (_array(study, "captured", part) for part in _PARTS)
    if not (reached.all() and bool(study.last["captured_resolved"].values[0]) and captured[0] < 1):
        return None
    at = int(np.flatnonzero(captured >= captured[0] + CLOSED * (1 - captured[0]))[0])
    left, step = len(captured) - at, int(study.last["step"])
    members = str(study.last["members"].values[at])
    named = f" ({members})" if len(members) <= NAMED_UP_TO else ""
    if left == 1:
        sentence = (
            f"At step {step:,}, no greedy grouping short of joining all layers closes nine tenths of the gap "
            f"between layerwise ({percent(captured[0], errors[0])} of full's held-out decrease) and full."
        )
    else:
        sentence = (
            f"At step {step:,}, {left} groups of layers{named}, joined greedily, capture "
            f"{percent(captured[at], errors[at])} of full Gauss-Newton's held-out decrease, layerwise "
            f"{percent(captured[0], errors[0])} with {len(captured)}."
        )
    return Finding(
        name="groups_needed",
        sentence=sentence,
        value=float(captured[at]),
        stderr=float(errors[at]),
        basis=f"{study.basis}; the order was chosen on the same sequences, which flatters by up to the error",
        steps=(step,),
    )


_PARTS = ("", "_stderr", "_reached")


def _array(study: GroupingStudy, answer: str, part: str) -> np.ndarray:
    """Returns an answer's values, its errors, or where its sketches reach the damping."""
    return study.last[f"{answer}{part}"].values


def _scalar(study: GroupingStudy, answer: str) -> tuple[float, float, bool]:
    last = study.last
    return float(last[answer]), float(last[f"{answer}_stderr"]), bool(last[f"{answer}_resolved"])


def _largest(
    study: GroupingStudy,
    *,
    name: str,
    names: list[str],
    values: np.ndarray,
    errors: np.ndarray,
    reached: np.ndarray,
    one: str,
    several: str,
    none: str,
) -> Finding | None:
    """Returns a finding on the largest of several numbers, claimed only beyond what the largest of noise reaches."""
    usable = np.flatnonzero(reached & np.isfinite(values) & np.isfinite(errors))
    if usable.size == 0:
        return None
    first = usable[values[usable].argmax()]
    rest = usable[usable != first]
    enough = standard_errors_of_largest(usable.size)
    # One set of sequences serves all, so errors may be correlated: they are added, not their squares.
    rivals = int((values[first] - values[rest] <= STANDARD_ERRORS * (errors[first] + errors[rest])).sum())
    value, stderr, step = float(values[first]), float(errors[first]), int(study.last["step"])
    number = percent(value, stderr)
    resolved = value > enough * stderr
    if not resolved:
        said = (
            f"{none} (the largest is {names[first]}, {number}; the largest of {usable.size} must lie beyond "
            f"{enough:.1f} errors)"
        )
    elif rivals:
        said = several.format(count=rivals + 1, name=names[first], number=number)
    else:
        said = one.format(name=names[first], number=number)
    return Finding(
        name=name,
        sentence=f"At step {step:,}, {said}.",
        value=value,
        stderr=stderr,
        basis=study.basis,
        steps=(step,),
        resolved=resolved,
    )
