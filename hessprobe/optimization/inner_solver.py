"""First-order solvers for Gauss-Newton's inner problem, and the same optimizers as training baselines.

A matrix method takes the matrices inside blocks, AdamW (same learning rate, betas 0.9 / 0.999) embedding, head and
vectors: Muon as in the reference study, SOAP and Shampoo alike. AdamW and Sophia, elementwise, take everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError, unknown_name
from hessprobe.problem.partition import inner_parameters, unwrapped
from hessprobe.schema.optimizers import ENTRIES, inner_order

# K-FAC, which needs layers, is not built from parameters alone.
SOLVERS = tuple(name for name in inner_order() if ENTRIES[name].builds)
INNER_SOLVERS = tuple(name for name in SOLVERS if not ENTRIES[name].estimate)  # from gradients alone
# Default steps between two preconditioners.
REFRESH = {name: every for name in SOLVERS if (every := ENTRIES[name].refresh) is not None}


def hidden_matrices(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the 2-D parameters that belong neither to the embedding nor to the head."""
    named = dict(unwrapped(model).named_parameters())
    return tuple(name for name in inner_parameters(model) if named[name].dim() == 2)


def norm_and_scale(gradients: Mapping[str, Tensor], clip: float | None) -> tuple[float, float]:
    """Returns the norm over all gradients together, and the factor at most 1 that brings it down to `clip`."""
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
    return float(norm), 1.0 if clip is None else float((clip / (norm + 1e-12)).clamp_max(1.0))


def refresh_of(solver: str, refresh: int | None, defaults: Mapping[str, int]) -> int:
    """Returns every how many steps the solver's preconditioner is computed anew.

    Raises:
        UserError: below 1, or a number for a solver that has no preconditioner.
    """
    if refresh is None:
        return defaults.get(solver, 1)
    if solver not in defaults:
        raise UserError(
            f"refresh {refresh}: {solver} has no preconditioner to refresh; leave it out, or choose one of "
            f"{', '.join(defaults)}"
        )
    if refresh < 1:
        raise UserError(f"refresh must be at least 1 step, got {refresh}")
    return refresh


class FirstOrder:
    """One of SOLVERS over named parameters, with gradients handed in and the learning rate set from outside.

    What they are, and where they depart from their library's defaults:
    - "muon": torch's (momentum 0.95, Nesterov, learning rate times sqrt(max(1, rows / columns))).
    - "adamw": torch's.
    - "soap" (Vyas et al. 2024): betas 0.95 / 0.95, basis refreshed every step. As in the authors' code its FIRST STEP
      ONLY BUILDS THE BASIS: the hidden matrices stand still for one step, the rest moves.
    - "shampoo" (Gupta et al. 2018; Anil et al. 2020): both factors to the power -1/4, means of statistics and of
      updates with decay 0.95, the latter freed of its bias, every matrix's step grafted to the size of sign(gradient):
      entries of root mean square 1 times the learning rate, as AdamW's. A matrix with a side above LARGEST: no factors.
    - "sophia" (Liu et al. 2023): lr * clip(m / (0.05 h), 1), decays 0.96 / 0.99; h averages the estimates of diag(G)
      that `step` is given, one at least at its first step.

    Args:
        solver: one of SOLVERS.
        parameters: by name; updated in place.
        hidden: names of the matrices that a matrix method takes; AdamW takes the rest.
        weight_decay: of all (decoupled: times the learning rate).
        refresh: steps between two preconditioners (default: 1); sophia's is the caller's affair.

    Raises:
        UserError: an unknown solver; refresh below 1 or for a solver without a preconditioner.
    """

    def __init__(
        self,
        solver: str,
        parameters: Mapping[str, Tensor],
        hidden: Sequence[str],
        *,
        weight_decay: float = 0.0,
        refresh: int | None = None,
    ) -> None:
        if solver not in SOLVERS:
            raise unknown_name("inner solver", solver, SOLVERS)
        self.solver = solver
        self.parameters = dict(parameters)
        self.refresh = refresh_of(solver, refresh, REFRESH)
        entry = ENTRIES[solver]
        self.own = tuple(n for n in parameters if entry.elementwise or n in hidden)
        rest = [p for n, p in parameters.items() if n not in self.own]
        # Estimates come to it when the caller's count says so.
        given = {} if entry.refresh is None or entry.estimate else {"refresh": self.refresh}
        self.optimizers: list[torch.optim.Optimizer] = []
        if self.own:
            module, _, function = entry.builds.partition(":")
            build = getattr(import_module(module), function)
            taken = [parameters[name] for name in self.own]
            self.optimizers.append(build(taken, lr=0.0, weight_decay=weight_decay, **given))
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=0.0, weight_decay=weight_decay))

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, Tensor],
        learning_rate: float,
        clip: float | None,
        *,
        diagonal: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Takes one step along the gradients and returns their norm before clipping.

        Args:
            clip: greatest global norm of the gradients; None leaves them as they are.
            diagonal: a fresh estimate of diag(G) by name, for sophia; None keeps the mean of the last ones.

        Raises:
            UserError: sophia's first step without an estimate.
        """
        estimated = self.optimizers[0] if self.own and ENTRIES[self.solver].estimate else None
        if estimated is not None and diagonal is None and not estimated.state:
            raise UserError(
                f"{self.solver} needs an estimate of diag(G) at its first step, got none: pass diagonal=; as an inner "
                f"solver of Gauss-Newton choose one of {', '.join(INNER_SOLVERS)}"
            )
        norm, scale = norm_and_scale(gradients, clip)
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient * scale if scale < 1.0 else gradient
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if optimizer is estimated:
                fresh = None if diagonal is None else [diagonal[name] for name in self.own]
                cast(Any, optimizer).step(hessian=fresh)
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the optimizers' states as tensors and numbers, for a checkpoint."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Puts back what `state_dict` gave."""
        for optimizer, saved in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(saved)
