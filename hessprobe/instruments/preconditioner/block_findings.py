"""What the `preconditioner` table says of single layers, in sentences: who loses most, what own step sizes would buy."""

from __future__ import annotations

import numpy as np

from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.table import UPDATE
from hessprobe.reading.finding import Finding
from hessprobe.reading.statistics import error_of
from hessprobe.reading.trend import STANDARD_ERRORS
from hessprobe.reading.wording import counted, percent, plus_minus


def step_sizes(answers: PreconditionerAnswers) -> Finding | None:
    """Returns what a step size for each layer would buy the run's update, at the last measured step."""
    name, step = answers.subject, answers.last_step
    if name is None:
        return None
    steps = answers.steps.sel(candidate=name)
    gains = steps["gain"].sel(found="other sequences")
    errors = steps["gain_stderr"].sel(found="other sequences")
    value, stderr = float(gains.sel(known="together")), float(errors.sel(known="together"))
    if not np.isfinite(value):
        return None
    resolved = abs(value - 1) > STANDARD_ERRORS * stderr
    wanted = [
        f"{block} {plus_minus(float(one), float(error))} times"
        for block, one, error, beyond in zip(
            steps["block"].values, steps["multiplier"].values, steps["multiplier_stderr"].values,
            steps["resolved"].values, strict=True,
        )
        if beyond
    ]  # fmt: skip
    alone = plus_minus(float(gains.sel(known="alone")), float(errors.sel(known="alone")))
    many = f"{', '.join(wanted[:3])}{' and others' if len(wanted) > 3 else ''}"
    asks = (
        f"; beyond errors it asks for other steps in {many}"
        if wanted
        else "; no single layer asks for another"
    )
    said = (
        f"a step size for each layer would {'raise' if value > 1 else 'lower'} the held-out decrease of {_called(name)} "
        f"to {plus_minus(value, stderr)} times that of its best single one ({alone} with each layer tuned alone){asks}"
        if resolved
        else f"a step size for each layer buys {_called(name)} nothing resolved: {plus_minus(value, stderr)} times the "
        f"held-out decrease of its best single one ({alone} with each layer tuned alone)"
    )
    return Finding(
        name="step_size_per_layer",
        sentence=f"At step {step:,}, {said}.",
        value=value,
        stderr=error_of(errors.sel(known="together")),
        basis="step sizes found and judged on different held-out sequences, "
        + basis_of(answers, answers.block_damping, 1, step=step),
        steps=(step,),
        resolved=bool(resolved),
    )


def loses_most(answers: PreconditionerAnswers) -> Finding | None:
    """Returns the layer in which the run's update leaves most of what is to be had, at the last measured step."""
    name, step = answers.subject, answers.last_step
    if name is None:
        return None
    losses = answers.losses.sel(candidate=name)
    lost = losses["lost"].values
    if not np.isfinite(lost).any():
        return None
    at = int(np.nanargmax(lost))
    block = str(losses["block"].values[at])
    return Finding(
        name="block_loses_most",
        sentence=f"At step {step:,}, {_called(name)} leaves most in {block}: {percent(float(lost[at]))} of what the best "
        f"steps within single layers would gain, {percent(float(np.nansum(lost)))} in all layers; within {block} it is "
        f"{percent(float(losses['efficiency'].values[at]))} efficient.",
        value=float(lost[at]),
        stderr=None,
        basis=f"exact on {answers.size} curvature sequences, damping {answers.block_damping:g}",
        steps=(step,),
    )


def _called(name: str) -> str:
    return "the run's own update" if name == UPDATE else name


def basis_of(
    answers: PreconditionerAnswers, damping: float, steps: int, *solved: str, step: int | None = None
) -> str:
    """Returns what held-out figures rest on; `solved` names the candidates whose solves must have ended."""
    folds, draws = answers.rows.sizes["fold"], answers.rows.sizes["draw"]
    said = [counted(steps, "measured step"), counted(draws, "draw") + " of curvature batches"]
    said.append(f"{answers.held_out} held-out sequences in {counted(folds, 'fold')}, damping {damping:g}")
    largest = answers.largest_residual(damping, *solved, step=step)
    if largest > answers.tolerance:
        said.append(
            f"solves cut off at residuals up to {largest:.2g}, where {answers.tolerance:g} was wanted"
        )
    return "; ".join([", ".join(said[:3]), *said[3:]])
