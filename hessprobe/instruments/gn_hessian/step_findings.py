"""What the `gn_hessian` table shows of steps really taken, in sentences: their curvature, and what a model leaves out."""

from __future__ import annotations

import numpy as np

from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION
from hessprobe.instruments.gn_hessian.norms import GAUSS_NEWTON
from hessprobe.instruments.gn_hessian.table import LADDER_DIRECTIONS
from hessprobe.reading.finding import Finding
from hessprobe.reading.statistics import error_of
from hessprobe.reading.wording import counted, percent, plus_minus

ALONG = {
    "negative_gradient": "the negative gradient",
    "update": "the update",
    "gauss_newton_step": "the Gauss-Newton step",
    "top_eigenvector": "G's top eigenvector",
    "random": "a random direction",
}
# Of the ladder's directions alone.
ALONG_LADDER = {name: ALONG[name] for name in LADDER_DIRECTIONS}
# Of each error: what makes up most of the two, and the label of a headline.
LARGER = {
    BEYOND: ("the loss's higher orders make up", "are the loss's higher orders"),
    LINEARISATION: ("linearising the network makes up", "is linearising the network"),
}


def update_curvature(answers: GNHessianAnswers) -> Finding | None:
    """Returns how much curvature H has along the update, in units of G's, and where it is negative."""
    along = answers.update_ratio
    if along.sizes["step"] == 0:
        return None
    step = int(along["step"][-1])
    row = answers.directions["ratio"].sel(step=step)
    value = float(row.sel(direction="update"))
    down = [
        ALONG.get(str(name), str(name))
        for name in row["direction"].values
        if float(row.sel(direction=name)) < 0
    ]
    among = (
        f"; over {counted(along.size, 'measured step')} between {plus_minus(float(along.min()), None)} and "
        f"{plus_minus(float(along.max()), None)}"
        if along.size > 1
        else ""
    )
    negative = f" The Hessian curves down along {_listed(down)}." if down else ""
    return Finding(
        name="update_curvature",
        sentence=f"Along the update taken at step {step:,}, the Hessian has {plus_minus(value, None)} times the "
        f"Gauss-Newton matrix's curvature{among}.{negative}",
        value=value,
        stderr=None,
        basis=f"exact on {answers.basis(step) or 'its batch'}",
        steps=tuple(int(s) for s in along["step"].values),
    )


def model_error_of_update(answers: GNHessianAnswers) -> Finding | None:
    """Returns which error dominates Gauss-Newton's model of the update at its full length."""
    return _model_error(answers, "update", "model_error_update", "of the model's error along the update")


def model_error_of_step(answers: GNHessianAnswers) -> Finding | None:
    """Returns which error dominates Gauss-Newton's model of its own step."""
    return _model_error(answers, "gauss_newton_step", "model_error_gauss_newton_step", "")


def _model_error(answers: GNHessianAnswers, direction: str, name: str, label: str) -> Finding | None:
    if direction not in answers.at_full_length:
        return None
    along = answers.at_full_length[direction]
    along = along.isel(step=np.flatnonzero(np.isfinite(along["share"].values)))
    if along.sizes["step"] == 0:
        return None
    row = along.isel(step=-1)
    step, alpha = int(row["step"]), float(row["alpha"])
    errors = {key: plus_minus(float(row[key]), error_of(row[f"{key}_stderr"])) for key in LARGER}
    promised, real = (plus_minus(float(row["change"].sel(model=key)), None) for key in (GAUSS_NEWTON, "loss"))
    larger = str(row["dominant"].values)
    value, stderr = float(row["share"]), error_of(row["share_stderr"])
    part = value if larger != BEYOND else 1 - value
    verdict = (
        f"{LARGER[larger][0]} {percent(part, stderr)} of the two"
        if larger
        else f"which is larger is not resolved (linearising: {percent(value, stderr)} of the two)"
    )
    if bool(row["cancel"]):
        verdict += ", and they partly cancel"
    length = "" if np.isclose(alpha, 1) else f" at {alpha:g} times its length"
    return Finding(
        name=name,
        sentence=f"Along {ALONG[direction]} at step {step:,}{length}, the loss changes by {real} where Gauss-Newton's "
        f"quadratic says {promised} nats per token: linearising the network leaves out {errors[LINEARISATION]}, the loss's "
        f"higher orders add {errors[BEYOND]}; {verdict}.",
        value=value,
        stderr=stderr,
        basis=f"{answers.basis(step)}; errors over sequences{_solve(answers, direction, step)}",
        steps=(step,),
        headline=percent(part, stderr) if label and larger else "",
        label=f"{label} {LARGER[larger][1]}" if label and larger else "",
        resolved=bool(larger),
    )


def _solve(answers: GNHessianAnswers, direction: str, step: int) -> str:
    """Returns how well the Gauss-Newton step was solved for, where that is the direction."""
    if direction != "gauss_newton_step":
        return ""
    damping = answers.step_damping
    said = f"; damping {damping:g}" if np.isfinite(damping) else ""
    if step not in answers.solve["step"].values:
        return said
    row = answers.solve.sel(step=step)
    count = float(row["gauss_newton_step_iterations"])
    after = f" after {counted(int(count), 'iteration')}" if np.isfinite(count) else ""
    return f"{said}, residual {float(row['gauss_newton_step_residual']):.2g}{after}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
