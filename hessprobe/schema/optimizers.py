"""The optimizers that train beside Gauss-Newton, an entry each: every list of them is made from this table."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST = 10_000  # a longer side is preconditioned from the other side alone (SOAP), or its matrix not at all (Shampoo)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer.

    Attributes:
        label: as tables and figures call it.
        learning_rate: what a recipe that names none gets.
        builds: "package.module:function" of function(parameters, lr=, weight_decay=) -> torch optimizer, with refresh=
            where there is one; the learning rate is then set before every step. "" for K-FAC, which needs layers.
        elementwise: whether it takes every parameter, or the matrices inside blocks alone and AdamW the rest.
        refresh: default steps between two preconditioners; None where there is none.
        inner_learning_rate: default as a recipe's inner solver of Gauss-Newton; None where it is not offered as one.
        estimate: gradients that an estimate of curvature costs, a minibatch; 0 takes gradients alone. Estimates of diag(G)
            are handed to the built optimizer's `step(hessian=)` every `refresh` steps.
        floats: numbers kept for every parameter that it takes.
        squares: matrices kept for each side of a matrix, side x side.
    """

    label: str
    learning_rate: float
    builds: str
    elementwise: bool = False
    refresh: int | None = None
    inner_learning_rate: float | None = None
    estimate: int = 0
    floats: int = 2
    squares: int = 0


_LIBRARY = "hessprobe.optimization.library_optimizers"
# Learning rates: of 4 each, tried over 18 steps of 8,192 bytes on the recipe nano with 2 layers, about the one with the
# least held-out loss, and below it where that was the largest tried.
ENTRIES = {
    "adamw": Entry(
        label="AdamW",
        learning_rate=0.01,
        builds="torch.optim:AdamW",
        elementwise=True,
        inner_learning_rate=0.01,
    ),
    "muon": Entry(
        label="Muon", learning_rate=0.05, builds="torch.optim:Muon", inner_learning_rate=0.02, floats=1
    ),
    "soap": Entry(
        label="SOAP",
        learning_rate=0.02,
        builds=f"{_LIBRARY}:soap",
        refresh=1,
        inner_learning_rate=0.01,
        squares=2,
    ),
    "shampoo": Entry(label="Shampoo", learning_rate=0.01, builds=f"{_LIBRARY}:Shampoo", refresh=1, squares=2),
    "sophia": Entry(
        label="Sophia",
        learning_rate=0.006,
        builds=f"{_LIBRARY}:Sophia",
        elementwise=True,
        refresh=10,
        estimate=1,
    ),
    "kfac": Entry(label="K-FAC", learning_rate=1.0, builds="", refresh=1, estimate=3, squares=1),
}


def inner_order() -> tuple[str, ...]:
    """Returns the names as solvers of Gauss-Newton's inner problem are listed: the reference study's before the others."""
    return tuple(sorted(ENTRIES, key="muon".__ne__))
