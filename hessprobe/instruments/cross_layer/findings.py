"""What the `cross_layer` table shows, in sentences: how much lies between layers, where, and how it moves."""

from __future__ import annotations

import numpy as np

from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers
from hessprobe.instruments.cross_layer.grouping.findings import grouping_findings
from hessprobe.reading.finding import Finding
from hessprobe.reading.trend import STANDARD_ERRORS, standard_errors_of_largest, trend
from hessprobe.reading.trend_finding import trend_finding
from hessprobe.reading.wording import basis, counted, percent, plus_minus


def findings(answers: CrossLayerAnswers) -> list[Finding]:
    """Returns the findings on cross-layer curvature: at the last measured step, on groupings, then over training."""
    now = [ask(answers) for ask in (off_block, update_share, strongest_pair, distance, overshoot)]
    trends = [ask(answers) for ask in (off_block_trend, update_share_trend)]
    known, moving = ([finding for finding in each if finding is not None] for each in (now, trends))
    return [*known, *grouping_findings(answers.groupings), *moving]


# The recipe's word for the matrix whose blocks were measured -> its name and symbol in a sentence.
MATRICES = {
    "gauss_newton": ("the Gauss-Newton matrix", "G"),
    "hessian": ("the Hessian", "H"),
    "residual": ("the residual H - G", "H - G"),
}


def off_block(answers: CrossLayerAnswers) -> Finding | None:
    """Returns how much of |G|_F^2 lies between layers at the last measured step."""
    rows = answers.energy_rows
    if rows.sizes["step"] == 0:
        return None
    row, energy = rows.isel(step=-1), answers.off_block_energy.isel(step=-1)
    step, value, stderr = (
        int(row["step"]),
        float(energy["off_block_energy"]),
        float(energy["off_block_energy_stderr"]),
    )
    resolved = abs(value) > STANDARD_ERRORS * stderr
    what = percent(value, stderr)
    matrix, symbol = MATRICES[answers.table.attrs.get("matrix", "gauss_newton")]
    return Finding(
        name="off_block_energy",
        sentence=f"At step {step:,}, {what} of the squared norm of {matrix} lies between "
        "layers, where a layerwise method does not look."
        if resolved
        else f"At step {step:,}, the share of the squared norm of {matrix} between layers "
        f"({what}) is not resolved from zero.",
        value=value,
        stderr=stderr,
        basis=basis(row),
        steps=(step,),
        headline=what,
        label=f"of ‖{symbol}‖² lies between layers",
        resolved=resolved,
    )


def update_share(answers: CrossLayerAnswers) -> Finding | None:
    """Returns how much of the last measured update's curvature lies between layers."""
    rows, shares = answers.update_share
    if shares.size == 0:
        return None
    row, share = rows.isel(step=-1), float(shares[-1])
    step, seen = int(row["step"]), percent(1 - share)
    reading = (
        f"a block-diagonal model sees {seen} of this step's curvature"
        if share >= 0
        else f"layers cancel, and a block-diagonal model sees {1 - share:.3g} times the curvature there is"
    )
    among = (
        f"; over {counted(shares.size, 'measured step')} the share lies between "
        f"{percent(float(shares.min()))} and {percent(float(shares.max()))}"
        if shares.size > 1
        else ""
    )
    return Finding(
        name="cross_share_update",
        sentence=f"Along the update taken at step {step:,}, terms between layers make up {percent(share)} of "
        f"the curvature d·Gd: {reading}{among}.",
        value=share,
        stderr=None,
        basis=f"exact on {basis(row, exact=True) or 'its batch'}",
        steps=tuple(int(s) for s in rows["step"].values),
        headline=percent(share),
        label="of the update's curvature lies between layers",
    )


def strongest_pair(answers: CrossLayerAnswers) -> Finding | None:
    """Returns the pair of layers that couples most at the last measured step, or those that share the top."""
    pairs = answers.strongest_pairs
    if pairs is None or pairs.sizes["pair"] == 0:
        return None
    row = answers.measured.isel(step=-1)
    values, errors = pairs["coupling"].values, pairs["coupling_stderr"].values
    value, stderr, step = float(values[0]), float(errors[0]), int(row["step"])
    name = f"{pairs['block'].values[0]} and {pairs['other_block'].values[0]}"
    # One set of probes serves all pairs, so errors may be correlated: they are added, not their squares.
    rivals = int((values[0] - values[1:] <= STANDARD_ERRORS * (errors[0] + errors[1:])).sum())
    number = f"coupling {plus_minus(value, stderr)} on a scale from 0 to 1"
    resolved = value > standard_errors_of_largest(values.size) * stderr
    if not resolved:
        sentence = f"At step {step:,}, no pair of layers has a coupling resolved from zero."
    elif rivals:
        sentence = (
            f"At step {step:,}, {counted(rivals + 1, 'pair')} of layers couple most strongly and cannot be "
            f"told apart within their errors; the first is {name} ({number})."
        )
    else:
        sentence = f"At step {step:,}, the layers that couple most strongly are {name} ({number})."
    return Finding(
        name="strongest_pair",
        sentence=sentence,
        value=value,
        stderr=stderr,
        basis=basis(row),
        steps=(step,),
        resolved=resolved,
    )


def distance(answers: CrossLayerAnswers) -> Finding | None:
    """Returns whether neighbours couple more than the layers farthest apart, at the last measured step."""
    by_distance = answers.by_distance
    measured = by_distance.where(by_distance["distance"] >= 1, drop=True)
    if measured.sizes["step"] == 0 or measured.sizes["distance"] < 2:
        return None
    near, far = measured.isel(step=-1, distance=0), measured.isel(step=-1, distance=-1)
    difference = float(near["coupling"] - far["coupling"])
    stderr = float(near["coupling_stderr"] + far["coupling_stderr"])
    if not np.isfinite(difference):
        return None
    step = int(near["step"])
    numbers = [plus_minus(float(point["coupling"]), float(point["coupling_stderr"])) for point in (near, far)]
    resolved = abs(difference) > STANDARD_ERRORS * stderr
    verdict = (
        ("falls with" if difference > 0 else "grows with") if resolved else "does not resolvably depend on"
    )
    return Finding(
        name="coupling_by_distance",
        sentence=f"At step {step:,}, coupling {verdict} layer distance: {numbers[0]} between layers "
        f"{int(near['distance'])} apart, {numbers[1]} between layers {int(far['distance'])} apart.",
        value=difference,
        stderr=stderr,
        basis=basis(answers.measured.isel(step=-1)),
        steps=(step,),
        resolved=resolved,
    )


def overshoot(answers: CrossLayerAnswers) -> Finding | None:
    """Returns how far a layerwise step overshoots at the last measured step, between its two estimates."""
    rows = answers.jacobi_radius
    if rows.sizes["step"] == 0:
        return None
    row = rows.isel(step=-1)
    whole = answers.table.sel(step=int(row["step"]))
    low, high, step = float(row["low"]), float(row["high"]), int(row["step"])
    most = answers.table.sizes["block"]
    return Finding(
        name="jacobi_radius",
        sentence=f"At step {step:,}, layerwise Gauss-Newton overshoots {low:.3g} to {high:.3g} times along its worst "
        f"direction (1 is not at all, {most} the most that {most} layers can): layerwise steps beyond "
        f"{2 / high:.2g} to {2 / low:.2g} of its own length diverge there.",
        value=low,
        stderr=None,
        basis=f"{basis(whole, exact=True)}, damping {float(row['damping']):g}; one estimate rather low, one rather high",
        steps=(step,),
    )


def off_block_trend(answers: CrossLayerAnswers) -> Finding | None:
    """Returns whether off-block energy rises or falls over training."""
    rows, energy = answers.energy_rows, answers.off_block_energy
    errors = energy["off_block_energy_stderr"].values
    each = basis(rows.isel(step=-1)) if errors.size else ""
    line = trend(energy["step"].values, energy["off_block_energy"].values, errors)
    what = "the share of ‖G‖² between layers"
    return None if line is None else trend_finding("off_block_energy_trend", what, line, each, share=True)


def update_share_trend(answers: CrossLayerAnswers) -> Finding | None:
    """Returns whether the cross share along the update rises or falls over training."""
    rows, shares = answers.update_share
    line = trend(rows["step"].values, shares)
    each = basis(rows.isel(step=-1), exact=True) if shares.size else ""
    what = "the share of the update's curvature between layers"
    return None if line is None else trend_finding("cross_share_trend", what, line, each, share=True)
