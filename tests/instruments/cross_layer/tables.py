"""Tables of coupling drawn at random."""

from __future__ import annotations

import numpy as np
import xarray as xr

BLOCKS = ["embedding", "block.0", "block.1", "block.2", "head"]


def table(rows: int = 4, blocks: list[str] = BLOCKS, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    size, directions = len(blocks), ("step", "direction", "block", "other_block")
    values = rng.random((rows, size, size))
    values = (values + values.transpose(0, 2, 1)) / 2
    pair, names = ("step", "block", "other_block"), np.array(blocks, dtype=object)
    return xr.Dataset(
        {
            "coupling": (pair, values),
            "coupling_stderr": (pair, 0.1 * values),
            "off_block_energy": ("step", rng.random(rows)),
            "off_block_energy_stderr": ("step", 0.01 + rng.random(rows) / 50),
            "step_curvature": (directions, rng.random((rows, 2, size, size))),
            "recorded": ("step", np.ones(rows, dtype=bool)),
            "failure": ("step", np.array([""] * rows, dtype=object)),
        },
        coords={"step": np.arange(rows) * 10, "block": names, "other_block": names,
                "direction": np.array(["update", "negative_gradient"], dtype=object)},
    )  # fmt: skip
