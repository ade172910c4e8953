"""What the table `gn_hessian` holds, by recipe: declared before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence

from hessprobe.errors import unknown_name
from hessprobe.instruments.gn_hessian.recipe import GNHessianRecipe
from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.schema.table import Table, declared, of_quantity

MATRICES = ("gauss_newton", "hessian", "residual")
DIRECTIONS = ("negative_gradient", "update", "gauss_newton_step", "top_eigenvector", "random")
LADDER_DIRECTIONS = ("update", "gauss_newton_step")
MODELS = ("gauss_newton", "hessian", "prox_linear", "loss")


def gn_hessian_table(recipe: GNHessianRecipe, blocks: Sequence[str]) -> Table:
    """Returns the table's layout.

    Raises:
        UserError: a density wanted of a block that does not exist.
    """
    for block in recipe.density_blocks:
        if block not in blocks:
            raise unknown_name("block of gn_hessian.density_blocks", block, blocks)
    density_blocks = list(dict.fromkeys(recipe.density_blocks))
    labels: dict[str, list] = {"density_block": density_blocks} if density_blocks else {}
    return Table(
        name="gn_hessian",
        variables=(
            *of_quantity("batch", _norms(recipe)),
            *_spectra(recipe, bool(density_blocks)),
            *_directions(),
            *_ladder(),
            *MEASUREMENT_VARIABLES,
        ),
        coordinates={
            "matrix": list(MATRICES),
            "block": list(blocks),
            "probe": list(range(recipe.lanczos_probes)),
            "ritz": list(range(recipe.lanczos_steps)),
            "direction": list(DIRECTIONS),
            "ladder_direction": list(LADDER_DIRECTIONS),
            "model": list(MODELS),
            "alpha": list(recipe.alphas),
            **labels,
        },
        attributes={
            "preset": recipe.preset,
            "quantity": "batch",
            "samples": recipe.samples,
            "block_samples": recipe.block_samples,
            "lanczos_steps": recipe.lanczos_steps,
            "lanczos_probes": recipe.lanczos_probes,
            "step_damping": recipe.damping,
        },
    )


def _norms(recipe: GNHessianRecipe):
    whole, each, row, per_block = (
        ("step", "matrix"),
        ("step", "matrix", "block"),
        ("step",),
        ("step", "block"),
    )
    probes = f"{recipe.samples} random sign vectors, the same for G, H and H - G (Hutchinson 1989)"
    block_probes = f"{recipe.block_samples} random sign vectors on the block, the same for G, H and H - G"
    kernels = (
        f"G: layer kernels of the batch, {ROUNDS} rounds of sign cotangents; H and H - G: {{}}, G's readings as control "
        "variate; where trace_rounds is 0, the probes alone"
    )
    trace, block_trace = (
        kernels.format(f"the {recipe.samples} probes"),
        kernels.format(f"the block's {recipe.block_samples} probes"),
    )
    trace_spread = (
        "G: spread over the rounds of each sequence; H and H - G: over probes, with G's in quadrature"
    )
    spread, left_out = "spread over probes", "jackknife over probes"
    return declared((
        ("fro2", whole, "nats^2", "squared Frobenius norm of the matrix", probes),
        ("fro2_stderr", whole, "nats^2", "standard error of fro2", spread),
        ("trace", whole, "nats", "trace of the matrix", trace),
        ("trace_stderr", whole, "nats", "standard error of trace", trace_spread),
        ("gn_gap", row, "1", "||H - G||_F / ||G||_F", left_out),
        ("gn_gap_stderr", row, "1", "standard error of gn_gap", left_out),
        ("cosine", row, "1", "E<Hv,Gv> / sqrt(E|Hv|^2 E|Gv|^2): the matrices' cosine", left_out),
        ("cosine_stderr", row, "1", "standard error of cosine", left_out),
        ("block_fro2", each, "nats^2", "squared Frobenius norm of the matrix's diagonal block", block_probes),
        ("block_fro2_stderr", each, "nats^2", "standard error of block_fro2", spread),
        ("block_trace", each, "nats", "trace of the matrix's diagonal block", block_trace),
        ("block_trace_stderr", each, "nats", "standard error of block_trace", trace_spread),
        ("trace_rounds", row, "rounds", "rounds of layer kernels behind the traces of G; 0: none", "counted"),
        ("block_gn_gap", per_block, "1", "||(H - G)_bb||_F / ||G_bb||_F", left_out),
        ("block_gn_gap_stderr", per_block, "1", "standard error of block_gn_gap", left_out),
        ("block_cosine", per_block, "1", "cosine of the diagonal blocks of H and G", left_out),
        ("block_cosine_stderr", per_block, "1", "standard error of block_cosine", left_out),
    ))  # fmt: skip


def _spectra(recipe: GNHessianRecipe, of_blocks: bool):
    extreme = ("step", "matrix")
    lanczos = f"Lanczos, {recipe.lanczos_steps} steps from {recipe.lanczos_probes} random start(s)"
    quadrature = f"stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017): {lanczos}"
    node = ("step", "matrix", "probe", "ritz")
    entries = [
        ("lambda_max", extreme, "nats", "largest Ritz value", lanczos),
        ("lambda_max_residual", extreme, "nats", "an eigenvalue lies this near lambda_max", lanczos),
        ("lambda_min", extreme, "nats", "smallest Ritz value", lanczos),
        ("lambda_min_residual", extreme, "nats", "an eigenvalue lies this near lambda_min", lanczos),
        ("ritz_value", node, "nats", "nodes of the spectral density, ascending; NaN beyond the Krylov space", quadrature),
        ("ritz_weight", node, "1", "weights of the nodes: each probe's sum to 1", quadrature),
        ("ritz_residual", node, "nats", "an eigenvalue lies this near the node", quadrature),
    ]  # fmt: skip
    if of_blocks:
        of_block = ("step", "matrix", "density_block", "probe", "ritz")
        entries += [
            (
                "block_ritz_value",
                of_block,
                "nats",
                "nodes of the diagonal block's spectral density",
                quadrature,
            ),
            ("block_ritz_weight", of_block, "1", "weights of those nodes", quadrature),
            (
                "block_ritz_residual",
                of_block,
                "nats",
                "an eigenvalue of the block lies this near",
                quadrature,
            ),
        ]
    return declared(entries)


def _directions():
    exact = "exact on the batch"
    return declared((
        ("direction_norm", ("step", "direction"), "1", "|d| of the direction as it is", exact),
        ("direction_slope", ("step", "direction"), "nats", "g.d / |d|", exact),
        ("direction_curvature", ("step", "matrix", "direction"), "nats", "d.Ad / |d|^2", exact),
        ("gauss_newton_step_residual", ("step",), "1", "|(G + mu) d + g| / |g| of that step",
         "conjugate gradients"),
        ("gauss_newton_step_iterations", ("step",), "iterations", "conjugate gradients' iterations", "counted"),
    ))  # fmt: skip


def _ladder():
    rung, gap = ("step", "ladder_direction", "model", "alpha"), ("step", "ladder_direction", "alpha")
    exact, spread = "exact on the batch", "spread over sequences"
    return declared((
        ("change", rung, "nats per token", "the model's value at theta + alpha d less the loss at theta", exact),
        ("beyond_second_order", gap, "nats per token", "prox-linear model less Gauss-Newton's quadratic: "
         "what the loss's higher orders add", exact),
        ("beyond_second_order_stderr", gap, "nats per token", "standard error of beyond_second_order", spread),
        ("linearisation", gap, "nats per token", "loss less prox-linear model: "
         "what linearising the network leaves out", exact),
        ("linearisation_stderr", gap, "nats per token", "standard error of linearisation", spread),
    ))  # fmt: skip


ROUNDS = 4
