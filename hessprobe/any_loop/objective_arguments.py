"""What a recorder is given to measure: an objective as it is, or a model and how its loss is read from a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hessprobe.errors import UserError
from hessprobe.problem.objective import Objective

Arguments = Mapping[str, Any]


def objective_of(given: Objective | nn.Module, arguments: Arguments) -> Objective:
    """Returns the objective of a model with those of Objective's arguments that are not None, or the one given.

    Raises:
        UserError: neither of them; an objective, and an argument that says otherwise than it does.
    """
    said = {name: value for name, value in arguments.items() if value is not None}
    if isinstance(given, Objective):
        check_agreement(given, said)
        return given
    if not isinstance(given, nn.Module):
        raise UserError(
            f"wanted the model that is trained (an nn.Module) or an hp.Objective, got {type(given).__name__}"
        )
    return Objective(given, **said)


def check_agreement(objective: object, arguments: Arguments) -> None:
    """Raises a UserError where an argument stands beside an objective that does not say the same."""
    loss = getattr(objective, "loss_function", None)
    same = {
        "loss": (loss, getattr(loss, "name", None)),
        "ignore_index": (getattr(loss, "ignore_index", None),),
    }
    wrong = [
        name
        for name, value in arguments.items()
        if value is not None and not any(value is own or value == own for own in same.get(name, ()))
    ]
    if wrong:
        both = ", ".join(f"{name}=" for name in wrong)
        raise UserError(
            f"{both} given beside an objective, which has its own: give the model with {both}, or an objective made with "
            "them and nothing beside it"
        )
