"""Which parameters' per-sequence gradients are had which way: fast paths by module type, the rest by fallback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hessprobe.errors import UserError
from hessprobe.kernels.features import FastPath, fast_path_of
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition

ONE_SEQUENCE, MASKED = "one sequence at a time", "whole batch, one sequence's loss at a time"


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A module whose parameters' per-sequence gradients come from its inputs and its outputs' gradients."""

    module: nn.Module
    path: FastPath
    names: Mapping[str, str]  # the parameter's name in the module -> in the model


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which parameters are measured which way.

    Attributes:
        taps: fast paths.
        fallback: parameters differentiated sequence by sequence.
        how: ONE_SEQUENCE or MASKED, the fallback's way.
    """

    taps: tuple[Tap, ...]
    fallback: tuple[str, ...]
    how: str = ONE_SEQUENCE

    @property
    def routes(self) -> dict[str, str]:
        """The way of each parameter, by name."""
        fast = {name: tap.path.name for tap in self.taps for name in tap.names.values()}
        return {**fast, **dict.fromkeys(self.fallback, self.how)}


def first_plan(objective: Objective, partition: Partition) -> Plan:
    """Returns the plan by types alone: every module with a fast path whose parameters are its own."""
    model = objective.model
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    names = {id(p): name for name, p in model.named_parameters()}
    taps, covered = [], set()
    for module in model.modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if names.get(id(p)) in partition.names}
        path = fast_path_of(module)
        if own and path is not None and all(users[id(p)] == 1 for p in own.values()):
            found = {n: names[id(p)] for n, p in own.items()}
            taps.append(Tap(module=module, path=path, names=found))
            covered.update(found.values())
    rest = tuple(name for name in partition.names if name not in covered)
    return Plan(taps=tuple(taps), fallback=rest)


class NotOneCall(UserError):
    """A tap's module was not called once, with the sequences first: its parameters need the fallback."""

    def __init__(self, tap: Tap) -> None:
        super().__init__(
            f"the {type(tap.module).__name__} of {', '.join(tap.names.values())} was not called exactly once with the "
            "batch's sequences first, as when the plan was made; make the plan on this batch: "
            "verified_plan(objective, batch, partition)"
        )
        self.tap = tap


def without(plan: Plan, refused: set[int]) -> Plan:
    """Returns the plan with these taps' parameters (by the taps' ids) left to the fallback."""
    dropped = [name for tap in plan.taps if id(tap) in refused for name in tap.names.values()]
    kept = tuple(tap for tap in plan.taps if id(tap) not in refused)
    return Plan(taps=kept, fallback=(*plan.fallback, *dropped), how=plan.how)
