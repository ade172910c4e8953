"""Where moments of training are taken for instruments, whoever trains: the weights as they are, or before a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.instruments.snapshot import Snapshot
from hessprobe.optimization.running import RunningOptimizer
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import is_sharded


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshots:
    """Takes the snapshots of one model.

    Attributes:
        seed: of the probes' random vectors.
    """

    objective: Objective
    partition: Partition
    seed: int

    def theta(self) -> Tensor:
        """Returns theta (p,) in at least float32: curvature in half precision is noise. Empty where it is sharded."""
        model = self.objective.model
        if is_sharded(model):
            return torch.empty(0, device=next(model.parameters()).device)
        theta = self.partition.vector(model)
        return theta.float() if theta.dtype in (torch.float16, torch.bfloat16) else theta

    def take(
        self,
        step: int,
        batches: Sequence[Batch],
        *,
        before: Tensor | None = None,
        update: Tensor | None = None,
        optimizer: RunningOptimizer | None = None,
    ) -> Snapshot:
        """Returns the moment before a step that was made, or the weights as they are where nothing is known of before.

        Args:
            step: outer steps done before this moment.
            batches: what is measured on, on the model's device.
            before: theta before the step; the update is what was added to it since.
            update: of the weights as they are, where one is known otherwise.
            optimizer: as it was before the step.
        """
        theta = self.theta()
        return Snapshot(
            step=step,
            objective=self.objective,
            partition=self.partition,
            parameters=theta if before is None else before,
            batches=batches,
            update=update if before is None else theta.sub_(before),
            seed=self.seed,
            optimizer=optimizer,
        )
