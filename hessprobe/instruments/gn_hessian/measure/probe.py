"""How far the Gauss-Newton matrix G is from the Hessian H: R = H - G in norm, spectrum and along real steps.

All three matrices see the same batch and the same probes. R has products of its own (curvature/residual.py), and
H = G + R wherever both are there. Traces of G come from layer kernels, and steady those of H and R. The ladder along a
step separates what the loss's higher orders cost from what linearising the network costs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessprobe.curvature import cost
from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.model_operator import DEFAULT_MEMORY
from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.curvature.residual import Residual
from hessprobe.estimation.density import SpectralDensity, spectral_density, starts_at_once
from hessprobe.estimation.sampling import rademacher
from hessprobe.estimation.shared_probes import SharedProbes, probes_at_once, shared_probes
from hessprobe.instruments.gn_hessian.measure.rows import ladder_rows, node_rows, norm_rows, spectrum_rows
from hessprobe.instruments.gn_hessian.measure.traces import COST, KernelTraces, TraceKernels
from hessprobe.instruments.gn_hessian.recipe import GNHessianRecipe
from hessprobe.instruments.gn_hessian.table import (
    DIRECTIONS,
    LADDER_DIRECTIONS,
    MATRICES,
    ROUNDS,
    gn_hessian_table,
)
from hessprobe.instruments.snapshot import Probe, Row, Snapshot
from hessprobe.machine.devices import working_memory
from hessprobe.optimization.conjugate_gradient import Solution, conjugate_gradient
from hessprobe.optimization.model_ladder import model_ladder
from hessprobe.problem.partition import Partition
from hessprobe.schema.table import Table

Operators = dict[str, CurvatureOperator]


class GNHessianProbe(Probe):
    """Measures the table `gn_hessian`."""

    name = "gn_hessian"

    def __init__(self, recipe: GNHessianRecipe) -> None:
        self.recipe = recipe
        self.every = recipe.every
        self.sequences = recipe.sequences
        self._memory = (recipe.memory_mib or 0) * 2**20 or DEFAULT_MEMORY
        self._traces = TraceKernels(self._memory)
        self._compared = False  # whether products from graphs are known to be right for this model

    def table(self, partition: Partition) -> Table:
        return gn_hessian_table(self.recipe, partition.blocks)

    def measure(self, snapshot: Snapshot) -> Row:
        objective, partition, batches = snapshot.objective, snapshot.partition, snapshot.micro_batches
        gauss_newton, hessian, residual = self._operators(snapshot)
        loss, gradient = objective.gradient(batches, partition, snapshot.named_parameters)
        known = None
        if self._knows_traces(batches.sequences):
            known = self._traces.measure(snapshot, snapshot.generator(f"{self.name}/traces"))
        norms, symmetry_gap = self._norms(snapshot, gauss_newton, residual, known)
        operators: Operators = dict(zip(MATRICES, (gauss_newton, hessian, residual), strict=True))
        densities = self._densities(snapshot, operators)
        self._compared = hessian.from_graphs and residual.from_graphs
        step = conjugate_gradient(
            gauss_newton.damped(self.recipe.damping),
            -gradient[None],
            tolerance=self.recipe.cg_tolerance,
            iterations=self.recipe.cg_iterations,
        )
        leading = densities["gauss_newton"].leading
        directions = self._directions(snapshot, gradient, step.x[0], leading)
        return {
            **norms,
            **spectrum_rows(densities),
            **self._block_spectra(snapshot, operators),
            **self._along(snapshot, residual, directions),
            "gauss_newton_step_residual": step.residual[0],
            "gauss_newton_step_iterations": step.iterations,
            "loss": loss,
            "tokens": batches.tokens,
            "sequences": batches.sequences,
            "damping": 0.0,  # of G and H themselves; the Gauss-Newton step has its own, an attribute of the table
            "symmetry_gap": symmetry_gap,
            "trace_rounds": 0 if known is None else ROUNDS,
            "gradient_equivalents": self.cost(partition, step, 0.0 if known is None else known.gradients),
        }

    def cost(self, partition: Partition, step: Solution | None = None, traces: float | None = None) -> float:
        """Returns what one row costs, in gradients of the probe's batch, where the graphs of products can be kept.

        Args:
            step: the row's Gauss-Newton step; default: one that takes all its iterations.
            traces: what the layer kernels took; default: every parameter has a fast path there.
        """
        recipe, layers = self.recipe, len(partition)
        if traces is None:
            traces = COST if self._knows_traces(self.sequences) else 0.0
        g, h, share = cost.gauss_newton_products(), cost.HESSIAN_PRODUCT, cost.mean_block(layers)
        norms = (recipe.samples + recipe.block_samples * layers * share) * (g + h)
        krylov = recipe.lanczos_steps * recipe.lanczos_probes
        densities = krylov * (1 + share * len(set(recipe.density_blocks))) * (g + 2 * h)
        solve = g * (1 + (recipe.cg_iterations if step is None else step.iterations))
        along = len(DIRECTIONS) * (1 + h) + len(LADDER_DIRECTIONS) * cost.passes(len(recipe.alphas), 0)
        return 1 + cost.graphs(layers) + traces + norms + densities + solve + along

    def vectors(self, partition: Partition) -> float:
        recipe, together = self.recipe, self._starts_at_once(partition.size)
        probes = probes_at_once(recipe.samples, 4 * partition.size, self._memory)
        # Probes with both products, or Krylov spaces, or directions with theirs: one after another.
        return 2 + max(3 * probes, together * (recipe.lanczos_steps + 3), 3 * len(DIRECTIONS))

    def _starts_at_once(self, size: int) -> int:
        return starts_at_once(self.recipe.lanczos_probes, self.recipe.lanczos_steps, 4 * size, self._memory)

    def _knows_traces(self, sequences: int) -> bool:
        """Whether kernels of so many sequences know tr G better than the probes do: ROUNDS sketches of each, at least."""
        return sequences >= self.recipe.samples

    def _operators(self, snapshot: Snapshot) -> tuple[GaussNewton, Hessian, Residual]:
        """Returns the three matrices, each with the graph it takes its many products from."""
        at = snapshot.objective, snapshot.micro_batches, snapshot.partition
        stated, device = self.recipe.memory_mib, snapshot.parameters.device
        memory = self._memory if stated else working_memory(device, DEFAULT_MEMORY)
        # A row says nothing of an engine that has errors of its own.
        given: dict[str, Any] = {"parameters": snapshot.parameters, "memory": memory, "engine": "exact"}
        each, compare = memory // len(MATRICES), not self._compared
        return (
            GaussNewton(*at, **given).linearised(each),
            Hessian(*at, **given).linearised(each, compare=compare),
            Residual(*at, **given).linearised(each, compare=compare),
        )

    def _norms(
        self,
        snapshot: Snapshot,
        gauss_newton: GaussNewton,
        residual: Residual,
        known: KernelTraces | None,
    ) -> tuple[dict[str, Tensor], float]:
        """Returns norms, traces and their ratios of the whole matrices and of every diagonal block."""
        generator = snapshot.generator(self.name)

        def shared(samples: int, block: str | None = None) -> SharedProbes:
            return shared_probes(
                gauss_newton, residual, samples, generator=generator, block=block, memory=self._memory
            )

        whole = shared(self.recipe.samples)
        blocks = [
            norm_rows(shared(self.recipe.block_samples, block), known and known.of_block(i))
            for i, block in enumerate(snapshot.partition.blocks)
        ]
        each = {f"block_{name}": torch.stack([block[name] for block in blocks], -1) for name in blocks[0]}
        return {**norm_rows(whole, known and known.whole), **each}, whole.symmetry_gap

    def _densities(
        self, snapshot: Snapshot, operators: Operators, block: str | None = None
    ) -> dict[str, SpectralDensity]:
        return {
            name: spectral_density(
                operator,
                self.recipe.lanczos_steps,
                self.recipe.lanczos_probes,
                # The same starts for all three: their densities differ by the matrices alone.
                generator=snapshot.generator(f"{self.name}/lanczos/{block}"),
                block=block,
                memory=self._memory,
            )
            for name, operator in operators.items()
        }

    def _block_spectra(self, snapshot: Snapshot, operators: Operators) -> dict[str, Tensor]:
        found = [
            node_rows(self._densities(snapshot, operators, block))
            for block in dict.fromkeys(self.recipe.density_blocks)
        ]
        return (
            {f"block_{name}": torch.stack([nodes[name] for nodes in found], 1) for name in found[0]}
            if found
            else {}
        )

    def _directions(
        self, snapshot: Snapshot, gradient: Tensor, step: Tensor, leading: Tensor
    ) -> dict[str, Tensor]:
        """Returns the directions by name, as they are; an update that is not known is NaN."""
        nowhere = torch.full_like(gradient, torch.nan)
        random = rademacher(
            1,
            len(gradient),
            generator=snapshot.generator(f"{self.name}/direction"),
            dtype=gradient.dtype,
            device=gradient.device,
        )[0]
        # An eigenvector has no sign of its own: it is made to point downhill.
        downhill = -leading if bool(gradient @ leading > 0) else leading
        update = nowhere if snapshot.update is None else snapshot.update
        return dict(zip(DIRECTIONS, (-gradient, update, step, downhill, random / random.norm()), strict=True))

    def _along(
        self, snapshot: Snapshot, residual: CurvatureOperator, directions: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns slope and curvature along every direction, and the ladders of models along two of them."""
        norms = torch.stack([d.norm() for d in directions.values()])
        # What has no direction (zero, not finite) goes through the product as zero, and is not a number after it.
        usable = torch.isfinite(norms) & (norms > 0)
        units = torch.stack(
            [torch.where(u, d / n, 0.0) for d, n, u in zip(directions.values(), norms, usable, strict=True)]
        )
        ladders = {
            name: model_ladder(
                snapshot.objective,
                snapshot.micro_batches,
                snapshot.partition,
                torch.where(usable[i], d, 0.0),
                self.recipe.alphas if name in LADDER_DIRECTIONS else (),
                parameters=snapshot.parameters,
            )
            for i, (name, d) in enumerate(directions.items())
        }
        slope, curvature = (
            torch.stack([ladder.mean(getattr(ladder, name)) for ladder in ladders.values()])
            for name in ("slope", "curvature")
        )
        bent, norms = torch.linalg.vecdot(units, residual.apply(units)).double(), norms.double()
        # A step of no length changes nothing; one that is not known has a norm that is not a number.
        excess = dict(zip(directions, bent * norms.square(), strict=True))
        nowhere = torch.where(usable, 0.0, torch.nan).double()
        straight = curvature / norms.square() + nowhere
        bent = bent + nowhere
        rungs = [ladder_rows(ladders[name], excess[name]) for name in LADDER_DIRECTIONS]
        return {
            "direction_norm": norms,
            "direction_slope": slope / norms + nowhere,
            "direction_curvature": torch.stack([straight, straight + bent, bent]),
            **{name: torch.stack([rung[name] for rung in rungs]) for name in rungs[0]},
        }
