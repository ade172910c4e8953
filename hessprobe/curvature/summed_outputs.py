"""What curvlinops' Kronecker factors are made of: the summed loss of chosen tokens, with nothing left behind.

Given a mean, curvlinops divides by shapes of data and outputs, and is silently wrong by orders of magnitude where
they are not laid out as it expects. Given a sum it takes the shapes of layers' inputs alone; those are counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessprobe.curvature.cost import passes
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective

# torch's losses by family, summed, and what makes their Hessians the family's: MSELoss sums |z - y|^2, we half of it.
LOSSES = {
    "softmax": (nn.CrossEntropyLoss, 1.0),
    "squared": (nn.MSELoss, 0.5),
    "logistic": (nn.BCEWithLogitsLoss, 1.0),
}
EMPIRICAL = ("cross_entropy", "squared_error")  # whose gradients at the data's labels are torch's
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class SummedOutputs(nn.Module):
    """The model as curvlinops takes it: chosen tokens to outputs (n, c), one row a term of the summed loss.

    Args:
        objective: model and loss, its family one of LOSSES.
        fisher, samples: as in `kronecker_factors`.
    """

    def __init__(self, objective: Objective, fisher: str, samples: int) -> None:
        super().__init__()
        self.model = objective.model
        self.objective = objective
        self.fisher, self.samples = fisher, samples
        self.forwards, self.backwards, self.running = 0, 0, False

    def forward(self, chosen: dict[str, Any]) -> Tensor:
        self.running = True
        z = self.objective.outputs(chosen["batch"])[chosen["tokens"]]
        self.running = False
        if (
            self.fisher != "empirical"
        ):  # the same outputs, their gradients times the root of what weighs the loss
            targets = self.objective.targets(chosen["batch"])[chosen["tokens"]]
            root = self.objective.loss_function.hessian_scale(z.detach(), targets).sqrt()
            if not bool((root == 1).all()):
                z = z * root + (z * (1 - root)).detach()
        self.forwards += 1
        self.backwards += {"mc": self.samples, "exact": z.shape[1], "empirical": 1}[self.fisher]
        return z

    def arguments(self, batches: MicroBatches, names: Sequence[str], seed: int) -> dict[str, Any]:
        """Returns the arguments of curvlinops' K-FAC operators for the summed loss of the batches."""
        loss, _ = LOSSES[str(self.objective.loss_function.family)]
        return {
            "model_func": self,
            "loss_func": loss(reduction="sum"),
            "params": [self.model.get_parameter(name) for name in names],
            "data": [
                datum
                for batch, (_, length) in zip(batches, batches.shapes, strict=True)
                for datum in self._data(batch, length)
            ],
            "check_deterministic": False,
            "seed": seed,
            "fisher_type": "type-2" if self.fisher == "exact" else self.fisher,
            "mc_samples": self.samples if self.fisher == "mc" else 1,
            "num_per_example_loss_terms": 1,
            "num_data": 1,
            "batch_size_fn": lambda _: 1,
        }

    def _data(self, batch: Batch, length: int) -> list[tuple[dict[str, Any], Tensor]]:
        """Returns the batch's tokens with a target: at once, or for "exact" those of one position after another.

        Sent back together, the same class of two positions of a sequence would add up coherently: in a decoder
        curvlinops' "type-2" is then up to four times too large. Drawn labels are independent, and need no such care.
        """
        targets = self.objective.targets(batch)
        valid = self.objective.loss_function.valid(targets).nonzero()[:, 0]
        groups = [valid]
        if self.fisher == "exact":
            position = valid % length
            groups = [valid[position == t] for t in position.unique()]
        # Only "empirical" reads the labels; curvlinops checks them whatever they are for.
        y = targets if self.fisher == "empirical" or targets.dim() == 1 else torch.zeros_like(targets)
        if self.objective.loss_function.family == "softmax" and y.dim() > 1:
            y = y.new_zeros(len(y), dtype=torch.long)
        return [({"batch": batch, "tokens": kept}, y[kept]) for kept in groups if len(kept)]

    def scale(self, batches: MicroBatches) -> float:
        """Returns what turns curvlinops' sums over tokens into our mean loss's."""
        return LOSSES[str(self.objective.loss_function.family)][1] / batches.weight

    def cost(self, names: Sequence[str]) -> float:
        """Returns the gradient-equivalents of the passes so far and of their sums of outer products."""
        weights = sum(
            m.in_features * m.out_features for m in self.model.modules() if isinstance(m, nn.Linear)
        )
        products = 0
        for module in {name.rpartition(".")[0] for name in names}:
            linear = cast("nn.Linear", self.model.get_submodule(module))
            products += self.forwards * linear.in_features**2 + self.backwards * linear.out_features**2
        return passes(self.forwards, 2 * self.backwards, products / weights)


def module_of(name: str) -> tuple[str, str]:
    """Returns the module of a parameter, by its name inside SummedOutputs, and the parameter's own name."""
    module, _, kind = f"model.{name}".rpartition(".")
    return module, kind


@dataclass
class Count:
    """Calls of a module, the rows that entered it, and the number by which curvlinops divided their sum."""

    calls: int = 0
    rows: int = 0
    divisor: int = 1


@contextmanager
def counted(presented: SummedOutputs, names: Sequence[str]) -> Iterator[dict[str, Count]]:
    """Counts what enters each module while in force; a checkpoint's recomputation adds rows, as it does to the sum."""
    counts = {module_of(name)[0]: Count() for name in names}

    def counter(count: Count) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            count.calls += presented.running
            count.rows += inputs[0].shape[:-1].numel()
            count.divisor = inputs[0].shape[1:-1].numel()

        return hook

    handles = [
        presented.get_submodule(module).register_forward_pre_hook(counter(count))
        for module, count in counts.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooks_taken_out(model: nn.Module, parameters: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Puts theta in the model's place, and takes it out again with every hook that a failure left behind."""
    hooks = [(module, {kind: set(getattr(module, kind)) for kind in _HOOKS}) for module in model.modules()]
    own = {name: model.get_parameter(name).data for name in parameters or ()}
    try:
        for name in own:
            model.get_parameter(name).data = (parameters or {})[name].detach()
        yield
    finally:
        for name, data in own.items():
            model.get_parameter(name).data = data
        for module, before in hooks:
            for kind, kept in before.items():
                for key in set(getattr(module, kind)) - kept:
                    del getattr(module, kind)[key]
