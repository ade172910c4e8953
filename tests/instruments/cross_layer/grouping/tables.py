"""Sketches that are known whole, as a table stores them."""

from __future__ import annotations

import itertools

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer.grouping.sketches import Sketches
from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.cross_layer.table import cross_layer_table
from tests.instruments.cross_layer.tables import as_recorded

BLOCKS = ("a", "b", "c", "d")


STARTS = np.array([0, 5, 9, 16, 20])


def of(w: np.ndarray, g: np.ndarray, tokens: np.ndarray, starts: np.ndarray = STARTS) -> Sketches:
    """Returns what the sketches w (rounds, sequences, p) know."""
    rounds, count, _ = w.shape
    flat = w.reshape(rounds * count, -1)
    parts = [slice(i, j) for i, j in itertools.pairwise(starts)]
    return Sketches(
        blocks=tuple("abcdefgh"[: len(parts)]),
        kernel=np.stack([flat[:, s] @ flat[:, s].T for s in parts]),
        alignment=np.stack([flat[:, s] @ g[s] for s in parts]),
        norm2=np.array([g[s] @ g[s] for s in parts]),
        sequence=np.tile(np.arange(count), rounds),
        round=np.repeat(np.arange(rounds), count),
        tokens=tokens,
    )


def drawn(seed: int = 0, rounds: int = 4, count: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    w, g = rng.standard_normal((rounds, count, 20)), rng.standard_normal(20)
    return w, g, rng.integers(3, 9, count).astype(float)


def table(steps: int = 2) -> xr.Dataset:
    recipe = CrossLayerRecipe(sequences=6, rounds=8)
    rows = [of(*drawn(seed, rounds=recipe.rounds)) for seed in range(steps)]
    columns = {
        "kernel": np.stack([s.kernel.astype(np.float32) for s in rows]),
        "alignment": np.stack([np.stack([s.alignment * np.nan, -s.alignment]) for s in rows]),
        "gradient_norm2": np.stack([s.norm2 for s in rows]),
        "sequence_tokens": np.stack([s.tokens[s.sequence] for s in rows]),
    }
    return as_recorded(cross_layer_table(recipe, BLOCKS), columns, [10 * i for i in range(steps)])
