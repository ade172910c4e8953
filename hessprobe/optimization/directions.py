"""What each candidate preconditioner would do with a gradient: d = -M^-1 g, or the step of an optimizer that is none.

Every candidate sees the same place: theta, a batch, the batch's gradient. Gauss-Newton's own directions, full or by
groups of layers, are solves and stand elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.optimization.optimizer_steps import OPTIMIZERS, built_step, has_run, running_step
from hessprobe.optimization.place import Direction, Place
from hessprobe.optimization.running import RunningOptimizer

BUILT = ("gradient", *OPTIMIZERS, "kfac", "ekfac", "diagonal_gn")


def directions(
    name: str,
    place: Place,
    dampings: Sequence[float],
    *,
    generator: torch.Generator,
    running: RunningOptimizer | None = None,
) -> list[Direction]:
    """Returns one candidate's direction for each damping: the same object where it has no damping of its own.

    - "gradient": -g.
    - "adam", "sophia", "muon", "shampoo", "soap": the step that optimizer takes with g, at learning rate 1, without
      weight decay and clipping. Where it is the one that runs and has taken a step, from a copy of its state. A STATE
      WITH MOMENTUM ANSWERS WITH MOMENTUM: d is then mostly made of the gradients of the steps before, at other thetas
      and on other data; that is what the optimizer would do here, not what its preconditioner makes of g. Elsewhere
      from a state built on the place's batches (`built_step`), whose momentum holds gradients of theirs alone.
    - "kfac", "ekfac": -(K + damping)^-1 g with factors of sampled labels, one a token, for what K-FAC takes
      (`kronecker_names`); -(diag(G) + damping)^-1 g for the rest: embeddings, norms, tied heads. Where it is the one
      that runs and has taken a step, that optimizer's own step, with the damping and the momentum it runs with.
    - "diagonal_gn": -(diag(G) + damping)^-1 g, with diag(G) from labels sampled apart for up to 16 pieces of the batch,
      twice: every entry's relative error is about 1.4 / sqrt(2 pieces), 0.25 where there are as many.

    Args:
        name: one of BUILT.
        dampings: mu, added to K or diag(G).
        generator: of the labels that sophia, kfac, ekfac and diagonal_gn draw; the others leave it as it is.
        running: the run's optimizer before its step, or None.

    Cost, in gradients of the place's batches, beyond g: none for "gradient" and for a running adam, muon, shampoo or
    soap; 1 for these when built; 2 for sophia (when running: in the steps in which its curvature is due) and
    "diagonal_gn"; 1.7 for "kfac" and 3.3 for "ekfac" where matrices are as wide as high, and 2 where there is a rest.

    The model, its state and torch's global generators stay as they are.

    Raises:
        UserError: an unknown name; a damping not above 0 where one is used; a model or loss the candidate cannot take.
        RunFailed: factors that are not finite.
    """
    if name not in BUILT:
        raise unknown_name("candidate", name, BUILT)
    if name == "gradient":
        return [Direction(vector=-place.gradient, inverse=lambda rows: rows)] * len(dampings)
    if has_run(running, name):
        return [running_step(running, place, generator)] * len(dampings)
    if name in OPTIMIZERS:
        return [built_step(name, place, generator)] * len(dampings)
    for damping in dampings:
        if not damping > 0:
            raise UserError(
                f"damping {damping}: {name} may be singular, so it must be above 0; 0.001 to 0.1 are usual"
            )
    if name == "diagonal_gn":
        return _diagonal(place, dampings, generator)
    return _kronecker(name, place, dampings, generator)


def _diagonal(place: Place, dampings: Sequence[float], generator: torch.Generator) -> list[Direction]:
    diagonal = place.diagonal(generator)
    return [
        Direction(
            vector=-place.gradient / (diagonal + damping),
            inverse=lambda rows, damping=damping: rows / (diagonal + damping),
            gradients=0.0 if i else place.diagonal_cost,
        )
        for i, damping in enumerate(dampings)
    ]


def _kronecker(
    kind: str, place: Place, dampings: Sequence[float], generator: torch.Generator
) -> list[Direction]:
    partition = place.partition
    factors, cost = place.factors(kind, generator)
    rest: dict[str, Tensor] = {}
    if set(partition.names) - set(factors.names):
        diagonal = partition.unflatten(place.diagonal(generator))
        rest = {name: x for name, x in diagonal.items() if name not in factors.names}
        cost += place.diagonal_cost

    def inverse(rows: Tensor, damping: float) -> Tensor:
        tensors = partition.unflatten(rows)
        solved = factors.apply_inverse(tensors, damping=damping)
        return partition.flatten(solved | {n: tensors[n] / (x + damping) for n, x in rest.items()})

    return [
        Direction(
            vector=-inverse(place.gradient, damping),
            inverse=lambda rows, damping=damping: inverse(rows, damping),
            gradients=0.0 if i else cost,
        )
        for i, damping in enumerate(dampings)
    ]
