"""First-order solvers for Gauss-Newton's inner problem, and the same optimizers as training baselines.

As in the reference study: Muon (momentum 0.95) for matrices inside blocks, AdamW (same learning rate, betas
0.9 / 0.999, no decay) for embedding, head and vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.errors import unknown_name
from hessprobe.problem.layer_names import layer_of
from hessprobe.problem.partition import unwrapped

SOLVERS = ("muon", "adamw")
_OUTER_LAYERS = {"embedding", "head"}


def hidden_matrices(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the 2-D parameters that belong neither to the embedding nor to the head."""
    return tuple(
        name
        for name, p in unwrapped(model).named_parameters()
        if p.requires_grad and p.dim() == 2 and layer_of(name) not in _OUTER_LAYERS
    )


class FirstOrder:
    """Muon or AdamW over named parameters, with gradients handed in and the learning rate set from outside.

    Args:
        solver: "muon" or "adamw".
        parameters: by name; updated in place.
        hidden: names of the matrices that Muon takes; AdamW takes the rest.
        betas, momentum, weight_decay: of AdamW, of Muon, and of both.

    Raises:
        UserError: an unknown solver.
    """

    def __init__(
        self,
        solver: str,
        parameters: Mapping[str, Tensor],
        hidden: tuple[str, ...],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        if solver not in SOLVERS:
            raise unknown_name("inner solver", solver, SOLVERS)
        self.parameters = dict(parameters)
        matrices = [p for n, p in parameters.items() if solver == "muon" and n in hidden]
        rest = [p for n, p in parameters.items() if solver != "muon" or n not in hidden]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=0.0, momentum=momentum, weight_decay=weight_decay)
            self.optimizers.append(muon)
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=0.0, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, clip: float | None) -> float:
        """Takes one step along the gradients and returns their norm before clipping.

        Args:
            clip: greatest global norm of the gradients; None leaves them as they are.
        """
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
        scale = 1.0 if clip is None else float((clip / (norm + 1e-12)).clamp_max(1.0))
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient * scale if scale < 1.0 else gradient
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the optimizers' states, for a checkpoint."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Puts back what `state_dict` gave."""
        for optimizer, saved in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(saved)
