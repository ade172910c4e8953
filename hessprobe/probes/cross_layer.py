"""How strongly layers couple through the Gauss-Newton matrix: ||G_ij||_F^2, and d_i . G_ij d_j along real steps.

Block norms come from layer kernels (every pair from a gradient's worth of work) or, with method = "products", from the
reference estimator E|(G v)_i|^2 = ||G_ij||_F^2 for signs v on block j (Hutchinson 1989). Curvature along a direction
is exact on the batch: <J_i d_i, (d2 loss/dz2) J_j d_j> / N from l Jacobian products.
"""

from __future__ import annotations

from typing import Any

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
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.stream import Plan, verified_plan
from hessprobe.probes.probe import Probe, Row, Snapshot
from hessprobe.problem.partition import Partition
from hessprobe.recipe import CrossLayerRecipe
from hessprobe.store.schema import MEASUREMENT_VARIABLES, Table, Variable

DIRECTIONS = ("update", "negative_gradient")


class CrossLayerProbe(Probe):
    """Measures the table `cross_layer`."""

    name = "cross_layer"

    def __init__(self, recipe: CrossLayerRecipe) -> None:
        self.recipe = recipe
        self.every = recipe.every
        self.sequences = recipe.sequences
        self._plan: Plan | None = None

    def table(self, partition: Partition) -> Table:
        kernels = self.recipe.method == "kernels"
        return Table(
            name=self.name,
            variables=(
                *_norm_variables(self._estimator()),
                *(_sketch_variables() if kernels else ()),
                *_direction_variables(),
                *MEASUREMENT_VARIABLES,
            ),
            coordinates={
                "block": list(partition.blocks),
                "other_block": list(partition.blocks),
                "direction": list(DIRECTIONS),
                **({"sketch": self._sketches(), "other_sketch": self._sketches()} if kernels else {}),
            },
            attributes=self._attributes(),
        )

    def measure(self, snapshot: Snapshot) -> Row:
        objective, partition, batches = snapshot.objective, snapshot.partition, snapshot.batches
        operator = GaussNewton(objective, batches, partition, parameters=snapshot.parameters)
        loss, gradient = objective.gradient(batches, partition, snapshot.named_parameters)
        nowhere = torch.full_like(gradient, torch.nan)
        update = nowhere if snapshot.update is None else snapshot.update
        directions: dict[str, Tensor] = dict(zip(DIRECTIONS, (update, -gradient), strict=True))
        norms = (
            self._by_kernels(snapshot, directions)
            if self.recipe.method == "kernels"
            else self._by_products(snapshot, operator)
        )
        slices = partition.slices.values()
        return {
            **norms,
            "step_curvature": torch.stack([_curvature_along(snapshot, d) for d in directions.values()]),
            "step_slope": torch.stack([_blockwise(gradient * d, partition) for d in directions.values()]),
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
        if self.recipe.method == "kernels":
            # Forward, activations' backward and weights' gradients a round; a Gram matrix is m^2 p multiply-adds, where
            # a gradient is 3 p a token.
            norms = (1 + 2 * self.recipe.rounds) / 3
        else:
            norms = layers * (4 * self.recipe.samples + 2) / 3
        tangents = len(DIRECTIONS) * layers * 2 / 3
        return norms + tangents + 1 + (4 * 2 + 2) / 3  # and the gradient, and the symmetry check

    def _by_kernels(self, snapshot: Snapshot, directions: dict[str, Tensor]) -> dict[str, Any]:
        objective, partition = snapshot.objective, snapshot.partition
        if self._plan is None:
            self._plan = verified_plan(objective, snapshot.batches[0], partition, snapshot.parameters)
        found = layer_kernels(
            objective,
            snapshot.batches,
            partition,
            rounds=self.recipe.rounds,
            generator=snapshot.generator(self.name),
            cotangent=self.recipe.cotangent,
            parameters=snapshot.parameters,
            along=directions,
            plan=self._plan,
        )
        quantity = self.recipe.quantity
        return {
            **_estimates(
                found.block_norms(quantity), found.coupling(quantity), found.off_block_energy(quantity)
            ),
            "kernel": found.kernel,
            "alignment": torch.stack([found.alignment[name] for name in DIRECTIONS]),
            "sequence_tokens": found.tokens[found.sequence],
        }

    def _by_products(self, snapshot: Snapshot, operator: GaussNewton) -> dict[str, Any]:
        generator = snapshot.generator(self.name)
        samples = block_norm_samples(operator, self.recipe.samples, generator=generator)
        return _estimates(
            Estimate.of(samples),
            Estimate.jackknife(samples, coupling_of),
            Estimate.jackknife(samples, off_block_energy_of),
        )

    def _sketches(self) -> list[int]:
        return list(range(self.recipe.sequences * self.recipe.rounds))

    def _estimator(self) -> str:
        recipe = self.recipe
        if recipe.method == "products":
            return f"{recipe.samples} sign probes per block, G products (Hutchinson 1989)"
        return f"layer kernels, {recipe.rounds} {recipe.cotangent} sketch(es) per sequence, {recipe.quantity} quantity"

    def _attributes(self) -> dict[str, object]:
        recipe = self.recipe
        if recipe.method == "products":
            return {"method": "products", "samples": recipe.samples}
        return {
            "method": "kernels",
            "cotangent": recipe.cotangent,
            "quantity": recipe.quantity,
            "sketch_sequence": [s % recipe.sequences for s in self._sketches()],
            "sketch_round": [s // recipe.sequences for s in self._sketches()],
        }


def _norm_variables(estimator: str) -> tuple[Variable, ...]:
    pair, row = ("step", "block", "other_block"), ("step",)
    spread = "spread over probes, or jackknife over sequences"
    entries = (
        ("fro2", pair, "nats^2", "squared Frobenius norm of the Gauss-Newton block", estimator),
        ("fro2_stderr", pair, "nats^2", "standard error of fro2", spread),
        ("coupling", pair, "1", "fro2[i,j] / sqrt(fro2[i,i] fro2[j,j])", f"jackknife over {estimator}"),
        ("coupling_stderr", pair, "1", "standard error of coupling", "jackknife"),
        ("off_block_energy", row, "1", "share of ||G||_F^2 outside the diagonal blocks", f"jackknife over {estimator}"),
        ("off_block_energy_stderr", row, "1", "standard error of off_block_energy", "jackknife"),
    )  # fmt: skip
    return tuple(
        Variable(name=name, dims=dims, units=units, long_name=long_name, estimator=how)
        for name, dims, units, long_name, how in entries
    )


def _sketch_variables() -> tuple[Variable, ...]:
    return (
        Variable(
            name="kernel",
            dims=("step", "block", "sketch", "other_sketch"),
            units="nats^2",
            long_name="inner products <w_i, w_i'> of the block's parts of two sketches",
            estimator="exact for the sketches drawn",
            dtype="float32",
        ),
        Variable(
            name="alignment",
            dims=("step", "direction", "block", "sketch"),
            units="nats",
            long_name="inner products <w_i, d_i> of the block's parts of a sketch and the direction",
            estimator="exact for the sketches drawn",
        ),
        Variable(
            name="sequence_tokens",
            dims=("step", "sketch"),
            units="tokens",
            long_name="tokens with a target in the sketch's sequence",
            estimator="counted",
        ),
    )


def _direction_variables() -> tuple[Variable, ...]:
    exact = "exact on the batch: one Jacobian product per block"
    entries = (
        ("step_curvature", ("step", "direction", "block", "other_block"), "nats", "d_i . G_ij d_j", exact),
        ("step_slope", ("step", "direction", "block"), "nats", "g_i . d_i", "exact on the batch"),
        ("gradient_norm2", ("step", "block"), "nats^2", "squared norm of the block's gradient", "exact on the batch"),
    )  # fmt: skip
    return tuple(
        Variable(name=name, dims=dims, units=units, long_name=long_name, estimator=how)
        for name, dims, units, long_name, how in entries
    )


def _estimates(norms: Estimate, coupling: Estimate, off_block: Estimate) -> dict[str, Tensor]:
    return {
        "fro2": norms.mean,
        "fro2_stderr": norms.stderr,
        "coupling": coupling.mean,
        "coupling_stderr": coupling.stderr,
        "off_block_energy": off_block.mean,
        "off_block_energy_stderr": off_block.stderr,
    }


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
