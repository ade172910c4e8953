"""How strongly layers couple through the Gauss-Newton matrix: ||G_ij||_F^2, and d_i . G_ij d_j along real steps.

Block norms come from the reference estimator, E|(G v)_i|^2 = ||G_ij||_F^2 for signs v on block j (Hutchinson 1989).
Curvature along a direction is exact on the batch: <J_i d_i, (d2 loss/dz2) J_j d_j> / N from l Jacobian products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton, block_tangents
from hessprobe.estimation.block_norms import (
    block_norm_samples,
    coupling_of,
    off_block_energy_of,
    symmetry_gap,
)
from hessprobe.estimation.sampling import Estimate
from hessprobe.probes.probe import Probe, Row, Snapshot
from hessprobe.problem.partition import Partition
from hessprobe.recipe import CrossLayerRecipe
from hessprobe.store.schema import MEASUREMENT_VARIABLES, Table, Variable

DIRECTIONS = ("update", "negative_gradient")
_PAIR = ("step", "block", "other_block")


class CrossLayerProbe(Probe):
    """Measures the table `cross_layer`."""

    name = "cross_layer"

    def __init__(self, recipe: CrossLayerRecipe) -> None:
        self.every = recipe.every
        self.sequences = recipe.sequences
        self.samples = recipe.samples

    def table(self, partition: Partition) -> Table:
        products = f"{self.samples} sign probes per block, G products (Hutchinson 1989)"
        exact = "exact on the batch: one Jacobian product per block"

        def pair(name: str, long_name: str, estimator: str, units: str = "1") -> Variable:
            return Variable(name=name, dims=_PAIR, units=units, long_name=long_name, estimator=estimator)

        variables = (
            pair("fro2", "squared Frobenius norm of the Gauss-Newton block", products, "nats^2"),
            pair("fro2_stderr", "standard error of fro2", "spread over probes", "nats^2"),
            pair("coupling", "fro2[i,j] / sqrt(fro2[i,i] fro2[j,j])", f"jackknife over {products}"),
            pair("coupling_stderr", "standard error of coupling", "jackknife over probes"),
            Variable(
                name="off_block_energy",
                dims=("step",),
                units="1",
                long_name="share of ||G||_F^2 outside the diagonal blocks",
                estimator=f"jackknife over {products}",
            ),
            Variable(
                name="off_block_energy_stderr",
                dims=("step",),
                units="1",
                long_name="standard error of off_block_energy",
                estimator="jackknife over probes",
            ),
            Variable(
                name="step_curvature",
                dims=("step", "direction", "block", "other_block"),
                units="nats",
                long_name="d_i . G_ij d_j along the direction d",
                estimator=exact,
            ),
            Variable(
                name="step_slope",
                dims=("step", "direction", "block"),
                units="nats",
                long_name="g_i . d_i along the direction d",
                estimator="exact on the batch",
            ),
            Variable(
                name="gradient_norm2",
                dims=("step", "block"),
                units="nats^2",
                long_name="squared norm of the block's gradient",
                estimator="exact on the batch",
            ),
            *MEASUREMENT_VARIABLES,
        )
        return Table(
            name=self.name,
            variables=variables,
            coordinates={
                "block": list(partition.blocks),
                "other_block": list(partition.blocks),
                "direction": list(DIRECTIONS),
            },
            attributes={"samples": self.samples, "method": "products"},
        )

    def measure(self, snapshot: Snapshot) -> Row:
        objective, partition, batches = snapshot.objective, snapshot.partition, snapshot.batches
        operator = GaussNewton(objective, batches, partition, parameters=snapshot.parameters)
        samples = block_norm_samples(operator, self.samples, generator=snapshot.generator(self.name))
        norms = Estimate.of(samples)
        coupling = Estimate.jackknife(samples, coupling_of)
        off_block = Estimate.jackknife(samples, off_block_energy_of)
        loss, gradient = objective.gradient(batches, partition, snapshot.named_parameters)

        nowhere = torch.full_like(gradient, torch.nan)
        update = nowhere if snapshot.update is None else snapshot.update
        directions = (update, -gradient)
        slices = partition.slices.values()
        return {
            "fro2": norms.mean,
            "fro2_stderr": norms.stderr,
            "coupling": coupling.mean,
            "coupling_stderr": coupling.stderr,
            "off_block_energy": off_block.mean,
            "off_block_energy_stderr": off_block.stderr,
            "step_curvature": torch.stack([_curvature_along(snapshot, d) for d in directions]),
            "step_slope": torch.stack([_blockwise(gradient * d, partition) for d in directions]),
            "gradient_norm2": torch.stack([gradient[where].square().sum() for where in slices]),
            "loss": loss,
            "tokens": operator.tokens,
            "sequences": self.sequences,
            "damping": 0.0,
            "symmetry_gap": symmetry_gap(operator, generator=snapshot.generator(f"{self.name}/symmetry")),
            "gradient_equivalents": self.cost(partition),
        }

    def cost(self, partition: Partition) -> float:
        layers = len(partition)
        products = layers * (4 * self.samples + 2) / 3
        tangents = len(DIRECTIONS) * layers * 2 / 3
        return products + tangents + 1 + (4 * 2 + 2) / 3  # and the gradient, and the symmetry check


def _blockwise(products: Tensor, partition: Partition) -> Tensor:
    return torch.stack([products[where].sum() for where in partition.slices.values()])


def _curvature_along(snapshot: Snapshot, direction: Tensor) -> Tensor:
    """Returns (l, l) entries d_i . G_ij d_j over all micro-batches."""
    objective, partition = snapshot.objective, snapshot.partition
    total = torch.zeros(len(partition), len(partition), dtype=direction.dtype, device=direction.device)
    if not bool(torch.isfinite(direction).all()):
        return total.fill_(torch.nan)
    for batch in snapshot.batches:
        z, jd = block_tangents(objective, batch, partition, direction, snapshot.parameters)
        curved = objective.loss_function.hessian_product(z, objective.targets(batch), jd)
        total += jd.flatten(1) @ curved.flatten(1).mT
    total /= objective.tokens(snapshot.batches)
    return 0.5 * (total + total.mT)
