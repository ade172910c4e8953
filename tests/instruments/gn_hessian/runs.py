"""Tables `gn_hessian` of matrices that are known whole: small G and H = G + R, their own eigenvalues as Lanczos nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.table import gn_hessian_table
from hessprobe.reading.labelled import Labelled
from hessprobe.recipe import GNHessianRecipe
from hessprobe.store.writer import RunWriter
from tests.report.runs import LAYERS, write_run

WIDTH = 4  # parameters a block
ALPHAS = (0.25, 0.5, 1.0, 2.0)
STEPS = (0, 6, 12, 18, 24, 30)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a row was made of: G, H and R (3, n, n), and the directions (5, n)."""

    matrices: np.ndarray
    directions: np.ndarray


def recipe(probes: int = 3, blocks: int = len(LAYERS), density_blocks: Sequence[str] = ()) -> GNHessianRecipe:
    return GNHessianRecipe(
        samples=8,
        block_samples=2,
        lanczos_probes=probes,
        lanczos_steps=WIDTH * blocks,
        alphas=ALPHAS,
        density_blocks=tuple(density_blocks),
    )


def truth(blocks: int, time: float, rng: np.random.Generator) -> Truth:
    """Returns matrices at `time` in [0, 1]: the residual, a half as large as G at first, fades to a tenth."""
    n = WIDTH * blocks
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    g = basis @ np.diag(np.geomspace(10.0, 1e-3, n)) @ basis.T
    r = rng.standard_normal((n, n))
    r = (r + r.T) / 2
    r *= (0.5 - 0.4 * time) * np.linalg.norm(g) / np.linalg.norm(r)
    directions = rng.standard_normal((5, n))
    directions[3] = basis[:, 0]
    return Truth(matrices=np.stack([g, g + r, r]), directions=directions)


def nodes(matrices: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a whole Lanczos run's Ritz values and weights (matrix, start, n): eigenvalues, (q.v)^2 / |v|^2."""
    values, vectors = np.linalg.eigh(matrices)
    weights = np.einsum("mij,ki->mkj", vectors, starts) ** 2 / (starts**2).sum(1)[:, None]
    return np.broadcast_to(values[:, None], weights.shape), weights


def gn_hessian_row(
    time: float,
    rng: np.random.Generator,
    *,
    blocks: int = len(LAYERS),
    probes: int = 3,
    density_blocks: Sequence[int] = (),
) -> tuple[dict[str, Any], Truth]:
    """Returns one row of exact numbers with invented errors (5 % of each), and what it was made of."""
    made = truth(blocks, time, rng)
    (g, h, _), n = made.matrices, WIDTH * blocks
    starts = rng.choice([-1.0, 1.0], (probes, n))
    value, weight = nodes(made.matrices, starts)
    squares = (made.matrices**2).reshape(3, blocks, WIDTH, blocks, WIDTH).sum((2, 4))
    block_fro2 = np.diagonal(squares, axis1=1, axis2=2)
    blockwise = made.matrices.reshape(3, blocks, WIDTH, blocks, WIDTH)
    diagonal = np.einsum("mbibj->mbij", blockwise)
    traces = np.einsum("mbii->mb", diagonal)
    overlap = (diagonal[0] * diagonal[1]).sum((1, 2)) / np.sqrt(block_fro2[0] * block_fro2[1])
    fro2, norms = (made.matrices**2).sum((1, 2)), np.linalg.norm(made.directions, axis=1)
    along = np.einsum("mij,di,dj->md", made.matrices, made.directions, made.directions) / norms**2
    slope = -np.linspace(0.5, 0.1, 5)
    exact = {
        "fro2": fro2, "trace": traces.sum(1), "block_fro2": block_fro2, "block_trace": traces,
        "gn_gap": np.sqrt(fro2[2] / fro2[0]), "cosine": (g * h).sum() / np.sqrt(fro2[0] * fro2[1]),
        "block_gn_gap": np.sqrt(block_fro2[2] / block_fro2[0]), "block_cosine": overlap,
        **ladder_row(slope[1:3], along[:, 1:3], time),
    }  # fmt: skip
    errors = {f"{name}_stderr": 0.05 * np.abs(each) for name, each in exact.items() if name != "change"}
    row = exact | errors | {
        "lambda_max": value[:, 0, -1], "lambda_min": value[:, 0, 0], "lambda_max_residual": np.full(3, 1e-3),
        "lambda_min_residual": np.full(3, 1e-3), "ritz_value": value, "ritz_weight": weight,
        "ritz_residual": np.zeros_like(weight), "direction_norm": norms, "direction_slope": slope,
        "direction_curvature": along, "gauss_newton_step_residual": 0.009, "gauss_newton_step_iterations": 15.0,
        "loss": 5.5 - 2 * time, "tokens": 2048.0, "sequences": 32.0, "damping": 0.0, "symmetry_gap": 3e-7, "trace_rounds": 4,
        "seconds": 12.0 + rng.random(), "gradient_equivalents": 264.0, "peak_memory": 6.5e8,
    }  # fmt: skip
    if density_blocks:
        found = [nodes(diagonal[:, b], rng.choice([-1.0, 1.0], (probes, WIDTH))) for b in density_blocks]
        for name, at in (("block_ritz_value", 0), ("block_ritz_weight", 1)):
            padded = np.full((3, len(density_blocks), probes, n), np.nan)
            padded[..., :WIDTH] = np.stack([pair[at] for pair in found], 1)
            row[name] = padded
        row["block_ritz_residual"] = np.zeros_like(row["block_ritz_value"])
    return row, made


def ladder_row(slope: np.ndarray, along: np.ndarray, time: float) -> dict[str, np.ndarray]:
    """Returns changes of the four models, and the two errors: of opposite signs, the linearisation's the larger."""
    alpha = np.array(ALPHAS)
    quadratic = slope[:, None] * alpha + 0.5 * along[0][:, None] * alpha**2
    beyond = (0.02 + 0.01 * np.arange(2))[:, None] * alpha**3
    linear = -(0.08 - 0.05 * time) * np.ones(2)[:, None] * alpha**2
    by_h = quadratic + 0.5 * along[2][:, None] * alpha**2
    change = np.stack([quadratic, by_h, quadratic + beyond, quadratic + beyond + linear], 1)
    return {"change": change, "beyond_second_order": beyond, "linearisation": linear}


def add_gn_hessian(
    folder: Path,
    *,
    blocks: Sequence[str] = LAYERS,
    steps: Sequence[int] = STEPS,
    failed: Mapping[int, str] | None = None,
    blank: Sequence[int] = (),
    probes: int = 3,
    density_blocks: Sequence[str] = (),
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> dict[int, Truth]:
    """Adds the table to a written run and returns what each row was made of.

    Args:
        folder: of the run.
        blocks, steps: names, and the probed steps.
        failed: {step: reason}.
        blank: steps whose row is NaN throughout.
        probes: Lanczos starts.
        density_blocks: blocks with densities of their own.
        seed: of the invented matrices.
        changes: {variable: value} in every row.
    """
    rng, made = np.random.default_rng(seed), {}
    writer = RunWriter.reopen(folder)
    writer.add_table(gn_hessian_table(recipe(probes, len(blocks), density_blocks), blocks), steps)
    for step in steps:
        places = [list(blocks).index(name) for name in density_blocks]
        row, made[step] = gn_hessian_row(
            step / max(*steps, 1), rng, blocks=len(blocks), probes=probes, density_blocks=places
        )
        row |= changes or {}
        if step in blank:
            row = {name: np.full(np.shape(value), np.nan) for name, value in row.items()}
        if step in (failed or {}):
            writer.fail("gn_hessian", step, (failed or {})[step])
        else:
            writer.write("gn_hessian", step, row)
    writer.close()
    return made


def write_gn_run(folder: Path, *, train_steps: int = 31, **options: Any) -> tuple[Path, dict[int, Truth]]:
    """Writes a run with the tables `train` and `gn_hessian`; returns its folder and what its rows were made of."""
    blocks = options.get("blocks", LAYERS)
    write_run(folder, blocks=blocks, steps=None, train_steps=train_steps)
    return folder, add_gn_hessian(folder, **options)


def alone(table: xr.Dataset) -> list[Labelled[GNHessianAnswers]]:
    """Returns one run of a table, as sections and pictures take it."""
    answers = GNHessianAnswers(table)
    return [Labelled(label="run", answers=answers, compared=answers)]
