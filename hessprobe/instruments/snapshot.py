"""What an instrument is: a table it declares before it measures, and a measurement of one snapshot of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessprobe.machine.seeds import generator_of
from hessprobe.optimization.running import RunningOptimizer
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.schema.table import Table

Row = Mapping[str, Any]


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
        """theta by parameter name."""
        return self.partition.unflatten(self.parameters)

    @cached_property
    def micro_batches(self) -> MicroBatches:
        """The batches as probes work on them, checked once whichever of a row's parts asks for them."""
        return self.objective.micro_batches(self.batches)

    def generator(self, purpose: str) -> torch.Generator:
        """Returns a generator that depends on (seed, purpose, step) alone, on the CPU."""
        return generator_of(self.seed, purpose, self.step)


class Probe:
    """An instrument. It declares its table, and measures one row of it from a snapshot.

    Attributes:
        name: of the probe, its table and its section of a recipe.
        every: outer steps between rows.
        sequences: how many a row reads.
        needs_optimizer: whether snapshots must carry the running optimizer's state, which is copied for it.
    """

    name: str
    every: int
    sequences: int
    needs_optimizer = False

    @property
    def unit_sequences(self) -> int:
        """The sequences of the batch whose gradient is the unit of `cost`; default: all that a row reads."""
        return self.sequences

    def table(self, partition: Partition) -> Table:
        """Returns the table this probe fills, its coordinates those of the partition."""
        raise NotImplementedError

    def measure(self, snapshot: Snapshot) -> Row:
        """Returns one row of the table, but for `seconds` and `peak_memory`, which the recorder knows.

        Anything raised marks the row as failed with its reason; training goes on.
        """
        raise NotImplementedError

    def cost(self, partition: Partition) -> float:
        """Returns what one row costs at most, by operation count, in gradients of `unit_sequences` sequences."""
        raise NotImplementedError

    def vectors(self, partition: Partition) -> float:
        """Returns how many vectors as long as theta a row holds at once, for estimates of memory."""
        raise NotImplementedError
