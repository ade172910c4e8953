"""K-FAC and EK-FAC: -(K + mu)^-1 g with factors of labels sampled once a token.

-(diag(G) + mu)^-1 g for what K-FAC does not take (`kronecker_names`): embeddings, norms, tied heads. Where it is the one
that runs and has taken a step, that optimizer's own step, with the damping and the momentum it runs with.

Cost, in gradients of the place's batches: 1.7 for K-FAC and 3.3 for EK-FAC where matrices are as wide as high, and 2 where
there is a rest.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from hessprobe.instruments.preconditioner.measure.candidates.candidate import (
    Candidate,
    Directions,
    Occasion,
    for_every_damping,
)
from hessprobe.optimization.optimizer_steps import has_run, running_step
from hessprobe.optimization.place import Direction


def _kronecker(kind: str, asked: Occasion) -> Directions:
    place, running = asked.place, asked.snapshot.optimizer
    if has_run(running, kind):
        return for_every_damping(asked, running_step(running, place, asked.generator))
    partition = place.partition
    factors, cost = place.factors(kind, asked.generator)
    rest: dict[str, Tensor] = {}
    if set(partition.names) - set(factors.names):
        diagonal = partition.unflatten(place.diagonal(asked.generator))
        rest = {name: x for name, x in diagonal.items() if name not in factors.names}
        cost += place.diagonal_cost

    def inverse(rows: Tensor, damping: float) -> Tensor:
        tensors = partition.unflatten(rows)
        solved = factors.apply_inverse(tensors, damping=damping)
        return partition.flatten(solved | {n: tensors[n] / (x + damping) for n, x in rest.items()})

    return Directions(
        directions=[
            Direction(
                vector=-inverse(place.gradient, damping),
                inverse=partial(inverse, damping=damping),
                gradients=0.0 if i else cost,
            )
            for i, damping in enumerate(asked.dampings)
        ]
    )


kfac = Candidate(answer=partial(_kronecker, "kfac"), most_gradients=3.7, damped=True, linear=True)
ekfac = Candidate(answer=partial(_kronecker, "ekfac"), most_gradients=5.3, damped=True, linear=True)
