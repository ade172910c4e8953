"""Stored runs of invented numbers, written by the real store: what a training would leave, in no time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.cross_layer.table import cross_layer_table as declared_table
from hessprobe.instruments.train.table import train_table
from hessprobe.schema.table import Table
from hessprobe.store.writer import RunWriter

LAYERS = ("embedding", *(f"block.{i}" for i in range(4)), "head")
STEP_SIZES = (1.0, 0.5)


def attributes(blocks: Sequence[str] = LAYERS, **changes: Any) -> dict[str, Any]:
    """Returns root attributes as a run would carry them."""
    recipe = {"name": "nano", "optimizer": {"name": "full_gn", "inner_steps": 8}, "training": {"steps": 31}}
    return {
        "name": "nano-full-gn", "recipe": json.dumps(recipe), "seed": 0,
        "created": "2026-01-05T10:00:00+00:00",
        "versions": json.dumps({"hessprobe": "0.1.0", "torch": "2.13.0", "python": "3.11.2"}),
        "git_commit": "0123abc", "device": "cpu, 2 threads",
        "data": json.dumps({"source": "python standard library", "sha256": "ab12" * 16, "bytes": 12_345_678}),
        "partition": json.dumps({block: 1000 + 7 * i for i, block in enumerate(blocks)}),
    } | changes  # fmt: skip


def cross_layer_table(blocks: Sequence[str] = LAYERS, sketches: tuple[int, int] | None = None) -> Table:
    """Returns the layout of products; with `sketches` (sequences, rounds), that of layer kernels."""
    if sketches is None:
        return declared_table(CrossLayerRecipe(method="products"), tuple(blocks))
    sequences, rounds = sketches
    return declared_table(CrossLayerRecipe(sequences=sequences, rounds=rounds), tuple(blocks))


def cross_layer_row(blocks: Sequence[str], time: float, rng: np.random.Generator) -> dict[str, Any]:
    """Returns one row at `time` in [0, 1]: neighbours couple more, and coupling grows with time."""
    size = len(blocks)
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    noise = 0.02 * rng.standard_normal((size, size))
    coupling = np.exp(-distance / (1.2 + 1.5 * time)) * (0.35 + 0.4 * time) + (noise + noise.T) / 2
    np.fill_diagonal(coupling, 1.0)
    norms = np.exp(rng.standard_normal(size) * 0.5)
    fro2 = coupling * np.sqrt(np.outer(norms, norms))
    factors = rng.standard_normal((2, size, 3)) + 0.8
    return {
        "fro2": fro2, "fro2_stderr": 0.04 * fro2, "fro2_low": 0.93 * fro2, "fro2_high": 1.09 * fro2, "coupling": coupling,
        "coupling_stderr": np.where(distance == 0, 0.0, 0.015 + 0.01 * rng.random((size, size))),
        "off_block_energy": 1 - np.trace(fro2) / fro2.sum(), "off_block_energy_stderr": 0.012,
        "step_curvature": factors @ factors.transpose(0, 2, 1), "step_slope": rng.standard_normal((2, size)),
        "gradient_norm2": norms, "loss": 5.5 - 2 * time, "tokens": 1024.0, "sequences": 16.0, "damping": 0.0,
        "symmetry_gap": 3e-7, "seconds": 0.8 + 0.1 * rng.random(), "gradient_equivalents": 64.0,
        "peak_memory": 3.1e8,
    }  # fmt: skip


def sketches_row(
    blocks: Sequence[str], time: float, rng: np.random.Generator, sketches: tuple[int, int]
) -> dict[str, Any]:
    """Returns what layer kernels add to a row: blocks share directions, the first has next to no curvature, and at
    the very beginning there is so much that sketches do not reach the damping that serves later rows."""
    (sequences, rounds), width = sketches, 12
    shared = rng.standard_normal((rounds, sequences, width)) * np.geomspace(2.0, 0.4, width)
    kernel, along, norm2 = [], [], []
    for i in range(len(blocks)):
        own = rng.standard_normal((rounds, sequences, width)) * np.geomspace(1.0, 0.2, width)
        scale = (0.05 if i == 0 else 1.0) * (1.0 if time else 3.0)
        w = scale * ((1.1 + 0.5 * i / len(blocks)) * shared + own).reshape(rounds * sequences, width)
        g = np.full(width, 0.3) + 0.05 * rng.standard_normal(width)
        kernel.append(w @ w.T)
        along.append(w @ g)
        norm2.append(g @ g)
    return {
        "kernel": np.stack(kernel), "alignment": np.stack([np.full_like(along, np.nan), -np.stack(along)]),
        "gradient_norm2": np.array(norm2), "sequence_tokens": np.full(rounds * sequences, 64.0),
        "jacobi_radius": 3.2 - time, "jacobi_radius_held_out": 2.7 - time, "rounds": float(rounds),
        "coupling_error": 0.02,
    }  # fmt: skip


def train_row(step: int, last: int, evaluated: bool, rng: np.random.Generator) -> dict[str, Any]:
    loss = 2.1 + 3.4 * np.exp(-4 * step / max(last, 1)) + 0.03 * rng.standard_normal()
    size = float(rng.choice([1.0, 0.7071, 0.5]))
    return {
        "loss": loss, "held_out_loss": loss + 0.05 if evaluated else np.nan, "step_size": size,
        "update_norm": size, "outcome": "accepted", "decrease_ratio": 0.25 / 0.3, "peak_memory": 3.1e8,
        "inner_loss": np.array([loss]), "inner_loss_first": loss, "inner_loss_last": loss - 0.1,
        "inner_residual": 0.01, "inner_iterations": 5.0,
        "line_search_loss": np.array([loss, loss + 0.1]), "gradient_norm": 1.0,
        "predicted_decrease": 0.3 * np.exp(-3 * step / max(last, 1)), "tokens": 8192.0 * (step + 1),
        "actual_decrease": 0.25 * np.exp(-3 * step / max(last, 1)), "line_search_tokens": 4096.0 * (step + 1),
        "seconds": 2.5 * (step + 1), "probe_seconds": 0.2 * (step + 1),
        "gradient_equivalents": 30.0 * (step + 1),
    }  # fmt: skip


def write_long_run(folder: Path, *, blocks: Sequence[str], every: int, train_steps: int) -> Path:
    """Writes a run as `write_run` does, its tables in whole arrays: thousands of rows in seconds."""
    rng, steps = np.random.default_rng(0), range(0, train_steps, every)
    rows = {
        "train": [train_row(step, train_steps - 1, step % 5 == 0, rng) for step in range(train_steps)],
        "cross_layer": [cross_layer_row(blocks, step / train_steps, rng) for step in steps],
    }
    writer = RunWriter.create(folder, attributes(blocks))
    writer.add_table(train_table(STEP_SIZES, 1), range(train_steps))
    writer.add_table(cross_layer_table(blocks), steps)
    writer.close()
    for name, written in rows.items():
        group = zarr.open_group(folder / "log.zarr" / name, mode="r+", use_consolidated=False)
        columns: dict[str, Any] = {key: np.stack([row[key] for row in written]) for key in written[0]}
        for key, values in (columns | {"recorded": np.ones(len(written), dtype=bool)}).items():
            group[key][...] = values  # pyright: ignore
    return folder


def write_run(
    folder: Path,
    *,
    blocks: Sequence[str] = LAYERS,
    steps: Sequence[int] | None = tuple(range(0, 31, 5)),
    train_steps: int = 31,
    failed: Mapping[int, str] | None = None,
    blank: Sequence[int] = (),
    seed: int = 0,
    sketches: tuple[int, int] | None = None,
    **changes: Any,
) -> Path:
    """Writes a run and returns its folder.

    Args:
        folder: where to.
        blocks: block names.
        steps: the probed steps; None leaves the table out.
        train_steps: rows of the train table; 0 leaves it without rows.
        failed: {step: reason} of probed steps whose measurement failed.
        blank: probed steps whose row is recorded and NaN throughout.
        seed: of the invented numbers.
        sketches: (sequences, rounds) of layer kernels to store too.
        changes: root attributes to change.
    """
    rng = np.random.default_rng(seed)
    writer = RunWriter.create(folder, attributes(blocks, **changes))
    writer.add_table(train_table(STEP_SIZES, 1), range(train_steps) if train_steps else None)
    for step in range(train_steps):
        writer.write("train", step, train_row(step, train_steps - 1, step % 5 == 0, rng))
    if steps is not None:
        table = cross_layer_table(blocks, sketches)
        writer.add_table(table, steps)
        for step in steps:
            row = cross_layer_row(blocks, step / max(*steps, 1), rng)
            if sketches is not None:
                row |= sketches_row(blocks, step / max(*steps, 1), rng, sketches)
            if step in blank:
                row = {name: np.full(np.shape(value), np.nan) for name, value in row.items()}
            if step in (failed or {}):
                writer.fail("cross_layer", step, (failed or {})[step])
            else:
                writer.write("cross_layer", step, row)
    writer.close()
    return folder
