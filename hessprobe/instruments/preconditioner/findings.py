"""What the `preconditioner` table shows, in sentences: when pairs of layers pay, who comes near, where steps are lost."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.block_findings import basis_of, loses_most, step_sizes
from hessprobe.instruments.preconditioner.table import FULL, LAYERWISE, UPDATE
from hessprobe.reading.finding import Finding
from hessprobe.reading.statistics import error_of
from hessprobe.reading.trend import STANDARD_ERRORS, trend
from hessprobe.reading.wording import counted, percent, plus_minus

# Relative residual of a solve beyond which a comparison is one of unfinished solves: stopping early damps too.
LOOSE = 0.3


def findings(answers: PreconditionerAnswers) -> list[Finding]:
    """Returns the findings on preconditioners, most important first; none where no row was measured."""
    if answers.empty:
        return []
    found = [*layerwise_over_full(answers), nearest(answers), update_efficiency(answers)]
    found += [step_sizes(answers), loses_most(answers), layerwise_over_full_trend(answers)]
    return [finding for finding in found if finding is not None]


def layerwise_over_full(answers: PreconditionerAnswers) -> list[Finding]:
    """Returns, for each damping, from which curvature batch on full Gauss-Newton gets farther than layerwise."""
    pays, found = answers.pays, []
    for i, damping in enumerate(pays["damping"].values):
        each = pays.isel(damping=i)
        known = np.flatnonzero(np.isfinite(each["ratio"].values))
        if known.size == 0:
            continue
        at = each.isel(curvature_sequences=known[-1])
        value, stderr = float(at["ratio"]), float(at["stderr"])
        verdict = str(each["verdict"].values)
        size = int(at["curvature_sequences"])
        numbers = f"{plus_minus(value, stderr)} times full's held-out decrease with {size:,}"
        if known.size > 1:
            first = each.isel(curvature_sequences=known[0])
            ratio = plus_minus(float(first["ratio"]), float(first["stderr"]))
            numbers += f", {ratio} with {int(first['curvature_sequences']):,}"
        left = answers.largest_residual(damping, FULL, LAYERWISE)
        unfinished = (
            ", but solves were cut off so early that this says little of exact ones" if left > LOOSE else ""
        )
        own = plus_minus(float(at["own_ratio"]), error_of(at["own_stderr"]))
        found.append(
            Finding(
                name="layerwise_over_full" if i == 0 else f"layerwise_over_full_{damping:g}",
                sentence=f"With damping {damping:g}, {_said(verdict, each)}: layerwise reaches {numbers} "
                f"(on those {size:,} sequences themselves {own}){unfinished}.",
                value=value,
                stderr=error_of(at["stderr"]),
                basis=basis_of(answers, damping, int(each["steps"]), FULL, LAYERWISE),
                steps=tuple(answers.rows["step"].values.tolist()),
                headline=plus_minus(value, stderr) if i == 0 else "",
                label=f"held-out decrease, layerwise over full Gauss-Newton ({size:,} "
                f"curvature sequences, damping {damping:g})"
                if i == 0
                else "",
                resolved=verdict not in ("not resolved", "not measured") and not left > LOOSE,
            )
        )
    return found


def _said(verdict: str, each: xr.Dataset) -> str:
    """Returns the verdict on one damping as the beginning of a sentence."""
    sizes, known = each["curvature_sequences"].values, np.isfinite(each["ratio"].values)
    told, untold = (_listed(sizes[known & ((each["ahead"].values != 0) == apart)]) for apart in (True, False))
    if verdict in ("pays", "does not pay"):
        rest = f" (with {untold} the two cannot be told apart)" if untold else ""
        behind = "" if verdict == "pays" else ", where full Gauss-Newton falls behind layerwise"
        return f"curvature between layers {verdict} with {told} curvature sequences{behind}{rest}"
    if verdict == "not resolved":
        return (
            f"layerwise and full Gauss-Newton cannot be told apart with {untold or told} curvature sequences"
        )
    low, high = int(each["below"]), int(each["above"])
    where = f"between {low} and {high} curvature sequences"
    if np.isfinite(float(each["crossover"])):
        numbers = (float(each[name]) for name in ("crossover", "crossover_low", "crossover_high"))
        where += ", at about {:.3g} ({:.3g} to {:.3g})".format(*numbers)
    way = "begins" if verdict == "pays from a size on" else "ceases"
    return f"curvature between layers {way} to pay {where}"


def _listed(sizes: np.ndarray) -> str:
    """Returns `16, 32 and 64`."""
    words = [f"{size:,}" for size in sizes]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def nearest(answers: PreconditionerAnswers) -> Finding | None:
    """Returns which practical method comes nearest the layerwise oracle on held-out sequences."""
    if answers.nearest is None:
        return None
    best, rivals, measured = answers.nearest
    at = answers.over_layerwise.isel(curvature_sequences=-1, damping=0).sel(candidate=best)
    value, stderr = float(at["ratio"]), float(at["stderr"])
    number = f"{plus_minus(value, stderr)} of the held-out decrease of layerwise Gauss-Newton"
    others = "another" if rivals == 1 else f"{rivals} others"
    sentence = f"Of {counted(measured, 'practical method')}, {best} gets farthest: {number}" + (
        f"; {others} cannot be told apart from it." if rivals else "."
    )
    return Finding(
        name="nearest_layerwise",
        sentence=sentence,
        value=value,
        stderr=error_of(at["stderr"]),
        basis=f"{answers.size} curvature sequences, {basis_of(answers, answers.damping, int(at['steps']), LAYERWISE)}",
        steps=tuple(answers.rows["step"].values.tolist()),
        headline=plus_minus(value, stderr),
        label=f"of layerwise Gauss-Newton's held-out decrease is reached by {best}, the best practical method",
        resolved=bool(np.isfinite(stderr) and value > STANDARD_ERRORS * stderr),
    )


def update_efficiency(answers: PreconditionerAnswers) -> Finding | None:
    """Returns how much of the best held-out decrease the run's own update reaches at the last measured step."""
    if UPDATE not in answers.names:
        return None
    over = answers.efficiency.sel(candidate=UPDATE)
    known = np.flatnonzero(np.isfinite(over["held_out"].values))
    if known.size == 0:
        return None
    at = over.isel(step=known[-1])
    value, stderr, step = float(at["held_out"]), float(at["held_out_stderr"]), int(at["step"])
    resolved = bool(np.isfinite(stderr) and value > STANDARD_ERRORS * stderr)
    return Finding(
        name="update_efficiency",
        sentence=f"At step {step:,}, the run's own update reaches {percent(value, stderr)} of the largest decrease "
        "that the held-out sequences' damped quadratic model allows."
        if resolved
        else f"At step {step:,}, the share of the largest held-out decrease that the run's own update reaches "
        f"({percent(value, stderr)}) is not resolved from zero.",
        value=value,
        stderr=error_of(at["held_out_stderr"]),
        basis=basis_of(answers, answers.damping, 1, step=step),
        steps=(step,),
        resolved=resolved,
    )


def layerwise_over_full_trend(answers: PreconditionerAnswers) -> Finding | None:
    """Returns whether layerwise over full rises or falls over training, with the largest curvature batch."""
    if answers.pays.sizes["damping"] == 0:
        return None
    at = answers.pays.isel(damping=0, curvature_sequences=-1)
    line = trend(at["step"].values, at["per_step"].values, at["per_step_stderr"].values)
    if line is None:
        return None
    span = f"from step {line.first_step:,} to {line.last_step:,}"
    signed = plus_minus(line.change, line.stderr)
    return Finding(
        name="layerwise_over_full_trend",
        sentence=f"Over training, the held-out decrease of layerwise over full Gauss-Newton "
        f"{'rises' if line.change > 0 else 'falls'} by {plus_minus(abs(line.change), line.stderr)} {span}."
        if line.resolved
        else f"Over training, the held-out decrease of layerwise over full Gauss-Newton shows no resolved trend {span} "
        f"({signed}).",
        value=line.change,
        stderr=line.stderr,
        basis=f"straight line through {counted(line.rows, 'measured step')}; "
        f"{answers.size} curvature sequences, damping {answers.damping:g}",
        steps=(line.first_step, line.last_step),
        resolved=line.resolved,
    )
