"""What limits a comparison of runs, a sentence each: other devices, minibatches, models, starts; stops and gaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from hessprobe.comparison.runs import ComparedRun
from hessprobe.reading.wording import counted


def cautions(found: Sequence[ComparedRun], runs: xr.Dataset, target: float) -> tuple[str, ...]:
    """Returns what a reader must know before comparing these runs; empty where nothing limits them."""
    said = [*_of_settings(found), *_of_reach(found, runs, target)]
    return tuple(sentence for sentence in said if sentence)


def _of_settings(found: Sequence[ComparedRun]) -> list[str]:
    models = sorted({key for run in found for key in run.settings if key.startswith("model.")})
    unlike = [key for key in models if len(_values(found, lambda run, key=key: run.settings.get(key))) > 1]
    minibatches = _values(found, lambda run: run.settings.get("optimizer.sequences"))
    starts = {dict(run.variant).get("training.start_from", "from scratch").strip('"') for run in found}
    said = []
    if not any(run.data for run in found):
        said.append(
            "No run says what text it was trained on: that their losses are comparable is not checked."
        )
    if unlike:
        said.append(f"The runs train different models: they differ in {', '.join(unlike)}.")
    if len(starts) > 1:
        said.append(f"The runs do not all start from the same point: {', '.join(sorted(starts))}.")
    if len(minibatches) > 1:
        said.append(
            f"Minibatches differ ({', '.join(map(str, minibatches))} sequences): a gradient equivalent, the cost of one "
            "gradient of a run's own minibatch, is not the same in all runs."
        )
    devices = _values(found, lambda run: run.device or None)
    if len(devices) > 1:
        said.append(f"Seconds were taken on different devices: {'; '.join(map(str, devices))}.")
    return said


def _of_reach(found: Sequence[ComparedRun], runs: xr.Dataset, target: float) -> list[str]:
    reached = runs["reached"].values
    at_once = [
        run for i, run in enumerate(found) if reached[i] and run.curve["held_out_loss"].values[0] <= target
    ]
    stops = {run.label: _number(run, "training.stop_at") for run in found}
    early = [run for i, run in enumerate(found) if not reached[i] and run.lowest_loss <= stops[run.label]]
    unfinished = [
        run
        for run in found
        if run.lowest_loss > stops[run.label] and run.steps < _number(run, "training.steps")
    ]
    widest = np.nanmax(runs["evaluated_within"].values, initial=1.0)
    said = []
    if at_once:
        said.append(
            f"{counted(len(at_once), 'run')} ({_named(at_once)}) reached the target by the first evaluation: it is too "
            "high to tell methods apart there."
        )
    if early:
        said.append(
            f"{counted(len(early), 'run')} ({_named(early)}) stopped at a loss above this target (training.stop_at): "
            "that the target was not reached there says nothing of the method."
        )
    if unfinished:
        said.append(
            f"{counted(len(unfinished), 'run')} ({_named(unfinished)}) took fewer steps than the recipe asks for: in "
            "progress, cut off, or diverged."
        )
    if widest > 1:
        said.append(
            f"Held-out losses were not taken at every step: steps to the target may be up to {int(widest) - 1} too many."
        )
    return said


def _number(run: ComparedRun, key: str) -> float:
    value = run.settings.get(key)
    return float(value) if isinstance(value, int | float) else -np.inf


def _values(found: Sequence[ComparedRun], of: Callable) -> list:
    return sorted({value for run in found if (value := of(run)) is not None}, key=str)


def _named(runs: Sequence[ComparedRun], most: int = 3) -> str:
    names = ", ".join(run.label for run in runs[:most])
    return names if len(runs) <= most else f"{names} and {len(runs) - most} more"
