"""Runs small enough to be trained many times over: one layer of width 8 on a text made up on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from hessprobe.recipe import Recipe, build_recipe

WORDS = ["layer", "block", "head", "gradient", "curvature", "matrix", "step", "of", "the", "and"]
# What differs between two runs of one recipe: the clock's doing.
CLOCK = ("seconds", "probe_seconds", "peak_memory")


def text_file(folder: Path) -> Path:
    """Returns a text of some 10 kB in a folder."""
    path = folder / "text.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(random.Random(0).choices(WORDS, k=1500)), encoding="utf-8")
    return path


def tiny(source: Path) -> list[str]:
    """Returns the settings of a tiny run on a text; everything else is the default recipe's."""
    return [
        f"data.source={source}", "data.held_out_sequences=4", "training.threads=1", "model.layers=1",
        "model.width=8", "model.feedforward=8", "model.heads=2", "model.context=8", "optimizer.minibatches=2",
        "optimizer.sequences=2", "cross_layer.sequences=4", "cross_layer.samples=2", "cross_layer.every=2",
    ]  # fmt: skip


def recipe(folder: Path, *settings: str) -> Recipe:
    """Returns a tiny recipe on a text beside the run's folder."""
    return build_recipe({}, [*tiny(text_file(folder.parent)), *settings])


def state(folder: Path) -> dict[str, Any]:
    """Returns the last checkpoint of a run."""
    return torch.load(folder / "checkpoint" / "state.pt", weights_only=True)


def parameters(folder: Path) -> torch.Tensor:
    """Returns theta (p,) as the last checkpoint has it."""
    return state(folder)["parameters"]


def tables(folder: Path) -> dict[str, xr.Dataset]:
    """Returns the recorded rows of every table, in memory."""
    log = folder / "log.zarr"
    found = {}
    for path in sorted(log.glob("*/zarr.json")):
        table = xr.open_zarr(log, group=path.parent.name, consolidated=False).load()
        found[path.parent.name] = table.isel(step=table.recorded.values)
    return found


def attributes(folder: Path) -> dict[str, Any]:
    """Returns the root attributes of a run's log, read without zarr."""
    return json.loads((folder / "log.zarr" / "zarr.json").read_text())["attributes"]


def assert_same_rows(one: Path, other: Path) -> None:
    """Both runs recorded the same numbers, bit for bit, but for what the clock says."""
    first, second = tables(one), tables(other)
    assert set(first) == set(second)
    for name, table in first.items():
        assert set(table.variables) == set(second[name].variables)
        for variable in set(table.variables) - set(CLOCK):
            np.testing.assert_array_equal(table[variable].values, second[name][variable].values, variable)
