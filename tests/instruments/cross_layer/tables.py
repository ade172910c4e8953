"""Tables of coupling drawn at random, with the variables and dimensions that the instrument declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.cross_layer.table import cross_layer_table
from hessprobe.schema.table import Table

BLOCKS = ["embedding", "block.0", "block.1", "block.2", "head"]


def as_recorded(table: Table, columns: Mapping[str, Any], steps: Sequence[int]) -> xr.Dataset:
    """Returns {variable: values, step first} with the dimensions, labels and attributes of a declared table."""
    dims = {variable.name: variable.dims for variable in table.variables}
    labels = {dim: np.array(names, dtype=object) for dim, names in table.coordinates.items()}
    used = {dim for name in columns for dim in dims[name]}
    return xr.Dataset(
        {name: (dims[name], values) for name, values in columns.items()}
        | {
            "recorded": ("step", np.ones(len(steps), dtype=bool)),
            "failure": ("step", np.array([""] * len(steps), dtype=object)),
        },
        coords={"step": list(steps)} | {dim: names for dim, names in labels.items() if dim in used},
        attrs=dict(table.attributes),
    )


def table(rows: int = 4, blocks: list[str] = BLOCKS, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    size = len(blocks)
    values = rng.random((rows, size, size))
    values = (values + values.transpose(0, 2, 1)) / 2
    columns = {
        "coupling": values,
        "coupling_stderr": 0.1 * values,
        "off_block_energy": rng.random(rows),
        "off_block_energy_stderr": 0.01 + rng.random(rows) / 50,
        "step_curvature": rng.random((rows, 2, size, size)),
    }
    declared = cross_layer_table(CrossLayerRecipe(), tuple(blocks))
    return as_recorded(declared, columns, [10 * row for row in range(rows)])
