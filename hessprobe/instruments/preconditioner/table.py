"""What the table `preconditioner` holds, by recipe: declared before anything is measured.

A candidate's direction d is scaled by nothing: every figure here is along its best step, or says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import nan
from typing import Any

from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.schema.table import Table, Variable, declared

# Candidates with a part of their own: the exact solves by block and for all blocks, and the step the run really took.
LAYERWISE, FULL, UPDATE = "layerwise_gn", "full_gn", "update"
EVERY = ("step", "draw", "candidate", "curvature_sequences", "damping")
# A dimension of this table, where the others hold one number per row.
_MEASUREMENT = tuple(variable for variable in MEASUREMENT_VARIABLES if variable.name != "damping")


def preconditioner_table(
    recipe: PreconditionerRecipe, blocks: Sequence[str], candidates: Sequence[str] | None = None
) -> Table:
    """Returns the table's layout; candidates are the recipe's unless more are given."""
    return Table(
        name="preconditioner",
        variables=(
            *_quality(),
            *_held_out(recipe),
            *_solves(recipe),
            *_block_by_block(),
            *(_spectra(recipe) if recipe.condition_steps else ()),
            Variable(
                name="candidate_failure",
                dims=("step", "candidate"),
                units="text",
                long_name="why this candidate could not be judged; empty where it was",
                estimator="exact",
                dtype="str",
            ),
            *_MEASUREMENT,
        ),
        coordinates={
            "draw": list(range(recipe.draws)),
            "candidate": list(recipe.names if candidates is None else candidates),
            "curvature_sequences": list(recipe.curvature_sequences),
            "damping": list(recipe.dampings),
            "fold": list(range(min(recipe.folds, recipe.held_out_sequences))),
            "block": list(blocks),
            "other_block": list(blocks),
        },
        attributes={
            "preset": recipe.preset,
            "held_out_sequences": recipe.held_out_sequences,
            "block_damping": recipe.dampings[0],
            "cg_iterations": recipe.cg_iterations,
            "cg_tolerance": recipe.cg_tolerance,
            "groupings": {
                name: [list(group) for group in groups] for name, groups in recipe.groupings.items()
            },
        },
    )


@cache
def dims_of_variables() -> dict[str, tuple[str, ...]]:
    """Returns the dimensions of everything such a table may hold, those of condition numbers too."""
    whole = preconditioner_table(PreconditionerRecipe(condition_steps=1), ("any",))
    return {variable.name: variable.dims for variable in whole.variables}


def _quality():
    exact = "exact on the curvature batch but for full_gn's solve, see optimal_residual"
    return declared((
        ("efficiency", EVERY, "1", "(g.d)^2 / ((d.G_mu d) (g.G_mu^-1 g)) on the candidate's own curvature batch", exact),
        ("efficiency_held_out", EVERY, "1", "the same with gradient and curvature of the held-out batch",
         "exact on the held-out batch but for full_gn's solve, see optimal_residual_held_out"),
        ("efficiency_held_out_stderr", EVERY, "1", "standard error of efficiency_held_out, the optimum taken as exact",
         "jackknife over folds"),
        ("best_alpha", EVERY, "1", "-g.d / d.G_mu d: the best multiple of d on the curvature batch", "exact on the batch"),
        ("cosine", EVERY, "1", "cosine of d with the full Gauss-Newton direction in the G_mu norm", exact),
        ("slope", EVERY, "nats per token", "g.d on the curvature batch", "exact on the batch"),
        ("curvature", EVERY, "nats per token", "d.G d on the curvature batch, undamped", "exact on the batch"),
        ("norm2", EVERY, "1", "|d|^2", "exact"),
    ))  # fmt: skip


def _held_out(recipe: PreconditionerRecipe):
    fold = (*EVERY, "fold")
    exact = f"exact on the held-out sequences, in {min(recipe.folds, recipe.held_out_sequences)} folds"
    return declared((
        ("slope_held_out", fold, "nats per token", "the fold's part of g.d: the held-out figure is their sum", exact),
        ("curvature_held_out", fold, "nats per token", "the fold's part of d.G d, undamped: the figure is their sum", exact),
        ("fold_tokens", ("step", "fold"), "tokens", "tokens with a target in the fold", "counted"),
        ("loss_held_out", ("step",), "nats per token", "loss on the held-out batch", "exact"),
        ("held_out_sequences_read", ("step",), "sequences", "held-out sequences there were", "counted"),
        ("curvature_sequences_read", ("step", "curvature_sequences"), "sequences",
         "sequences that candidates were built on; less than the label where the batch held fewer", "counted"),
    ))  # fmt: skip


def _solves(recipe: PreconditionerRecipe):
    solve = f"conjugate gradients, at most {recipe.cg_iterations} iterations to {recipe.cg_tolerance:g}"
    optimum, held_out = ("step", "draw", "curvature_sequences", "damping"), ("step", "damping")
    return declared((
        ("optimal_decrease", optimum, "nats per token", "g.G_mu^-1 g / 2 on the curvature batch", solve),
        ("optimal_residual", optimum, "1", "|(G + mu) d + g| / |g| of that solve", solve),
        ("optimal_decrease_held_out", held_out, "nats per token", "g.G_mu^-1 g / 2 on the held-out batch", solve),
        ("optimal_residual_held_out", held_out, "1", "|(G + mu) d + g| / |g| of that solve", solve),
        ("solver_residual", EVERY, "1", "relative residual of the candidate's own solve; NaN where there is none", solve),
        ("solver_iterations", EVERY, "iterations", "iterations of the candidate's own solve", "counted"),
    ))  # fmt: skip


def _block_by_block():
    block, pair = ("step", "candidate", "block"), ("step", "candidate", "block", "other_block")
    own = "exact on draw 0's largest curvature batch, at the first damping: one Jacobian product per block"
    held_out = "exact on the held-out batch: one Jacobian product per block"
    return declared((
        ("block_efficiency", block, "1", "(g_i.d_i)^2 / ((d_i.G_mu,ii d_i) (g_i.G_mu,ii^-1 g_i)) on that batch", own),
        ("block_slope", block, "nats per token", "g_i.d_i on the curvature batch", own),
        ("block_norm2", block, "1", "|d_i|^2", own),
        ("block_curvature", pair, "nats per token", "d_i.G_ij d_j on the curvature batch, undamped", own),
        ("block_slope_held_out", (*block, "fold"), "nats per token", "the fold's part of g_i.d_i", held_out),
        ("block_curvature_held_out", (*pair, "fold"), "nats per token", "the fold's part of d_i.G_ij d_j", held_out),
    ))  # fmt: skip


def _spectra(recipe: PreconditionerRecipe):
    dims = ("step", "candidate", "damping")
    lanczos = f"Lanczos, at most {recipe.condition_steps} steps, on draw 0's largest curvature batch"
    of = "of M^-1/2 G_mu M^-1/2; NaN for a candidate that is not linear"
    return declared((
        ("ritz_max", dims, "1", f"largest Ritz value {of}", lanczos),
        ("ritz_max_residual", dims, "1", "an eigenvalue lies this near ritz_max", lanczos),
        ("ritz_min", dims, "1", f"smallest Ritz value {of}", lanczos),
        ("ritz_min_residual", dims, "1", "an eigenvalue lies this near ritz_min", lanczos),
        ("condition", dims, "1", f"ritz_max / ritz_min {of}: at most the true condition number", lanczos),
    ))  # fmt: skip


def asked_with(table: Any) -> tuple[float, ...]:
    """Returns a recorded table's first damping, largest curvature batch and held-out sequences: numbers depend on them."""
    held_out = float(table.attrs.get("held_out_sequences", nan))
    return float(table["damping"].values[0]), float(table["curvature_sequences"].values[-1]), held_out
