"""How good each preconditioner is at the present theta: the decrease along its direction, beside the best there is.

efficiency(d) = (g.d)^2 / ((d.G_mu d) (g.G_mu^-1 g)) in [0, 1], exact along d by one Jacobian product, on the batch a
candidate was built on and on held-out sequences, which count: as a function of the batch's size and of mu, block by block.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from hessprobe.curvature import cost
from hessprobe.estimation.block_norms import symmetry_gap
from hessprobe.estimation.conditioning import conditioning
from hessprobe.instruments.preconditioner.measure.batches import SharedOut
from hessprobe.instruments.preconditioner.measure.candidates.candidate import Candidate, Directions, Function
from hessprobe.instruments.preconditioner.measure.candidates.chosen import Candidates
from hessprobe.instruments.preconditioner.measure.row import PreconditionerRow
from hessprobe.instruments.preconditioner.measure.site import Site
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.preconditioner.table import LAYERWISE, preconditioner_table
from hessprobe.instruments.snapshot import Probe, Row, Snapshot
from hessprobe.machine.devices import working_memory
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.partition import Partition
from hessprobe.schema.table import Table

LOGGER = logging.getLogger("hessprobe")
DEFAULT_MEMORY = 2**30


class PreconditionerProbe(Probe):
    """Measures the table `preconditioner`.

    Args:
        recipe: sizes, dampings, candidates, budgets.
        candidates: further ones by name, a `Candidate` or function(gradient (p,), snapshot) -> direction (p,): the snapshot
            holds the curvature batch as its batches.

    A batch of fewer sequences than the recipe lays out is measured as far as it goes, which is said once; the row says how
    far (curvature_sequences_read, held_out_sequences_read).

    A candidate that raises, or whose direction is zero or not finite, is left out with the reason in
    `candidate_failure`; the others stand. Those that are solves (layerwise_gn, full_gn, grouped_gn_*) have no condition
    number: every product with their inverse would be a solve of its own.

    Raises:
        UserError: a candidate that cannot be imported, or a name that is taken.
    """

    name = "preconditioner"
    needs_optimizer = True

    def __init__(
        self, recipe: PreconditionerRecipe, candidates: Mapping[str, Candidate | Function] | None = None
    ) -> None:
        self.recipe = recipe
        self.every = recipe.every
        self.sequences = recipe.sequences
        self.candidates = Candidates(recipe, candidates)
        self._said_shrunk = False

    @property
    def unit_sequences(self) -> int:
        return self.recipe.curvature_sequences[-1]

    def table(self, partition: Partition) -> Table:
        self.candidates.groups(partition)  # a grouping that does not fit is told before the run
        return preconditioner_table(self.recipe, partition.blocks, self.candidates.names)

    def measure(self, snapshot: Snapshot) -> Row:
        recipe, shared = self.recipe, SharedOut(snapshot.micro_batches, self.recipe)
        if shared.shrunk and not self._said_shrunk and snapshot.objective.processes.is_first:
            self._said_shrunk = True
            LOGGER.warning("step %d: %s", snapshot.step, shared.shrunk)
        row = PreconditionerRow(self.table(snapshot.partition), recipe, shared.sizes)
        folds = min(row.folds, shared.held_out_sequences)
        held_out = self._site(snapshot, shared.held_out, folds=folds)
        row.judge_by(held_out)
        spent, measurement = 0.0, {}
        for draw in range(shared.draws):
            for sequences in shared.sizes:
                site = self._site(snapshot, shared.curvature(draw, sequences))
                row.build_on(site, draw)
                for name in self.candidates.names:
                    self._candidate(name, site, row)
                if row.is_the_batch:
                    generator = snapshot.generator(f"{self.name}/symmetry")
                    gap = symmetry_gap(site.gauss_newton, generator=generator)
                    measurement = {"loss": site.loss, "symmetry_gap": gap}
                    site.spent += 2 * cost.gauss_newton_products()
                spent += site.spent * site.sequences
        spent += held_out.spent * held_out.sequences
        return {
            **row.cells,
            **measurement,
            "tokens": snapshot.micro_batches.tokens,
            "sequences": snapshot.micro_batches.sequences,
            "gradient_equivalents": spent / shared.sizes[-1],
        }

    def cost(self, partition: Partition) -> float:
        recipe, layers, dampings = self.recipe, len(partition), len(self.recipe.dampings)
        candidates = self.candidates.all.values()
        solves = {*self.candidates.groups(partition), (partition.blocks,)}
        iterations = recipe.cg_iterations + dampings
        products = cost.gauss_newton_products
        solved = sum(products(len(found)) for found in solves) * iterations
        # Directions to judge: one for each damping where it depends on it, and the optimum's.
        judged = sum(dampings if each.damped else 1 for each in candidates) * cost.tangents()
        built = sum(each.most_gradients for each in candidates)
        share = sum(recipe.curvature_sequences) / self.unit_sequences
        held_out = recipe.held_out_sequences / self.unit_sequences
        by_block = cost.tangents(layers) * len(candidates)
        linear = sum(each.linear for each in candidates)
        layerwise = 0.0 if LAYERWISE in self.candidates.names else products(layers) * iterations
        on_curvature = recipe.draws * share * (2 + solved + judged + dampings * cost.tangents() + built)
        on_held_out = 2 + products() * (iterations + dampings / 2)
        on_held_out += recipe.draws * len(recipe.curvature_sequences) * judged + by_block
        once = by_block + layerwise + products() * (2 + linear * dampings * recipe.condition_steps)
        return on_curvature + held_out * on_held_out + once

    def vectors(self, partition: Partition) -> float:
        recipe, solves = self.recipe, sum(name.endswith("_gn") for name in self.candidates.names)
        solves += len(recipe.groups) + len(recipe.groupings)
        # Solutions for every damping, the one in hand and its search directions; theta, gradients, the step, the state of
        # an optimizer and its copy, a candidate's directions; Lanczos vectors and their images.
        return len(recipe.dampings) * (solves + 3) + 14 + 2 * recipe.condition_steps

    def _site(self, snapshot: Snapshot, batches: MicroBatches, folds: int = 1) -> Site:
        stated, device = self.recipe.memory_mib, snapshot.parameters.device
        memory = stated * 2**20 if stated else working_memory(device, DEFAULT_MEMORY)
        return Site(snapshot, batches, self.recipe, folds=folds, memory=memory)

    def _candidate(self, name: str, site: Site, row: PreconditionerRow) -> None:
        """Fills one candidate's cells at a site, or says why it cannot."""
        generator = site.snapshot.generator(f"{self.name}/{name}/{row.draw}/{site.sequences}")
        try:
            answer = self.candidates.answer(name, site, generator)
        except Exception as error:  # whatever it is, the others stand
            row.fail(name, error)
            return
        row.judge(name, answer)
        if row.is_the_batch and self.recipe.condition_steps:
            self._condition(name, answer, site, row)

    def _condition(self, name: str, answer: Directions, site: Site, row: PreconditionerRow) -> None:
        for i, (damping, direction) in enumerate(zip(self.recipe.dampings, answer.directions, strict=True)):
            if direction.inverse is None:
                continue
            generator = site.snapshot.generator(f"{self.name}/condition")
            try:
                found = conditioning(
                    site.gauss_newton.damped(damping),
                    direction.inverse,
                    self.recipe.condition_steps,
                    generator=generator,
                )
            except Exception as error:  # as above
                row.fail(name, error, "condition number")
                return
            site.spent += found.steps * cost.gauss_newton_products()
            row.condition(name, i, found)
