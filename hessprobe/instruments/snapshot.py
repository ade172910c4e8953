"""One moment of training, as every instrument is shown it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hessprobe.instruments.probe import Probe, Row
from hessprobe.machine.seeds import generator_of
from hessprobe.optimization.running import RunningOptimizer
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

__all__ = ["Probe", "Row", "Snapshot"]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One moment of training: everything an instrument may look at, none of which it may change.

    Attributes:
        step: outer steps done before this moment.
        objective: model and loss. The model may have moved on: theta is `parameters`, not the model's own.
        parameters: theta (p,) at this moment; empty where it is sharded over devices: it is the model's own then.
        batches: the probe's own micro-batches; `micro_batches` are the same, checked.
        update: what the optimizer then really added to theta (p,), or None where that is not known.
        optimizer: the running optimizer's name and state before that step, or None where that is not known.
        seed: of the run.
    """

    step: int
    objective: Objective
    partition: Partition
    parameters: Tensor
    batches: Sequence[Batch]
    update: Tensor | None
    seed: int
    optimizer: RunningOptimizer | None = None

    @property
    def named_parameters(self) -> dict[str, Tensor]:
        """Theta by parameter name."""
        return self.partition.unflatten(self.parameters)

    @cached_property
    def micro_batches(self) -> MicroBatches:
        """The batches as probes work on them, checked once whichever of a row's parts asks for them."""
        return self.objective.micro_batches(self.batches)

    def generator(self, purpose: str) -> torch.Generator:
        """Returns a generator that depends on (seed, purpose, step) alone, on the CPU."""
        return generator_of(self.seed, purpose, self.step)
