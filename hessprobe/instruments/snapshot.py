"""One moment of training, as every instrument is shown it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.instruments.probe import Probe, Row
from hessprobe.optimization.running import RunningOptimizer
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
        batches: the probe's own micro-batches.
        update: what the optimizer then really added to theta (p,), or None where that is not known.
        optimizer: the running optimizer's name and state before that step, or None where that is not known.
        seed: of the run.
    """

    step: int
    objective: Objective
    partition: Partition
    parameters: Tensor
    batches: list[Batch]
    update: Tensor | None
    seed: int
    optimizer: RunningOptimizer | None = None

    @property
    def named_parameters(self) -> dict[str, Tensor]:
        """theta by parameter name."""
        return self.partition.unflatten(self.parameters)

    def generator(self, purpose: str) -> torch.Generator:
        """Returns a generator that depends on (seed, purpose, step) alone, on the CPU."""
        key = hashlib.sha256(f"{self.seed}/{purpose}/{self.step}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
