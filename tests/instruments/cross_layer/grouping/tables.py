"""Sketches that are known whole, as a table stores them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer.grouping.sketches import Sketches
import itertools

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
    rows = []
    for seed in range(steps):
        s = of(*drawn(seed, rounds=8))
        row = {
            "kernel": (("block", "sketch", "other_sketch"), s.kernel.astype(np.float32)),
            "alignment": (("direction", "block", "sketch"), np.stack([s.alignment * np.nan, -s.alignment])),
            "gradient_norm2": (("block",), s.norm2),
            "sequence_tokens": (("sketch",), s.tokens[s.sequence]),
        }
        rows.append(xr.Dataset(row))
    coords = {
        "block": list(BLOCKS),
        "direction": ["update", "negative_gradient"],
        "step": [10 * i for i in range(steps)],
    }
    attributes = {"sketch_sequence": s.sequence.tolist(), "sketch_round": s.round.tolist()}
    return xr.concat(rows, dim="step").assign_coords(coords).assign_attrs(attributes)
