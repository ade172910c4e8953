"""How strongly layers couple through the Gauss-Newton matrix: ||G_ij||_F^2, and d_i . G_ij d_j along real steps.

Block norms come from layer kernels (every pair from a gradient's worth of work) or, with method = "products", from the
reference estimator E|(G v)_i|^2 = ||G_ij||_F^2 for signs v on block j (Hutchinson 1989). Curvature along a direction
is exact on the batch: <J_i d_i, (d2 loss/dz2) J_j d_j> / N from l Jacobian products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessprobe.curvature import cost
from hessprobe.curvature.along import curvature_along
from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.estimation.block_norms import (
    block_norm_samples,
    coupling_of,
    off_block_energy_of,
    symmetry_gap,
)
from hessprobe.estimation.sampling import Estimate, log_interval
from hessprobe.instruments.cross_layer.recipe import CrossLayerRecipe
from hessprobe.instruments.cross_layer.table import DIRECTIONS, cross_layer_table, sketches
from hessprobe.instruments.snapshot import Probe, Row, Snapshot
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.plan import Plan
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import is_sharded
from hessprobe.schema.table import Table

Operator = TypeVar("Operator", GaussNewton, Hessian)


class CrossLayerProbe(Probe):
    """Measures the table `cross_layer`."""

    name = "cross_layer"

    def __init__(self, recipe: CrossLayerRecipe) -> None:
        self.recipe = recipe
        self.every = recipe.every
        self.sequences = recipe.sequences
        self._plan: Plan | None = None
        self._division = 1
        self._memory = recipe.memory_mib and recipe.memory_mib * 2**20

    @property
    def works_sharded(self) -> bool:
        return self.recipe.uses_kernels

    def table(self, partition: Partition) -> Table:
        return cross_layer_table(self.recipe, partition.blocks)

    def measure(self, snapshot: Snapshot) -> Row:
        if is_sharded(snapshot.objective.model):
            return self._of_shards(snapshot)
        objective, partition, batches = snapshot.objective, snapshot.partition, snapshot.micro_batches
        operator = self._matrix(snapshot)
        loss, gradient = objective.gradient(batches, partition, snapshot.named_parameters)
        nowhere = torch.full_like(gradient, torch.nan)
        update = nowhere if snapshot.update is None else snapshot.update
        directions: dict[str, Tensor] = dict(zip(DIRECTIONS, (update, -gradient), strict=True))
        if self.recipe.uses_kernels:
            norms, spent = self._by_kernels(snapshot, directions)
        else:
            norms, spent = self._by_products(snapshot, operator), None
        along = curvature_along(self._gauss_newton(snapshot), torch.stack(list(directions.values())))
        return {
            **norms,
            "step_curvature": along.curvature[:, 0],
            "step_slope": torch.stack([_blockwise(gradient * d, partition) for d in directions.values()]),
            "gradient_norm2": _blockwise(gradient.square(), partition),
            "loss": loss,
            "tokens": batches.tokens,
            "sequences": batches.sequences,
            "damping": 0.0,  # of G itself; jacobi_radius has its own, an attribute of the table
            "symmetry_gap": symmetry_gap(operator, generator=snapshot.generator(f"{self.name}/symmetry")),
            "gradient_equivalents": self.cost(partition, spent),
        }

    def cost(self, partition: Partition, kernels: float | None = None) -> float:
        """Returns what one row costs, in gradients of the probe's batch.

        Args:
            kernels: what the layer kernels of a row took, every attempt's rounds; default: all attempts that it may make.
        """
        layers = len(partition)
        if kernels is not None:
            norms = kernels
        elif self.recipe.uses_kernels:
            norms = sum(cost.layer_kernels(rounds) for rounds in self.recipe.attempts)
        else:
            norms = cost.products(self.recipe.matrix, self.recipe.samples, times=layers)
        along = cost.curvature_along(len(DIRECTIONS), layers)
        symmetry = cost.products("gauss_newton", 2)
        return norms + along + 1 + symmetry  # 1: the gradient

    def vectors(self, partition: Partition) -> float:
        # Gradient, update and the other way, then the symmetry check's two rows, or a block's probes, and their products.
        return 3 + 2 * (2 if self.recipe.uses_kernels else self.recipe.samples)

    def _of_shards(self, snapshot: Snapshot) -> Row:
        """Returns a row of a model whose parameters are sharded over devices: what backward passes alone can tell.

        Curvature along directions and the symmetry check take products with G, which shards do not have.

        Raises:
            UserError: a recipe that asks for products.
        """
        if not self.recipe.uses_kernels:
            raise UserError(
                "cross_layer: parameters sharded over devices have neither a forward mode nor second derivatives, and "
                "products need one of them: --set cross_layer.method=kernels --set cross_layer.matrix=gauss_newton"
            )
        norms, spent = self._by_kernels(snapshot, {})
        layers, nowhere = len(snapshot.partition), torch.nan
        along = torch.full((len(DIRECTIONS), layers), nowhere)
        return {
            **norms,
            "step_curvature": along[:, :, None].expand(-1, -1, layers),
            "step_slope": along,
            "gradient_norm2": along[0],
            "tokens": snapshot.micro_batches.tokens,
            "sequences": snapshot.micro_batches.sequences,
            "damping": 0.0,
            "symmetry_gap": nowhere,
            "gradient_equivalents": spent,
        }

    def _by_kernels(self, snapshot: Snapshot, directions: dict[str, Tensor]) -> tuple[dict[str, Any], float]:
        """Returns what the row holds from kernels, and the gradients that they took.

        Args:
            directions: that alignments are wanted with; none for sharded parameters, which are measured as they are.
        """
        objective, partition = snapshot.objective, snapshot.partition
        theta = snapshot.parameters if directions else None
        if self._plan is None:
            self._plan = verified_plan(objective, snapshot.micro_batches, partition, theta)
        first, *again = self.recipe.attempts
        rounds, spent = first, 0.0
        generator = snapshot.generator(self.name)
        while True:
            found = layer_kernels(
                objective,
                snapshot.micro_batches,
                partition,
                rounds=rounds,
                generator=generator,
                cotangent=self.recipe.cotangent,
                parameters=theta,
                along=directions,
                plan=self._plan,
                division=self._division,
                memory=self._memory,
            )
            self._division, spent = found.division, spent + found.gradients
            coupling = found.coupling(self.recipe.quantity)
            off_diagonal = ~torch.eye(len(partition), dtype=torch.bool)
            error = float(coupling.stderr[off_diagonal].mean()) if len(partition) > 1 else 0.0
            if not again or error <= (self.recipe.coupling_error or 0.0):
                break
            # Fresh sketches each time: an error that was small by luck must not be kept because it was small.
            rounds = again.pop(0)
        quantity, place = self.recipe.quantity, self._places(found)
        unknown = torch.full_like(found.kernel[..., 0], torch.nan)
        alignment = torch.stack([found.alignment.get(name, unknown) for name in DIRECTIONS])
        row = {
            **_estimates(
                found.block_norms(quantity),
                found.block_norm_intervals(quantity),
                coupling,
                found.off_block_energy(quantity),
            ),
            "kernel": self._placed(found.kernel, place, 2),
            "alignment": self._placed(alignment, place, 1),
            "sequence_tokens": self._placed(found.tokens[found.sequence].double(), place, 1),
            "jacobi_radius": found.jacobi_radius(self.recipe.jacobi_damping, cross_fit=False),
            "jacobi_radius_held_out": found.jacobi_radius(self.recipe.jacobi_damping, cross_fit="direction"),
            "rounds": rounds,
            "coupling_error": error,
            "loss": found.loss,
        }
        return row, spent

    def _places(self, found: LayerKernels) -> Tensor:
        """Returns where in the table each sketch belongs (m,), however the batch came in micro-batches.

        Raises:
            UserError: more sequences than the table was laid out for.
        """
        if len(found.tokens) > self.sequences:
            raise UserError(
                f"cross_layer: {len(found.tokens)} sequences in this batch, and the table was laid out for "
                f"{self.sequences}; measure with at most as many, or --set cross_layer.sequences={len(found.tokens)}"
            )
        return found.round * self.sequences + found.sequence

    def _placed(self, x: Tensor, place: Tensor, dims: int) -> Tensor:
        """Returns x with its last dimensions spread over the table's sketches, NaN where this row has none."""
        for dim in range(x.dim() - dims, x.dim()):
            shape = (*x.shape[:dim], len(sketches(self.recipe)), *x.shape[dim + 1 :])
            x = x.new_full(shape, torch.nan).index_copy(dim, place, x)
        return x

    def _gauss_newton(self, snapshot: Snapshot) -> GaussNewton:
        return self._operator(GaussNewton, snapshot)

    def _matrix(self, snapshot: Snapshot) -> CurvatureOperator:
        gauss_newton = self._gauss_newton(snapshot)
        if self.recipe.matrix == "gauss_newton":
            return gauss_newton
        hessian = self._operator(Hessian, snapshot)
        return hessian if self.recipe.matrix == "hessian" else hessian - gauss_newton

    def _operator(self, kind: Callable[..., Operator], snapshot: Snapshot) -> Operator:
        return kind(
            snapshot.objective,
            snapshot.micro_batches,
            snapshot.partition,
            parameters=snapshot.parameters,
            memory=self._memory,
            engine="exact",  # a row says nothing of one that has errors of its own
        )

    def _by_products(self, snapshot: Snapshot, operator: CurvatureOperator) -> dict[str, Any]:
        generator = snapshot.generator(self.name)
        samples = block_norm_samples(operator, self.recipe.samples, generator=generator)
        norms = Estimate.of(samples)
        return _estimates(
            norms,
            log_interval(norms.mean, norms.stderr, self.recipe.samples - 1),
            Estimate.jackknife(samples, coupling_of),
            Estimate.jackknife(samples, off_block_energy_of),
        )


def _estimates(
    norms: Estimate, interval: tuple[Tensor, Tensor], coupling: Estimate, off_block: Estimate
) -> dict[str, Tensor]:
    return {
        "fro2": norms.mean,
        "fro2_stderr": norms.stderr,
        "fro2_low": interval[0],
        "fro2_high": interval[1],
        "coupling": coupling.mean,
        "coupling_stderr": coupling.stderr,
        "off_block_energy": off_block.mean,
        "off_block_energy_stderr": off_block.stderr,
    }


def _blockwise(products: Tensor, partition: Partition) -> Tensor:
    return torch.stack([products[where].sum() for where in partition.slices.values()])
