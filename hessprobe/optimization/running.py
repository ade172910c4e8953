"""The optimizer of a run at one moment, as far as an instrument may look at it: its name and a copy of its state."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from hessprobe.optimization.baselines import FirstOrderOptimizer
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.kfac import KFAC


@dataclass(frozen=True, kw_only=True)
class RunningOptimizer:
    """What trains, at one moment.

    Attributes:
        solver: "adamw", "muon", "soap", "shampoo", "sophia", "kfac" or "ekfac"; "" for one that is none of these.
        state: a copy of the solver's own `state_dict()` (FirstOrder's list or KFAC's mapping) before the step.
        refresh: steps between estimates of curvature, as it runs.
        damping: of a K-FAC that runs; NaN for others.
        trust: of a K-FAC that runs; None for others, and for one without a bound.
    """

    solver: str
    state: Any
    refresh: int = 1
    damping: float = float("nan")
    trust: float | None = None


def running_optimizer(optimizer: object) -> RunningOptimizer | None:
    """Returns a run's optimizer as it is now, its state copied; None for one that is not of hessprobe.

    Gauss-Newton, whose step is a solve, has no state that a candidate could answer from: its solver is "".
    """
    if isinstance(optimizer, GaussNewton):
        return RunningOptimizer(solver="", state=None)
    if not isinstance(optimizer, FirstOrderOptimizer):
        return None
    solver = optimizer.solver
    state = copy.deepcopy(solver.state_dict())
    if isinstance(solver, KFAC):
        return RunningOptimizer(
            solver=solver.kind,
            state=state,
            refresh=optimizer.refresh,
            damping=solver.damping,
            trust=solver.trust,
        )
    return RunningOptimizer(solver=solver.solver, state=state, refresh=optimizer.refresh)
