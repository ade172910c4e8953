"""Stored runs of the `preconditioner` table from a small quadratic world: every cell by dense linear algebra.

Sequences share a gradient and a curvature that couples their layers, and scatter about them, so that full Gauss-Newton is
ahead on its own batch, overfits a small one, and pays on held-out sequences from some size on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.preconditioner.table import preconditioner_table
from hessprobe.instruments.train.table import train_table
from hessprobe.store.writer import RunWriter
from tests.report.runs import LAYERS, STEP_SIZES, attributes, train_row

WIDTH, RANK, TOKENS = 4, 2, 64
RECIPE = PreconditionerRecipe(
    curvature_sequences=(4, 16, 64), held_out_sequences=96, folds=8, draws=2, dampings=(0.1, 0.01),
    condition_steps=5, groups=(2,),
)  # fmt: skip


class World:
    """Sequences' gradients (b, p) and curvatures A_b^T A_b, about a mean that couples layers as `mixing` says."""

    def __init__(self, layers: int, rng: np.random.Generator, scatter: float = 1.0) -> None:
        p = layers * WIDTH
        self.rng, self.layers, self.scatter = rng, layers, scatter
        shared = np.repeat(rng.standard_normal((2, WIDTH)), layers, axis=0).reshape(2, layers, WIDTH)
        own = 0.9 * rng.standard_normal((p, p)) / np.sqrt(p)
        self.mixing = own + 0.04 * rng.standard_normal((p, 2)) @ shared.reshape(2, p)
        self.gradient = 0.3 * self.mixing.T @ rng.standard_normal(p) / np.sqrt(p)

    def batch(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns gradients (count, p) and curvatures (count, p, p) of as many sequences."""
        p = self.gradient.size
        features = self.rng.standard_normal((count, RANK, p)) @ self.mixing / np.sqrt(RANK)
        noise = self.scatter * 0.05 * self.rng.standard_normal((count, p)) @ self.mixing
        return self.gradient + noise, np.einsum("brp,brq->bpq", features, features)


def directions(name: str, g: np.ndarray, G: np.ndarray, mu: float, layers: int) -> np.ndarray:
    """Returns the direction of an invented candidate: exact solves are exact, the others lie in between."""
    p, block = g.size, np.arange(g.size) // WIDTH
    same = block[:, None] == block
    if name == "full_gn":
        return -np.linalg.solve(G + mu * np.eye(p), g)
    if name == "layerwise_gn":
        return -np.linalg.solve(G * same + mu * np.eye(p), g)
    if name.startswith("grouped_gn_"):
        half = block < layers // 2
        return -np.linalg.solve(G * (half[:, None] == half) + mu * np.eye(p), g)
    diagonal = np.diag(G)
    if name == "gradient":
        return -g
    if name in ("muon", "update"):
        return -np.sign(g) * np.where(name == "update", np.sqrt(np.abs(g)), 1.0)
    if name in ("kfac", "ekfac", "soap", "shampoo"):
        share = {"kfac": 0.8, "ekfac": 0.95, "soap": 0.6, "shampoo": 0.4}[name]
        kept = np.where(np.eye(p, dtype=bool), 1.0, share) * same
        return -np.linalg.solve(G * kept + mu * np.eye(p), g)
    power = {"adam": 0.5, "sophia": 0.8, "diagonal_gn": 1.0}[name]
    return -g / (diagonal + mu) ** power


def preconditioner_row(
    recipe: PreconditionerRecipe, world: World, failing: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Returns one row of sequences of that world; candidates in `failing` are NaN with that reason."""
    layers, names, mus = world.layers, recipe.names, np.array(recipe.dampings)
    sizes, p = recipe.curvature_sequences, layers * WIDTH
    folds = min(recipe.folds, recipe.held_out_sequences)
    hg, hG = world.batch(recipe.held_out_sequences)
    fold_of = np.arange(recipe.held_out_sequences) * folds // recipe.held_out_sequences
    part_g = np.stack([hg[fold_of == f].sum(0) for f in range(folds)]) / len(hg)
    part_G = np.stack([hG[fold_of == f].sum(0) for f in range(folds)]) / len(hG)
    mean_g, mean_G, eye = part_g.sum(0), part_G.sum(0), np.eye(p)
    optimum = np.array([mean_g @ np.linalg.solve(mean_G + mu * eye, mean_g) / 2 for mu in mus])
    table = preconditioner_table(recipe, [f"block.{i}" for i in range(layers)])
    row: dict[str, Any] = {v.name: np.full(table.row_shape(v), np.nan) for v in table.variables}
    row["candidate_failure"] = np.array([(failing or {}).get(name, "") for name in names], dtype=object)
    row["optimal_decrease_held_out"], row["optimal_residual_held_out"] = optimum, np.full(mus.size, 1e-3)
    row["fold_tokens"] = TOKENS * np.bincount(fold_of, minlength=folds).astype(float)
    for draw in range(recipe.draws):
        gs, Gs = world.batch(sizes[-1])
        for s, size in enumerate(sizes):
            g, G = gs[:size].mean(0), Gs[:size].mean(0)
            for m, mu in enumerate(mus):
                best, row["optimal_residual"][draw, s, m] = -np.linalg.solve(G + mu * eye, g), 1e-3
                row["optimal_decrease"][draw, s, m] = -g @ best / 2
                for c, name in enumerate(names):
                    if name in (failing or {}):
                        continue
                    d, at = directions(name, g, G, mu, layers), (draw, c, s, m)
                    bend = d @ G @ d + mu * d @ d
                    row["slope"][at], row["curvature"][at], row["norm2"][at] = g @ d, d @ G @ d, d @ d
                    row["efficiency"][at] = (g @ d) ** 2 / bend / (-g @ best)
                    row["best_alpha"][at] = -(g @ d) / bend
                    row["cosine"][at] = d @ (G + mu * eye) @ best / np.sqrt(bend * (-g @ best))
                    row["slope_held_out"][at] = part_g @ d
                    row["curvature_held_out"][at] = np.einsum("p,fpq,q->f", d, part_G, d)
                    held_out = (mean_g @ d) ** 2 / 2 / (d @ mean_G @ d + mu * d @ d)
                    row["efficiency_held_out"][at] = held_out / optimum[m]
                    row["efficiency_held_out_stderr"][at] = 0.05
                    if name.endswith("_gn") or name.startswith("grouped"):
                        row["solver_residual"][at], row["solver_iterations"][at] = 2e-3, 12.0
                    if draw == 0 and size == sizes[-1] and m == 0:
                        _blocks(row, c, d, (g, G, mu), (part_g, part_G), layers)
    for c, name in enumerate(names if recipe.condition_steps else ()):
        if name in ("gradient", "diagonal_gn", "kfac", "ekfac", "layerwise_gn") and name not in (
            failing or {}
        ):
            row["ritz_max"][c], row["ritz_min"][c], row["condition"][c] = 20.0 / (c + 1), 0.5, 40.0 / (c + 1)
    row |= {
        "loss": 3.0, "tokens": float(TOKENS * recipe.sequences), "sequences": float(recipe.sequences), "loss_held_out": 3.1,
        "held_out_sequences_read": float(recipe.held_out_sequences),
        "curvature_sequences_read": np.array(recipe.curvature_sequences, float),
        "symmetry_gap": 2e-7, "seconds": 20.0, "gradient_equivalents": 300.0, "peak_memory": 4e8,
    }  # fmt: skip
    return row


def _blocks(row: dict[str, Any], c: int, d: np.ndarray, own: tuple, parts: tuple, layers: int) -> None:
    """Fills in what is known of a candidate block by block."""
    (g, G, mu), (part_g, part_G), shape = own, parts, (layers, WIDTH)
    split = np.zeros((layers, d.size))
    split[np.arange(d.size) // WIDTH, np.arange(d.size)] = d
    row["block_slope"][c], row["block_norm2"][c] = split @ g, (d.reshape(shape) ** 2).sum(1)
    row["block_curvature"][c] = split @ G @ split.T
    row["block_slope_held_out"][c] = split @ part_g.T
    row["block_curvature_held_out"][c] = np.einsum("ip,fpq,jq->ijf", split, part_G, split)
    for i in range(layers):
        at = slice(i * WIDTH, (i + 1) * WIDTH)
        damped = G[at, at] + mu * np.eye(WIDTH)
        best = g[at] @ np.linalg.solve(damped, g[at])
        row["block_efficiency"][c, i] = (g[at] @ d[at]) ** 2 / (d[at] @ damped @ d[at]) / best


def write_preconditioner_run(
    folder: Path,
    *,
    recipe: PreconditionerRecipe = RECIPE,
    blocks: Sequence[str] = LAYERS,
    steps: Sequence[int] = (0, 10, 20, 30),
    failed: Mapping[int, str] | None = None,
    failing: Mapping[str, str] | None = None,
    blank: Sequence[int] = (),
    train_steps: int = 31,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Writes a run with the tables `train` and `preconditioner` and returns its folder.

    Args:
        folder: where to.
        recipe: of the probe.
        blocks, steps: names of the blocks, measured steps.
        failed: {step: reason} of rows that failed.
        failing: {candidate: reason} of candidates that failed in every row.
        blank: steps whose row is NaN throughout.
        train_steps, seed: as of `write_run`.
        changes: root attributes to change.
    """
    rng = np.random.default_rng(seed)
    writer = RunWriter.create(folder, attributes(blocks, **changes))
    writer.add_table(train_table(STEP_SIZES, 1), range(train_steps) if train_steps else None)
    for step in range(train_steps):
        writer.write("train", step, train_row(step, train_steps - 1, step % 5 == 0, rng))
    writer.add_table(preconditioner_table(recipe, blocks), list(steps))
    world = World(len(blocks), rng)
    for step in steps:
        row = preconditioner_row(recipe, world, failing)
        if step in blank:
            row = {
                name: value if name == "candidate_failure" else np.full(np.shape(value), np.nan)
                for name, value in row.items()
            }
        if step in (failed or {}):
            writer.fail("preconditioner", step, (failed or {})[step])
        else:
            writer.write("preconditioner", step, row)
    writer.close()
    return folder
