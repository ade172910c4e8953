"""The parameters as modules see them in a pass: fresh leaves put in their place or, sharded over devices, those gathered.

FSDP2 gathers a module's parameters before its forward pass and again before its backward pass, always into the same
tensors. Gradients with respect to these are plain gradients of this process: nothing is reduced, and no `.grad` changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.measuring import with_parameters
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.shares import is_sharded

Result = TypeVar("Result")


class Leaves:
    """The partitioned parameters of some passes, by name once `run` has begun them.

    Args:
        theta: their values by name; default: the model's own.
        wanted: those that gradients are wanted for.

    Raises:
        UserError: theta for a model whose parameters are sharded; no process could hold it.
    """

    def __init__(
        self,
        objective: Objective,
        partition: Partition,
        theta: Mapping[str, Tensor] | None = None,
        wanted: Sequence[str] = (),
    ) -> None:
        self.model, self.wanted = objective.model, wanted
        self.sharded = is_sharded(objective.model)
        if self.sharded and theta is not None:
            raise UserError(
                "a model sharded over devices is measured at its own parameters: leave out parameters="
            )
        self._found = {} if self.sharded else objective.leaves(partition, theta, wanted)

    def __getitem__(self, name: str) -> Tensor:
        return self._found[name]

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def run(self, function: Callable[[], Result]) -> Result:
        """Returns function() with the leaves in place, in backward too."""
        if not self.sharded:
            return with_parameters(self.model, self._found, function)
        handles = [
            module.register_forward_pre_hook(self._noting(prefix, own))
            for prefix, module in self.model.named_modules()
            if (
                own := [
                    n for n, _ in module.named_parameters(recurse=False) if _joined(prefix, n) in self.wanted
                ]
            )
        ]
        try:
            return function()
        finally:
            for handle in handles:
                handle.remove()

    def _noting(self, prefix: str, names: Sequence[str]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object) -> None:
            self._found.update({_joined(prefix, name): getattr(module, name) for name in names})

        return hook


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
