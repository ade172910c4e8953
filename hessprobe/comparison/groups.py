"""Runs that differ only in their seed as one: mean and spread, the best of a learning-rate sweep, ratios, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.comparison.runs import ComparedRun
from hessprobe.reading.statistics import NO_RATIO, Ratio, ratio
from hessprobe.schema.optimizers import ENTRIES

METHODS = {
    "full_gn": "full GN",
    "layerwise_gn": "layerwise GN",
    "prox_linear": "prox-linear GN",
    **{name: entry.label for name, entry in ENTRIES.items()},
}
_BATCH = tuple(f"optimizer.{key}" for key in ("minibatches", "sequences", "batch", "line_search_minibatches"))
_OF_RATIO = {"ratio": "value", "ratio_stderr": "stderr", "ratio_low": "low", "ratio_high": "high"}


def grouped(found: Sequence[ComparedRun]) -> np.ndarray:
    """Returns each run's group, (run,) numbers from 0: equal where two runs differ in nothing but their seed."""
    numbers: dict[tuple, int] = {}
    keys = [(run.method, run.variant, repr(run.learning_rate)) for run in found]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def group_table(found: Sequence[ComparedRun], runs: xr.Dataset) -> xr.Dataset:
    """Returns the groups of a comparison's `runs`.

    Over groups: label, method, variant (groups of one variant differ in learning rate alone), learning_rate,
    tokens_per_step, seeds and reached (counts), recorded_least and recorded_most (steps), lowest_loss (mean; infinite
    where a run has none), best (of its variant's rates), rates (how many), edge ("largest" or "smallest" where the best
    rate is the last of its grid). By measure: mean, stderr (of the mean over seeds), least, most; NaN unless every seed
    reached the target.
    """
    members = [np.flatnonzero(runs["group"].values == n) for n in range(int(runs["group"].max()) + 1)]
    first = [found[indices[0]] for indices in members]
    statistics = np.stack([_statistics(runs["to_target"].values[indices]) for indices in members], axis=1)

    def over(variable: str, statistic: Callable) -> tuple[str, list]:
        return "group", [statistic(runs[variable].values[indices]) for indices in members]

    variants: dict[tuple, int] = {}
    groups = xr.Dataset(
        {
            "label": ("group", _labels(first)),
            "method": ("group", np.array([run.method for run in first], dtype=object)),
            "variant": ("group", [variants.setdefault((r.method, r.variant), len(variants)) for r in first]),
            "learning_rate": ("group", [run.learning_rate for run in first]),
            "tokens_per_step": ("group", [run.tokens_per_step for run in first]),
            "seeds": over("reached", len),
            "reached": over("reached", sum),
            "recorded_least": over("recorded", min),
            "recorded_most": over("recorded", max),
            "lowest_loss": over("lowest_loss", np.mean),
            **{
                name: (("group", "measure"), values)
                for name, values in zip(("mean", "stderr", "least", "most"), statistics, strict=True)
            },
        },
        coords={"group": np.arange(len(members)), "measure": runs["measure"].values},
    )
    return _tuned(groups, runs)


def _statistics(values: np.ndarray) -> np.ndarray:
    """Returns mean, standard error, least and most over seeds (4, measure) of `values` (seed, measure).

    Steps are known for every run that reached the target, so they alone say whether a seed is missing.
    """
    if not np.isfinite(values[:, 0]).all():
        return np.full((4, values.shape[1]), np.nan)
    alone = len(values) == 1
    error = np.full(values.shape[1], np.nan) if alone else values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.stack([values.mean(axis=0), error, values.min(axis=0), values.max(axis=0)])


def _tuned(groups: xr.Dataset, runs: xr.Dataset) -> xr.Dataset:
    """Returns the groups with the best learning rate of each variant marked.

    Rates are judged on the seeds that all of them ran: by how many reached the target, then by steps, then by loss.
    """
    best, edge = np.zeros(groups.sizes["group"], dtype=bool), np.full(groups.sizes["group"], "", dtype=object)
    rates = np.ones(groups.sizes["group"], dtype=int)
    for variant in np.unique(groups["variant"]):
        swept = np.flatnonzero(groups["variant"].values == variant).tolist()
        shared = set.intersection(*(set(by_seed(runs, n)) for n in swept))
        order = {n: _merit(runs, n, shared, int(groups["seeds"][n])) for n in swept}
        chosen = min(swept, key=lambda n: order[n])
        best[chosen], rates[swept] = True, len(swept)
        rate, grid = groups["learning_rate"].values[chosen], groups["learning_rate"].values[swept]
        if np.isfinite(grid).sum() > 1:  # one left to the optimizer's default has no place in the grid
            edge[chosen] = {np.nanmax(grid): "largest", np.nanmin(grid): "smallest"}.get(rate, "")
    return groups.assign(best=("group", best), rates=("group", rates), edge=("group", edge))


def _merit(runs: xr.Dataset, group: int, shared: set[int], seeds: int) -> tuple[float, ...]:
    rows = runs.isel(run=np.flatnonzero(runs["group"].values == group))
    if shared:
        rows = rows.isel(run=np.isin(rows["seed"].values, list(shared)))
    reached = rows["reached"].values
    steps = rows["to_target"].sel(measure="steps").values
    return -reached.mean(), steps.mean() if reached.all() else 0.0, -seeds, float(rows["lowest_loss"].mean())


def by_seed(runs: xr.Dataset, group: int, measure: str = "steps") -> dict[int, float]:
    """Returns {seed: what it needed} of a group; NaN where a seed did not reach the target."""
    rows = runs.isel(run=np.flatnonzero(runs["group"].values == group))
    values = rows["to_target"].sel(measure=measure).values
    return {int(seed): float(value) for seed, value in zip(rows["seed"].values, values, strict=True)}


def with_ratios(groups: xr.Dataset, runs: xr.Dataset, reference: int | None) -> xr.Dataset:
    """Returns the groups with their ratio to the reference by measure: ratio, ratio_stderr, ratio_low, ratio_high.

    The interval (low, high) is of 95 %; `paired` and `freedom` say how the error of steps was found. NaN where
    either did not reach the target with every seed, and for the reference itself.
    """
    found = [
        [
            NO_RATIO if reference in (None, number) else group_ratio(runs, number, reference, str(measure))
            for measure in groups["measure"].values
        ]
        for number in range(groups.sizes["group"])
    ]
    return groups.assign(
        {
            name: (("group", "measure"), np.array([[getattr(r, key) for r in row] for row in found]))
            for name, key in _OF_RATIO.items()
        }
    ).assign(
        paired=("group", [row[0].paired for row in found]),
        freedom=("group", [row[0].freedom for row in found]),
    )


def group_ratio(runs: xr.Dataset, group: int, other: int, measure: str = "steps") -> Ratio:
    """Returns how many times as much `group` needs as `other`, if every seed of both reached the target."""
    values, others = (by_seed(runs, number, measure) for number in (group, other))
    if not np.isfinite([*values.values(), *others.values()]).all():
        return NO_RATIO
    return ratio(values, others, _rounding(runs, group), _rounding(runs, other))


def _rounding(runs: xr.Dataset, group: int) -> float:
    """Returns the relative standard deviation that evaluating only now and then gives a group's steps."""
    rows = runs.isel(run=np.flatnonzero(runs["group"].values == group))
    steps = rows["to_target"].sel(measure="steps").values
    return float(np.sqrt(np.mean((rows["evaluated_within"].values / steps) ** 2 / 12)))


def batch_table(found: Sequence[ComparedRun], runs: xr.Dataset, groups: xr.Dataset) -> xr.Dataset:
    """Returns (pair,) one method at two neighbouring batch sizes, all else equal, each at its best learning rate.

    `small`, `large`: their groups; `batch_ratio` of tokens per step; ratio, ratio_stderr, ratio_low, ratio_high of
    steps, large to small, which is 1 / batch_ratio where a batch pays in full; `freedom`.
    """
    alike: dict[tuple, list[int]] = {}
    for number in np.flatnonzero(groups["best"].values):
        run = found[int(np.flatnonzero(runs["group"].values == number)[0])]
        # The number of steps goes with the batch where runs read equally many tokens.
        settings = tuple(pair for pair in run.variant if pair[0] not in (*_BATCH, "training.steps"))
        alike.setdefault((run.method, settings), []).append(int(number))
    batch = groups["tokens_per_step"].values
    pairs = []
    for numbers in alike.values():
        ordered = sorted(numbers, key=lambda n: batch[n])
        pairs += [(a, b) for a, b in pairwise(ordered) if batch[b] > batch[a]]
    ratios = [group_ratio(runs, large, small) for small, large in pairs]
    columns: Mapping[str, Any] = {
        "small": [small for small, _ in pairs],
        "large": [large for _, large in pairs],
        "batch_ratio": [batch[large] / batch[small] for small, large in pairs],
        **{name: [getattr(r, key) for r in ratios] for name, key in _OF_RATIO.items()},
        "paired": [r.paired for r in ratios],
        "freedom": [r.freedom for r in ratios],
    }
    return xr.Dataset({name: ("pair", np.array(column)) for name, column in columns.items()})


def _labels(first: Sequence[ComparedRun]) -> np.ndarray:
    """Returns each group's method and what sets its variant apart from the method's others."""
    labels = []
    for run in first:
        same = [dict(other.variant) for other in first if other.method == run.method]
        own = dict(run.variant)
        apart = [key for key in own if any(other.get(key) != own[key] for other in same)]
        said = [METHODS.get(run.method, run.method)]
        if own.get("optimizer.structure") == '"layerwise"' and run.method != "layerwise_gn":
            said = [f"layerwise {said[0]}"]
            apart = [key for key in apart if key != "optimizer.structure"]
        batches = {other.tokens_per_step for other in first if other.method == run.method}
        if len(batches) > 1:
            said[0] += f" at {run.tokens_per_step:,.0f} tokens a step"
            apart = [key for key in apart if key not in _BATCH]
        said += [f"{key.removeprefix('optimizer.')} {str(own[key]).strip(chr(34))}" for key in apart]
        labels.append(", ".join(said))
    return np.array(labels, dtype=object)
