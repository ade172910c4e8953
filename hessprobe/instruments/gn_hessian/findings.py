"""What the `gn_hessian` table shows, in sentences: how far G is from H, where, which way it curves, and what that costs."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.norms import GAUSS_NEWTON, HESSIAN, RESIDUAL, errors_to_claim
from hessprobe.instruments.gn_hessian.spectrum import ROUND_OFF
from hessprobe.instruments.gn_hessian.step_findings import (
    model_error_of_step,
    model_error_of_update,
    update_curvature,
)
from hessprobe.reading.finding import Finding
from hessprobe.reading.statistics import error_of
from hessprobe.reading.trend import trend
from hessprobe.reading.trend_finding import trend_finding
from hessprobe.reading.wording import counted, percent, plus_minus


def findings(answers: GNHessianAnswers) -> list[Finding]:
    """Returns the findings on G against H at the last measured step, most important first, then how they move."""
    asked = (gap, model_error_of_update, update_curvature, negative_eigenvalue, block, residual_trace)
    found = [ask(answers) for ask in (*asked, negative_share, model_error_of_step)]
    return [finding for finding in found if finding is not None] + trends(answers)


def trends(answers: GNHessianAnswers) -> list[Finding]:
    """Returns how the difference of G and H moves over training; none with fewer than four measured rows."""
    rows, along = answers.gap, answers.update_ratio
    lines = [
        (
            "gn_gap_trend",
            "‖H − G‖ / ‖G‖",
            trend(*(rows[n].values for n in ("step", "gn_gap", "gn_gap_stderr"))),
        ),
        (
            "update_curvature_trend",
            "d·Hd / d·Gd along the update",
            trend(along["step"].values, along.values),
        ),
    ]
    each = answers.basis(int(rows["step"][-1])) if rows.sizes["step"] else ""
    return [trend_finding(name, what, line, each) for name, what, line in lines if line is not None]


def gap(answers: GNHessianAnswers) -> Finding | None:
    """Returns how far H is from G as a whole."""
    rows = answers.gap
    if rows.sizes["step"] == 0:
        return None
    row = rows.isel(step=-1)
    step, value, stderr = int(row["step"]), float(row["gn_gap"]), error_of(row["gn_gap_stderr"])
    said = plus_minus(value, stderr)
    resolved = stderr is None or value > errors_to_claim(answers.samples - 1) * stderr
    share = percent(float(row["residual_share"]), error_of(row["residual_share_stderr"]))
    cosine = plus_minus(float(row["cosine"]), error_of(row["cosine_stderr"]))
    return Finding(
        name="gn_gap",
        sentence=f"At step {step:,}, the Hessian lies {said} times the Gauss-Newton matrix's norm away from it: the "
        f"residual H − G holds {share} of the squared norms of the two, and the cosine of H and G is {cosine}."
        if resolved
        else f"At step {step:,}, the Hessian's distance from the Gauss-Newton matrix ({said} of its norm) is not "
        "resolved from zero.",
        value=value,
        stderr=stderr,
        basis=_probed(answers, step, f"{answers.samples} probes"),
        steps=(step,),
        headline=said,
        label="‖H − G‖ / ‖G‖: how far the Hessian is from the Gauss-Newton matrix",
        resolved=resolved,
    )


def block(answers: GNHessianAnswers) -> Finding | None:
    """Returns the block whose Hessian is farthest from its Gauss-Newton matrix, or how many share the top."""
    rows = answers.block_gap
    if rows.sizes["step"] == 0:
        return None
    row = rows.isel(step=-1)
    keep = np.flatnonzero(np.isfinite(row["gn_gap"].values) & np.isfinite(row["gn_gap_stderr"].values))
    if keep.size < 2:
        return None
    row, step, samples = (
        row.isel(block=keep),
        int(row["step"]),
        int(answers.table.attrs.get("block_samples", 2)),
    )
    value, stderr = row["gn_gap"].values, _pooled(row)
    top = int(value.argmax())
    # Blocks have probes of their own, so errors are independent; their relative errors together are known from many.
    needed = errors_to_claim(keep.size * (samples - 1), keep.size)
    others = np.delete(np.arange(keep.size), top)
    rivals = int((value[top] - value[others] <= needed * np.hypot(stderr[top], stderr[others])).sum())
    name = str(row["block"].values[top])
    said = plus_minus(float(value[top]), float(stderr[top]))
    return Finding(
        name="gn_block_gap",
        sentence=f"At step {step:,}, the block whose Hessian is farthest from its Gauss-Newton matrix is {name} "
        f"({said} of its norm)."
        if rivals == 0
        else f"At step {step:,}, {counted(rivals + 1, 'block')} of {keep.size} share the largest distance between "
        f"Hessian and Gauss-Newton matrix within their errors; the first is {name} ({said} of its norm).",
        value=float(value[top]),
        stderr=float(stderr[top]),
        basis=_probed(answers, step, f"{samples} probes a block, their relative errors pooled"),
        steps=(step,),
        resolved=rivals == 0,
    )


def residual_trace(answers: GNHessianAnswers) -> Finding | None:
    """Returns whether the residual adds to the trace or takes from it."""
    rows = answers.traces
    if rows.sizes["step"] == 0:
        return None
    row = rows.isel(step=-1)
    step = int(row["step"])
    numbers = {
        name: (float(row["trace"].sel(matrix=name)), error_of(row["trace_stderr"].sel(matrix=name)))
        for name in (GAUSS_NEWTON, RESIDUAL)
    }
    value, stderr = numbers[RESIDUAL]
    if not np.isfinite(value):
        return None
    resolved = stderr is None or abs(value) > errors_to_claim(answers.samples - 1) * stderr
    whole = plus_minus(*numbers[GAUSS_NEWTON])
    return Finding(
        name="residual_trace",
        sentence=f"At step {step:,}, the network's own curvature {'adds' if value > 0 else 'takes'} "
        f"{plus_minus(abs(value), stderr)} {'to' if value > 0 else 'from'} the trace of the Gauss-Newton matrix ({whole})."
        if resolved
        else f"At step {step:,}, the trace of the residual H − G ({plus_minus(value, stderr)}) is not resolved from zero, "
        f"beside the Gauss-Newton matrix's {whole}.",
        value=value,
        stderr=stderr,
        basis=_probed(answers, step, f"{answers.samples} probes"),
        steps=(step,),
        resolved=resolved,
    )


def negative_eigenvalue(answers: GNHessianAnswers) -> Finding | None:
    """Returns whether H has a negative eigenvalue, and how large beside its largest.

    Ritz values lie between the extreme eigenvalues: a negative one proves a negative eigenvalue, no smaller in size.
    """
    rows = answers.extremes.sel(matrix=HESSIAN)
    if rows.sizes["step"] == 0 or not np.isfinite(rows["lambda_min"].values[-1]):
        return None
    row = rows.isel(step=-1)
    step, value, largest = int(row["step"]), float(row["lambda_min"]), float(row["lambda_max"])
    resolved = value < -ROUND_OFF * float(np.nanmax(np.abs([largest, value])))
    said, within = plus_minus(value, None), error_of(row["lambda_min_residual"])
    residual = "" if within is None else f" (residual {within:.2g})"
    beside = (
        f", {abs(value) / largest:.2g} times the size of the largest ({largest:.4g})" if largest > 0 else ""
    )
    return Finding(
        name="negative_eigenvalue",
        sentence=f"At step {step:,}, the Hessian curves down: its smallest eigenvalue is {said} or below{residual}"
        f"{beside}."
        if resolved
        else f"At step {step:,}, no negative eigenvalue of the Hessian was met: its smallest Ritz value is {said}"
        f"{residual}.",
        value=value,
        stderr=None,
        basis=_lanczos(answers, step),
        steps=(step,),
        resolved=resolved,
    )


def negative_share(answers: GNHessianAnswers) -> Finding | None:
    """Returns how much of the Hessian's spectrum is negative; nothing without an error over probes."""
    if answers.negative.sizes["step"] == 0:
        return None
    row = answers.negative.isel(step=-1)
    step, value, stderr = int(row["step"]), float(row["share"]), float(row["share_stderr"])
    if not (np.isfinite(value) and np.isfinite(stderr)):
        return None
    probes = answers.table.sizes["probe"]
    resolved = value > errors_to_claim(probes - 1) * stderr and value > 0
    said = percent(value, stderr)
    return Finding(
        name="negative_share",
        sentence=f"At step {step:,}, negative eigenvalues make up {said} of the sum of the Hessian's eigenvalues' sizes."
        if resolved
        else f"At step {step:,}, the negative eigenvalues' share of the sum of the Hessian's eigenvalues' sizes ({said}) is "
        f"not resolved from {counted(probes, 'random start')}.",
        value=value,
        stderr=stderr,
        basis=_lanczos(answers, step),
        steps=(step,),
        resolved=resolved,
    )


def _pooled(row: xr.Dataset) -> np.ndarray:
    """Returns errors (block,) that are no less than the blocks' relative errors together say: two probes say little."""
    value, stderr = row["gn_gap"].values, row["gn_gap_stderr"].values
    above = value > 0
    relative = np.sqrt(np.mean((stderr[above] / value[above]) ** 2)) if above.any() else 0.0
    return np.maximum(stderr, relative * value)


def _probed(answers: GNHessianAnswers, step: int, probes: str) -> str:
    said = answers.basis(step)
    return f"{said}, {probes}" if said else probes


def _lanczos(answers: GNHessianAnswers, step: int) -> str:
    steps, probes = answers.table.attrs.get("lanczos_steps", "?"), answers.table.sizes.get("probe", 0)
    return _probed(answers, step, f"{steps} Lanczos steps from {counted(probes, 'random start')}")
