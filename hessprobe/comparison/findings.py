"""What a comparison shows, in sentences: who needs how much of full Gauss-Newton's steps, whose sweep or batch is too small.

A ratio is claimed as a difference where its 95 % interval leaves out 1; one seed alone has no interval.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.comparison.compared import Comparison
from hessprobe.comparison.groups import METHODS
from hessprobe.comparison.reference_study import CITATION, reference_study
from hessprobe.reading.finding import Finding
from hessprobe.reading.wording import counted, plus_minus


def comparison_findings(comparison: Comparison) -> list[Finding]:
    """Returns the findings of a comparison: of the reference, of each other method, of sweeps and of batch sizes."""
    groups = best_groups(comparison)
    best = [groups.isel(group=i) for i in range(groups.sizes["group"])]
    found = [_of_reference(comparison)] if comparison.reference is not None else []
    found += [_of_group(comparison, group) for group in best if int(group["group"]) != comparison.reference]
    found += [_of_edge(group) for group in best if str(group["edge"].values)]
    return found + [_of_batches(comparison, pair) for pair in range(comparison.batches.sizes["pair"])]


def best_groups(comparison: Comparison) -> xr.Dataset:
    """Returns one group a variant, that of its best learning rate, in reading order."""
    groups = comparison.groups.isel(group=reading_order(comparison.groups))
    return groups.isel(group=np.flatnonzero(groups["best"].values))


def reading_order(groups: xr.Dataset) -> np.ndarray:
    """Returns the groups' order for a reader: variants by steps of their best rate, those that failed last."""
    steps, lowest = groups["mean"].sel(measure="steps").values, groups["lowest_loss"].values
    lead = {int(groups["variant"][n]): n for n in np.flatnonzero(groups["best"].values)}
    rank = {variant: (np.nan_to_num(steps[n], nan=np.inf), lowest[n], n) for variant, n in lead.items()}
    rates = np.nan_to_num(groups["learning_rate"].values, nan=-1.0)
    variants = groups["variant"].values
    return np.array(
        sorted(range(groups.sizes["group"]), key=lambda n: (rank[int(variants[n])], rates[n])), dtype=int
    )


def steps_said(group: xr.Dataset) -> str:
    """Returns a group's steps to the target: `54.0 ± 0.6`, `2 of 3 reached` or `not reached in 400`."""
    seeds, reached = int(group["seeds"]), int(group["reached"])
    if reached == seeds:
        steps = group.sel(measure="steps")
        return plus_minus(float(steps["mean"]), float(steps["stderr"]))
    if reached:
        return f"{reached} of {seeds} reached"
    least, most = int(group["recorded_least"]), int(group["recorded_most"])
    return f"not reached in {most:,}" if least == most else f"not reached in {least:,} to {most:,}"


def loss_said(group: xr.Dataset) -> str:
    """Returns the lowest held-out loss of a group (the mean over seeds) or of a run."""
    lowest = float(group["lowest_loss"])
    return f"{lowest:.4g}" if np.isfinite(lowest) else "not finite"


def rate_said(group: xr.Dataset) -> str:
    """Returns a group's learning rate; `default` where the recipe leaves it to the optimizer."""
    rate = float(group["learning_rate"])
    return f"{rate:.6g}" if np.isfinite(rate) else "default"


def tuning_said(group: xr.Dataset) -> str:
    """Returns how a group's learning rate was found: `best of 5 rates, the largest tried`."""
    rates, edge = int(group["rates"]), str(group["edge"].values)
    if rates == 1:
        return "one rate tried"
    if int(group["reached"]) == 0:
        return f"none of {rates} rates reached it"
    return f"best of {rates} rates" + (f", the {edge}" if edge else "")


def study_ratio(method: str) -> float:
    """Returns how many times full GN's steps a method needs in the reference study; NaN where it says nothing."""
    said = {row.method: row.ratio_to_full_gn for row in reference_study("steps_to_loss")}
    return said.get(method, np.nan)


def _target(comparison: Comparison) -> str:
    return f"{comparison.target:.6g}"


def _basis(group: xr.Dataset) -> str:
    batch = float(group["tokens_per_step"])
    said = [counted(int(group["seeds"]), "seed"), f"learning rate {rate_said(group)} ({tuning_said(group)})"]
    return ", ".join([*said, f"{batch:,.0f} tokens a step"] if np.isfinite(batch) else said)


def _of_reference(comparison: Comparison) -> Finding:
    group = comparison.groups.sel(group=comparison.reference)
    mean, stderr = (group[name].sel(measure="steps") for name in ("mean", "stderr"))
    tokens = float(group["mean"].sel(measure="tokens_with_line_search"))
    reads = f", reading {tokens:,.0f} tokens, line search included" if np.isfinite(tokens) else ""
    return Finding(
        name="steps_reference",
        sentence=f"{group['label'].values} reaches a held-out loss of {_target(comparison)} nats per token in "
        f"{steps_said(group)} steps{reads}.",
        value=float(mean),
        stderr=_known(float(stderr)),
        basis=_basis(group),
        steps=(),
        headline=steps_said(group),
        label=f"steps of {group['label'].values} to {_target(comparison)}",
    )


def _of_group(comparison: Comparison, group: xr.Dataset) -> Finding:
    name = str(group["label"].values)
    ratio = group.sel(measure="steps")
    value, stderr = float(ratio["ratio"]), float(ratio["ratio_stderr"])
    if not np.isfinite(value):
        return _without_ratio(comparison, group)
    reference = comparison.groups.sel(group=comparison.reference)
    other, times = str(reference["label"].values), plus_minus(value, stderr)
    numbers = f"{steps_said(group)} against {steps_said(reference)}"
    to = f"to reach {_target(comparison)} nats per token"
    resolved = bool(ratio["ratio_low"] > 1 or ratio["ratio_high"] < 1)
    if resolved:
        sentence = f"{name} needs {times} times as many steps as {other} {to} ({numbers})"
    elif np.isfinite(stderr):
        sentence = f"{name} and {other} need numbers of steps {to} that are not told apart: {times} times ({numbers})"
    else:
        sentence = f"{name} took {times} times as many steps as {other} {to} ({numbers}), with no error known"
    gradients = group.sel(measure="gradient_equivalents")
    if np.isfinite(float(gradients["ratio"])):
        cost = plus_minus(float(gradients["ratio"]), float(gradients["ratio_stderr"]))
        sentence += f", at {cost} times the gradient equivalents"
    return Finding(
        name=f"steps_ratio.{name}",
        sentence=f"{sentence}.",
        value=value,
        stderr=_known(stderr),
        basis=f"{_basis(group)}; {_of_ratio(group, ratio)}{_study(group)}",
        steps=(),
        headline=times,
        label=f"times {other}'s steps: {name}",
        resolved=resolved,
    )


def _of_ratio(group: xr.Dataset, ratio: xr.Dataset) -> str:
    freedom = int(group["freedom"])
    if freedom < 1:
        return "one seed has no spread: no difference is claimed"
    pairs = "paired by seed, " if bool(group["paired"]) else ""
    low, high = float(ratio["ratio_low"]), float(ratio["ratio_high"])
    return (
        f"mean log-ratio, {pairs}95 % interval {low:.3g} to {high:.3g} by Student's t with "
        f"{counted(freedom, 'degree')} of freedom"
    )


def _study(group: xr.Dataset) -> str:
    theirs = study_ratio(str(group["method"].values))
    return f"; {CITATION}, 150M: {theirs:.3g} times" if np.isfinite(theirs) else ""


def _without_ratio(comparison: Comparison, group: xr.Dataset) -> Finding:
    """Returns what is to be said of a group that missed the target, or that has nothing to be compared with."""
    name, seeds, reached = str(group["label"].values), int(group["seeds"]), int(group["reached"])
    goal = f"a held-out loss of {_target(comparison)} nats per token"
    if reached == seeds:
        why = (
            "no full_gn run is among them to compare with"
            if "full_gn" not in comparison.groups["method"].values
            else "full GN did not reach it with every seed, so there is no ratio"
        )
        sentence = f"{name} reaches {goal} in {steps_said(group)} steps; {why}."
    elif reached:
        sentence = f"{name} reached {goal} with {reached} of {seeds} seeds, so there is no mean and no ratio."
    else:
        sentence = (
            f"{name} has not reached {goal} in {steps_said(group).removeprefix('not reached in ')} steps; its lowest "
            f"was {loss_said(group)}{', the mean over seeds' if seeds > 1 else ''}."
        )
    steps, stderr = (float(group[key].sel(measure="steps")) for key in ("mean", "stderr"))
    return Finding(
        name=f"steps.{name}",
        sentence=sentence,
        value=steps,
        stderr=_known(stderr),
        basis=_basis(group),
        steps=(),
    )


def _of_edge(group: xr.Dataset) -> Finding:
    name, edge = str(group["label"].values), str(group["edge"].values)
    return Finding(
        name=f"edge.{name}",
        sentence=f"The best learning rate of {name}, {rate_said(group)}, is the {edge} tried: a "
        f"{'larger' if edge == 'largest' else 'smaller'} one may do better.",
        value=float(group["learning_rate"]),
        stderr=None,
        basis=f"{int(group['rates'])} rates",
        steps=(),
    )


def _of_batches(comparison: Comparison, number: int) -> Finding:
    pair = comparison.batches.isel(pair=number)
    small, large = (comparison.groups.sel(group=int(pair[key])) for key in ("small", "large"))
    batches = [f"{float(group['tokens_per_step']):,.0f}" for group in (small, large)]
    name, factor = (
        METHODS.get(str(small["method"].values), str(small["method"].values)),
        float(pair["batch_ratio"]),
    )
    act = "Doubling" if np.isclose(factor, 2) else f"Multiplying by {factor:.3g}"
    said = [steps_said(group) for group in (small, large)]
    value, stderr = float(pair["ratio"]), float(pair["ratio_stderr"])
    fewer, pays = float(pair["ratio_high"]) < 1, 1 / factor
    target = f"{_target(comparison)} nats per token"
    change = f"{act} {name}'s batch from {batches[0]} to {batches[1]} tokens"
    if not np.isfinite(value):
        sentence = f"{change} cannot be judged by the steps to {target}: {said[0]} with the one, {said[1]} with the other."
        method = "every seed of both must reach the target"
    else:
        gain = "fewer" if fewer else "more" if float(pair["ratio_low"]) > 1 else "no resolved change"
        gain = gain if np.isfinite(stderr) else "no error known"
        sentence = (
            f"{change} changes steps to {target} from {said[0]} to {said[1]}, {plus_minus(value, stderr)} times ({gain}; "
            f"a batch that pays in full gives {pays:.3g})."
        )
        method = _of_ratio(pair, pair)
    return Finding(
        name=f"batch.{name}.{batches[0]}",
        sentence=sentence,
        value=value,
        stderr=_known(stderr),
        basis=f"learning rates {rate_said(small)} and {rate_said(large)}; {method}",
        steps=(),
        resolved=fewer or float(pair["ratio_low"]) > 1,
    )


def _known(stderr: float) -> float | None:
    return stderr if np.isfinite(stderr) else None
