"""What a recipe's probes would cost beside its training: rows, gradients, memory, and whether that is too much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hessprobe.curvature.model_operator import DEFAULT_MEMORY
from hessprobe.instruments.snapshot import Probe
from hessprobe.measuring.row_recorder import build_probes
from hessprobe.models.transformer import Decoder
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe
from hessprobe.training.builds import decoder_config
from hessprobe.training.planning.estimate import FLOAT, cost, pass_memory, said_bytes


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What one probe would do in a run.

    Attributes:
        rows: measured steps, out of `steps`, one in `every`.
        per_row: gradients of the probe's own batch, `sequences` long, that a row takes at most.
        gradients: of a training minibatch, in all rows together.
        share: of the gradients that training itself takes.
        memory: bytes at the peak beside the model and its optimizer, an estimate.
        lighter: what makes a row cheaper, in words.
    """

    name: str
    steps: int
    every: int
    sequences: int
    per_row: float
    gradients: float
    share: float
    memory: float
    lighter: str

    @property
    def rows(self) -> int:
        """Steps 0, every, 2 every, ... below `steps`."""
        return -(-self.steps // self.every)

    def every_within(self, share: float) -> tuple[int, float] | None:
        """Returns the smallest `every` that keeps to a share of training, and the share then; None if one row is more."""
        rows = math.floor(self.rows * share / self.share)
        if rows < 1:
            return None
        every = -(-self.steps // rows)
        return every, self.share * -(-self.steps // every) / self.rows


def probe_plans(recipe: Recipe, model: Decoder, partition: Partition) -> list[ProbePlan]:
    """Returns the plan of each of a recipe's probes, by operation count.

    Raises:
        UserError: a probe that cannot lay out its table, such as one that is to watch a block that does not exist.
    """
    steps, optimizer = recipe.training.steps, recipe.optimizer
    warmup = min(optimizer.warmup_steps, steps)
    training = warmup * optimizer.minibatches + (steps - warmup) * cost(optimizer, model, partition)

    def planned(probe: Probe) -> ProbePlan:
        probe.table(partition)
        per_row, unit = probe.cost(partition), probe.unit_sequences
        # The training's own unit is a gradient of a minibatch.
        gradients = len(range(0, steps, probe.every)) * per_row * unit / optimizer.sequences
        return ProbePlan(
            name=probe.name,
            steps=steps,
            every=probe.every,
            sequences=unit,
            per_row=per_row,
            gradients=gradients,
            share=gradients / training,
            memory=_memory(recipe, probe, model, partition),
            lighter=_lighter(recipe, probe),
        )

    return [planned(probe) for probe in build_probes(recipe)]


def measuring_lines(plans: Sequence[ProbePlan], most: float) -> Iterator[tuple[str, str]]:
    """Yields (label, text) of what measuring takes, a line a probe, then one for each above its share of training.

    Args:
        most: the share of training's gradients that a probe may take without a word.
    """
    for i, plan in enumerate(plans):
        rows = f"{plan.rows:,} row{'s' if plan.rows > 1 else ''}"
        a_row = f"{rows} x {plan.per_row:,.0f} gradients of {plan.sequences:,} sequences"
        yield (
            "" if i else "measuring",
            f"{plan.name:<{max(len(p.name) for p in plans)}}  {a_row} = {plan.gradients:,.0f} of a minibatch, "
            f"{plan.share:.0%} of training's; about {said_bytes(plan.memory)}",
        )
    for plan in plans:
        if plan.share > most:
            found = plan.every_within(most)
            way_out = (
                f": --set {plan.name}.every={found[0]} takes {found[1]:.0%}; or a lighter row: {plan.lighter}"
                if found
                else f", and one row alone does; make it lighter: {plan.lighter}"
            )
            yield "hint", f"{plan.name} takes over {most:.0%} of training (training.probe_share){way_out}"


def plan_measuring(recipe: Recipe) -> list[ProbePlan]:
    """Returns `probe_plans` of a recipe, its model laid out without numbers.

    Raises:
        UserError: numbers that make no decoder, or a probe that cannot lay out its table.
    """
    model = Decoder(decoder_config(recipe), generator=None)
    return probe_plans(recipe, model, Partition.of(model, recipe.partition))


def _memory(recipe: Recipe, probe: Probe, model: Decoder, partition: Partition) -> float:
    vectors = probe.vectors(partition)
    one, section = max(pass_memory(model.config, probe.unit_sequences).values()), getattr(recipe, probe.name)
    # Vectors go through the model together as far as the probe's bound allows; layer kernels need no such products.
    bound = (getattr(section, "memory_mib", None) or 0) * 2**20 or DEFAULT_MEMORY
    together = 0.0 if getattr(section, "uses_kernels", False) else min(bound, vectors * one)
    return vectors * FLOAT * partition.size + one + together


def _lighter(recipe: Recipe, probe: Probe) -> str:
    section = getattr(recipe, probe.name)
    if getattr(section, "preset", "light") != "light":
        return f"--set {probe.name}.preset=light"
    size = next(name for name in ("curvature_sequences", "sequences") if name in type(section).model_fields)
    return f"fewer {probe.name}.{size}"
