"""K-FAC as a training step: theta -= learning rate * bound * (K + damping)^{-1} m on linear layers, AdamW on the rest.

K is the Kronecker-factored stand-in for G of the last refresh, m the mean of gradients with decay `momentum`, freed of
its bias. The step is as long as the curvature says, so it needs a bound: K leaves out what couples the layers, and G is
right near theta only. As in Ba, Grosse, Martens 2017 the full step may move the model by no more than `trust` nats per
token, to second order: bound = min(1, sqrt(trust / (1/2 d.(K + damping) d))); for cross-entropy that is a KL divergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hessprobe.curvature.kronecker_factors import KINDS, KroneckerFactors, check_damping
from hessprobe.errors import UserError, unknown_name
from hessprobe.optimization.inner_solver import norm_and_scale
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

DAMPING, TRUST = 0.01, 0.01
REST_RATE = 0.003  # AdamW's learning rate where K-FAC's is 1: the two scale together


class KFAC:
    """K-FAC or EK-FAC over a model's linear layers and AdamW over the rest, with gradients handed in.

    What K-FAC takes is what `kronecker_names` names: weights and biases of nn.Linear, the head included, sides up to
    8,192. Embedding, norms and larger layers go to AdamW, at 0.003 times the learning rate.

    Args:
        objective: model and loss; `step` moves the model's parameters in place.
        partition: which parameters move.
        kind: "kfac" or "ekfac".
        damping: added to every eigenvalue of K.
        momentum: decay of the mean of gradients; 0 takes the last one.
        trust: how far, in nats per token, a step at learning rate 1 may move the model by K's own measure; None does
            not bound it. The layers' moves add up coherently, so the model really moves several times as far.
        betas: of AdamW.
        weight_decay: of all parameters alike, decoupled, times AdamW's learning rate.

    Raises:
        UserError: an unknown kind; damping or trust not above 0; momentum outside [0, 1).
    """

    def __init__(
        self,
        objective: Objective,
        partition: Partition,
        *,
        kind: str = "kfac",
        damping: float = DAMPING,
        momentum: float = 0.9,
        trust: float | None = TRUST,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        if kind not in KINDS:
            raise unknown_name("Kronecker factorisation", kind, KINDS)
        check_damping(damping)
        if trust is not None and not trust > 0:
            raise UserError(f"trust must be above 0 nats per token, or None for no bound, got {trust}")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum must lie in [0, 1), got {momentum}")
        self.objective, self.partition, self.kind = objective, partition, kind
        self.damping, self.momentum, self.trust = damping, momentum, trust
        self.betas, self.weight_decay = betas, weight_decay
        named = dict(objective.model.named_parameters())
        self.parameters = {name: named[name] for name in partition.names}
        self.factors: KroneckerFactors | None = None
        self.mean: dict[str, Tensor] = {}
        self.rest: torch.optim.Optimizer | None = None
        self.steps = 0

    def refresh(self, batches: Batch | Sequence[Batch], generator: torch.Generator) -> float:
        """Builds the factors anew at the present parameters, and returns what that cost in gradients of a minibatch.

        Args:
            generator: of the labels drawn from the model.

        Raises:
            UserError: no layer that K-FAC takes.
            RunFailed: factors that are not finite.
        """
        from hessprobe.curvature.kronecker import kronecker_factors  # curvlinops: only who asks for it pays

        listed = self.objective.micro_batches(batches)
        pieces = listed.parted([piece for batch in listed for piece in self.objective.pieces(batch)])
        factors = kronecker_factors(
            self.objective, pieces, self.partition, kind=self.kind, generator=generator
        )
        self._take(factors)
        return factors.gradient_equivalents * len(listed) / len(pieces)

    def _take(self, factors: KroneckerFactors) -> None:
        self.factors = factors
        if not self.mean:
            self.mean = {name: torch.zeros_like(self.parameters[name]) for name in factors.names}
            rest = [p for name, p in self.parameters.items() if name not in self.mean]
            if rest:
                self.rest = torch.optim.AdamW(rest, lr=0.0, betas=self.betas, weight_decay=self.weight_decay)

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], learning_rate: float, clip: float | None) -> float:
        """Takes one step along the gradients and returns their norm before clipping.

        Args:
            clip: greatest global norm of the gradients; None leaves them as they are.
        """
        if self.factors is None:
            raise UserError(
                "K-FAC has no factors yet: call refresh(batches, generator) before the first step"
            )
        norm, scale = norm_and_scale(gradients, clip)
        self.steps += 1
        unbiased = 1 - self.momentum**self.steps
        for name, mean in self.mean.items():
            mean.lerp_(gradients[name] * scale, 1 - self.momentum)
        smoothed = {name: mean / unbiased for name, mean in self.mean.items()}
        steps = self.factors.apply_inverse(smoothed, damping=self.damping)
        moved = 0.5 * float(torch.stack([(smoothed[n] * d).sum() for n, d in steps.items()]).sum())
        bound = 1.0 if self.trust is None or moved <= self.trust else math.sqrt(self.trust / moved)
        for name, step in steps.items():
            p = self.parameters[name]
            p.mul_(1 - REST_RATE * learning_rate * self.weight_decay).sub_(step, alpha=learning_rate * bound)
        if self.rest is not None:
            for name, gradient in gradients.items():
                if name not in steps:
                    self.parameters[name].grad = gradient * scale
            self.rest.param_groups[0]["lr"] = REST_RATE * learning_rate
            self.rest.step()
            self.rest.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Returns the factors, the mean of gradients and AdamW's state, for a checkpoint."""
        return {
            "steps": self.steps,
            "factors": None if self.factors is None else self.factors.state_dict(),
            "mean": dict(self.mean),
            "rest": None if self.rest is None else self.rest.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.steps, self.factors, self.mean, self.rest = state["steps"], None, {}, None
        if state["factors"] is not None:
            self._take(KroneckerFactors.from_state_dict(state["factors"]))
        for name, mean in state["mean"].items():
            self.mean[name].copy_(mean)
        if self.rest is not None:
            self.rest.load_state_dict(state["rest"])
