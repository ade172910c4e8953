"""Where a preconditioner is asked for a direction, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.curvature.diagonal import sampled_diagonal
from hessprobe.curvature.kronecker_factors import KroneckerFactors
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

# How diag(G) is sampled: labels drawn apart for this many pieces of the batches, this many times.
DIAGONAL_PIECES, DIAGONAL_ROUNDS = 16, 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where candidates are built: theta, the data they see, and the gradient they answer to.

    Attributes:
        objective: model and loss; theta is `parameters`, not the model's own.
        partition: which parameters theta holds, and in which order.
        parameters: theta (p,).
        batches: the micro-batches a candidate may read.
        gradient: of the mean loss per token over `batches` at theta (p,).
    """

    objective: Objective
    partition: Partition
    parameters: Tensor
    batches: Batch | Sequence[Batch]
    gradient: Tensor

    @property
    def named(self) -> dict[str, Tensor]:
        """Theta by parameter name, in the partition's order."""
        return self.partition.unflatten(self.parameters)

    def pieces(self, count: int) -> list[MicroBatches]:
        """Returns the batches as `count` lists of micro-batches of about one size, each with a target.

        Fewer where there are fewer sequences, or where nothing says how to cut a batch (see Objective.split).
        """
        listed = self.objective.micro_batches(self.batches)
        each = -(-count // len(listed))
        cut = [part for batch in listed for part in self.objective.split(batch, each)]
        read = listed.parted(cut).with_targets
        return [read[i::count] for i in range(min(count, len(read)))]

    def diagonal(self, generator: torch.Generator) -> Tensor:
        """Returns an estimate of diag(G) (p,) from labels sampled apart for 16 pieces of the batches, twice.

        Every entry's relative error is about 1.4 / sqrt(2 pieces), 0.25 where there are 16 sequences or more; larger for
        an entry that a few tokens or a few pieces make up.

        Cost: `diagonal_cost`, 2 gradients of the batches.

        Raises:
            UserError: a loss whose Hessian has no known root.
        """
        listed = self.objective.micro_batches(self.batches)
        drawn = [batch for piece in self.pieces(DIAGONAL_PIECES) for batch in piece] * DIAGONAL_ROUNDS
        return sampled_diagonal(
            self.objective, listed.parted(drawn), self.partition, generator=generator, parameters=self.named
        )

    @property
    def diagonal_cost(self) -> float:
        """What `diagonal` costs, in gradients of the batches."""
        return float(DIAGONAL_ROUNDS)

    def factors(self, kind: str, generator: torch.Generator) -> tuple[KroneckerFactors, float]:
        """Returns K-FAC's or EK-FAC's factors of labels sampled once a token, and their cost in gradients of the batches.

        Raises:
            UserError, RunFailed: as `kronecker_factors`.
        """
        from hessprobe.curvature.kronecker import kronecker_factors  # curvlinops: only who asks for it pays

        read = self.objective.micro_batches(self.batches).with_targets
        factors = kronecker_factors(
            self.objective, read, self.partition, kind=kind, generator=generator, parameters=self.named
        )
        return factors, factors.gradient_equivalents / len(read)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """What a candidate would add to theta, up to a factor.

    Attributes:
        vector: d (p,), for theta + d.
        inverse: M^-1 on rows, (k, p) -> (k, p), symmetric and positive definite, where d = -M^-1 g is linear in g; else
            None.
        gradients: what it cost to build, in gradients of the place's batches. What several dampings share is counted
            by the first of them alone: summed over the distinct directions of a list it is what the list cost.
    """

    vector: Tensor
    inverse: Callable[[Tensor], Tensor] | None = None
    gradients: float = 0.0
