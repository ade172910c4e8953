"""Which runs are compared: found in folders, read once, and told apart by recipe (method, learning rate, seed).

What cannot take part is kept with its reason; runs on different text or held-out windows are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.errors import UserError
from hessprobe.reading.clocks import CLOCKS
from hessprobe.reading.rows import sound_rows
from hessprobe.store.log import LOG
from hessprobe.store.reader import open_run

# Settings that two runs of one training may differ in: they change what is seen of it, or when it ends.
_SEEN = {"training.threads", "training.checkpoint_every", "training.evaluate_every", "training.stop_at"}
_TRAINED = ("model.", "optimizer.", "training.")  # not data: that all runs share it is checked
RATE = "optimizer.learning_rate"


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run as a comparison needs it.

    Attributes:
        path, label: its folder, and that folder below the one all runs share.
        settings: its recipe, flat: {"optimizer.name": "adamw", ...}; what a recipe leaves to defaults is absent.
        seed: None where none was recorded.
        curve: held_out_loss and clocks at the rows that were evaluated, by `taken`: steps taken so far, counted
            from the run's first row.
        steps: outer steps recorded so far, evaluated or not.
        tokens_per_step: tokens an outer step reads, its line search apart.
        device, data: where it ran; what its held-out loss is the loss of.
    """

    path: Path
    label: str
    settings: Mapping[str, Any]
    seed: int | None
    curve: xr.Dataset
    steps: int
    tokens_per_step: float
    device: str
    data: tuple[tuple[str, Any], ...]

    @property
    def method(self) -> str:
        """The recipe's name of the optimizer; the run's label where no recipe was recorded."""
        return str(self.settings.get("optimizer.name", self.label))

    @property
    def lowest_loss(self) -> float:
        """The lowest held-out loss so far, nats per token; infinite where none was finite."""
        return float(np.min(self.curve["held_out_loss"].values, initial=np.inf))

    @property
    def learning_rate(self) -> float:
        """NaN where the recipe leaves it to the optimizer's default."""
        rate = self.settings.get(RATE)
        return float(rate) if isinstance(rate, int | float) else np.nan

    @property
    def variant(self) -> tuple[tuple[str, Any], ...]:
        """All that makes this training what it is, but its learning rate and seed."""
        if not self.settings or self.seed is None:
            return (("run", self.label),)
        kept = {
            key: value
            for key, value in self.settings.items()
            if key == "partition" or (key.startswith(_TRAINED) and key not in _SEEN and key != RATE)
        }
        if "training.start_from" in kept:  # each seed starts from its own warm-up
            parts = Path(str(kept["training.start_from"])).parts
            kept["training.start_from"] = "/".join("seed" if p == f"seed-{self.seed}" else p for p in parts)
        return tuple(sorted((key, json.dumps(value)) for key, value in kept.items()))


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Returns the folders of all runs at or below the given ones, each once, in the order of paths.

    Raises:
        UserError: a path that is not there, or holds no run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        within = [path.parent] if path.name == LOG else list(_runs_within(path))
        if not within:
            what = (
                f"neither it nor a folder below it holds a {LOG}"
                if path.is_dir()
                else "it is not a folder"
                if path.exists()
                else "there is no such folder"
            )
            raise UserError(f"no run at {path}: {what}; give runs' folders, or folders that contain runs")
        for run in within:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_within(path: Path) -> Iterator[Path]:
    # Not rglob: a log holds thousands of files, and no run lies inside another.
    for folder, folders, _ in os.walk(path):
        if LOG in folders:
            folders.clear()
            yield Path(folder)
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def read_runs(paths: Sequence[Path]) -> tuple[list[ComparedRun], dict[str, str]]:
    """Returns the runs that can be compared, and {label: reason} of those left out.

    Left out: runs that others started from, repeats of one recipe and seed, runs without a step yet, and, where a
    folder was searched, runs that cannot be read.

    Raises:
        UserError: no run; none with a step; a run given by its own name that cannot be read; runs whose
            held-out losses are of different text or windows.
    """
    given = {Path(path).resolve() for path in paths}
    folders = find_runs(paths)
    shared = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    runs, left_out = [], {}
    for folder in folders:
        own = folder.resolve()
        label = own.name if own == shared else own.relative_to(shared).as_posix()
        try:
            run = _read(folder, label)
        except UserError as error:
            if own in given:
                raise
            left_out[label] = str(error)
            continue
        if run is None:
            left_out[label] = "it holds no training step yet"
        else:
            runs.append(run)
    if not runs:
        raise UserError("nothing to compare: " + "; ".join(f"{k}: {v}" for k, v in left_out.items()))
    runs, aside = _without_warmups(runs, given)
    _check_comparable(runs)
    runs, repeats = _without_repeats(runs)
    return runs, left_out | aside | repeats


def _read(folder: Path, label: str) -> ComparedRun | None:
    tree = open_run(folder)
    if "train" not in tree.children:
        return None
    table = tree["train"].to_dataset()
    table = table[[name for name in (*CLOCKS, "held_out_loss", "failure") if name in table]]
    try:
        table = table.load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder}: table 'train' is damaged ({error}); copy the run again") from error
    if "held_out_loss" not in table or table.sizes["step"] == 0:
        return None
    # A run that diverged may have no finite loss at all: it is one that did not reach the target.
    curve = sound_rows(table, "held_out_loss")
    first, settings = int(table["step"][0]), dict(_flat(_json(tree.attrs.get("recipe"))))
    seed = settings.get("seed", tree.attrs.get("seed"))
    curve = curve.assign_coords(taken=("step", curve["step"].values - first + 1))
    return ComparedRun(
        path=folder,
        label=label,
        settings=settings,
        seed=seed if isinstance(seed, int) else None,
        curve=curve.drop_vars("failure", errors="ignore"),
        steps=int(table["step"][-1]) - first + 1,
        tokens_per_step=_per_step(table),
        device=str(tree.attrs.get("device") or ""),
        data=_held_out_identity(_json(tree.attrs.get("data")), settings),
    )


def _per_step(table: xr.Dataset) -> float:
    tokens = table["tokens"].values if "tokens" in table else np.array([np.nan])
    gaps = np.diff(tokens) / np.diff(table["step"].values) if tokens.size > 1 else tokens
    return float(np.median(gaps))


def _held_out_identity(data: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns what decides the held-out windows: the text, the part held out, how many windows of what length."""
    of_text = (
        ("sha256", "tokens", "held_out_tokens", "vocabulary") if "sha256" in data else tuple(sorted(data))
    )
    of_windows = ("data.held_out_fraction", "data.held_out_sequences", "model.context")
    found = {key: data.get(key) for key in of_text} | {key: settings.get(key) for key in of_windows}
    return tuple((key, json.dumps(value)) for key, value in found.items() if value is not None)


def _without_warmups(
    runs: Sequence[ComparedRun], given: set[Path]
) -> tuple[list[ComparedRun], dict[str, str]]:
    """Sets aside the runs that others started from, unless they were given by name or nothing else is left."""
    starts = [Path(str(s)) for run in runs if (s := run.settings.get("training.start_from")) is not None]
    # A start is a run's folder or a checkpoint file somewhere in it.
    tails = {tuple(p.parts[-2:]) for start in starts for p in (start, *list(start.parents)[:2])}
    aside = [
        run.label
        for run in runs
        # By the end of the path: a study's folder may have been moved since.
        if tuple(run.path.resolve().parts[-2:]) in tails and run.path.resolve() not in given
    ]
    kept = [run for run in runs if run.label not in aside]
    if not kept:
        return list(runs), {}
    return kept, dict.fromkeys(aside, "others started from it")


def _without_repeats(runs: Sequence[ComparedRun]) -> tuple[list[ComparedRun], dict[str, str]]:
    """Sets aside second runs of one recipe and seed, which would pass for another seed with no spread."""
    first: dict[tuple, ComparedRun] = {}
    repeats = {}
    for run in runs:
        key = (run.variant, run.settings.get(RATE), run.seed)
        if first.setdefault(key, run) is not run:
            repeats[run.label] = f"the recipe and seed of {first[key].label}"
    return [run for run in runs if run.label not in repeats], repeats


def _check_comparable(runs: Sequence[ComparedRun]) -> None:
    for run in runs[1:]:
        if run.data == runs[0].data:
            continue
        one, other = dict(runs[0].data), dict(run.data)
        apart = [
            f"{key} {one.get(key, 'not recorded')} against {other.get(key, 'not recorded')}"
            for key in (*one, *(key for key in other if key not in one))
            if one.get(key) != other.get(key)
        ]
        raise UserError(
            f"the held-out losses of {runs[0].label} and {run.label} are not comparable, they are of different "
            f"data ({'; '.join(apart)}); compare runs on one text with one held-out set"
        )


def _json(text: Any) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value
