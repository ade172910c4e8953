"""Rows of the table `gn_hessian` from what was estimated, variable by variable."""

from __future__ import annotations

import torch
from torch import Tensor

from hessprobe.estimation.density import SpectralDensity
from hessprobe.estimation.sampling import Estimate
from hessprobe.estimation.shared_probes import SharedProbes
from hessprobe.optimization.model_ladder import Ladder


def ladder_rows(ladder: Ladder, residual_curvature: Tensor) -> dict[str, Tensor]:
    """Returns one direction's ladder; d.R d, NaN where there is no such direction, makes the Hessian's model of it."""
    there = 0 * residual_curvature
    quadratic = ladder.mean(ladder.quadratic)
    models = (
        quadratic,
        quadratic + 0.5 * residual_curvature * ladder.alphas.square(),
        ladder.mean(ladder.prox_linear),
        ladder.mean(ladder.loss),
    )
    beyond, bent = ladder.prox_linear - ladder.quadratic, ladder.loss - ladder.prox_linear
    return {
        "change": torch.stack(models) + there,
        "beyond_second_order": ladder.mean(beyond) + there,
        "beyond_second_order_stderr": ladder.stderr(beyond) + there,
        "linearisation": ladder.mean(bent) + there,
        "linearisation_stderr": ladder.stderr(bent) + there,
    }


def norm_rows(probes: SharedProbes, known: Estimate | None = None) -> dict[str, Tensor]:
    """Returns norms, traces and ratios of G, H and R; traces from tr G where that is known better from elsewhere."""
    quantities = {
        "fro2": probes.norms,
        "trace": probes.traces if known is None else probes.traces_given(known),
        "gn_gap": probes.gap,
        "cosine": probes.cosine,
    }
    means = {name: estimate.mean for name, estimate in quantities.items()}
    return means | {f"{name}_stderr": estimate.stderr for name, estimate in quantities.items()}


def node_rows(densities: dict[str, SpectralDensity]) -> dict[str, Tensor]:
    """Returns the Ritz values of the matrices with their weights and residuals, (matrix, probe, ritz)."""
    found = densities.values()
    return {
        "ritz_value": torch.stack([density.nodes for density in found]),
        "ritz_weight": torch.stack([density.weights for density in found]),
        "ritz_residual": torch.stack([density.residuals for density in found]),
    }


def spectrum_rows(densities: dict[str, SpectralDensity]) -> dict[str, Tensor]:
    """Returns what the Lanczos runs say of the matrices: nodes, and the extreme eigenvalues (matrix,) with residuals."""
    extremes = {
        name: torch.tensor([density.extreme(largest) for density in densities.values()], dtype=torch.float64)
        for name, largest in (("lambda_max", True), ("lambda_min", False))
    }
    values = {name: found[:, 0] for name, found in extremes.items()}
    residuals = {f"{name}_residual": found[:, 1] for name, found in extremes.items()}
    return node_rows(densities) | values | residuals
