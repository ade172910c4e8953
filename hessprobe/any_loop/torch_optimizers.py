"""What trains in somebody else's loop, as the instruments know it: torch's optimizers read as one of ours.

The preconditioner probe asks what the running optimizer would do with another gradient, and answers with a copy of its
state in FirstOrder (optimization/inner_solver.py), one AdamW or a Muon beside an AdamW. So a translation is made only
where the two would take the same step; any other optimizer is none of ours (solver "").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.optimization.inner_solver import FirstOrder, hidden_matrices
from hessprobe.optimization.running import RunningOptimizer, running_optimizer
from hessprobe.problem.partition import Partition

_KINDS = {torch.optim.Adam: "adamw", torch.optim.AdamW: "adamw", torch.optim.Muon: "muon"}
# What makes two groups of one kind take different steps from the same gradients, but for rate and weight decay: a
# candidate is judged at its best step along a direction, without decay.
_ALIKE = {
    "adamw": ("betas", "eps", "amsgrad"),
    "muon": ("momentum", "nesterov", "ns_coefficients", "ns_steps", "eps", "adjust_lr_fn"),
}
_NONE_OF_OURS = RunningOptimizer(solver="", state=None)


def running(optimizers: Iterable[Any], model: nn.Module, partition: Partition) -> RunningOptimizer | None:
    """Returns what the optimizers together are as one of hessprobe's, their state copied; None where there is none.

    Wrappers with an attribute `optimizer` (accelerate's, Lightning's) are looked through. Learning rates that differ
    between groups are not followed. Cost: a copy of the state of the partitioned parameters.
    """
    found = [_unwrapped(optimizer) for optimizer in optimizers]
    if not found:
        return None
    if len(found) == 1 and (ours := running_optimizer(found[0])) is not None:
        return ours
    named = {name: p for name, p in model.named_parameters() if name in partition.names}
    kind_of, groups, states = {}, {}, {}
    for optimizer in found:
        kind = _KINDS.get(type(optimizer))
        for group in getattr(optimizer, "param_groups", ()):
            trained = {id(p) for p in group["params"]} & {id(p) for p in named.values()}
            if trained and (kind is None or not _alike(groups.setdefault(kind, group), group, kind)):
                return _NONE_OF_OURS
            kind_of |= dict.fromkeys(trained, kind)
        states |= {id(p): state for p, state in getattr(optimizer, "state", {}).items()}
    solver = "muon" if "muon" in groups else "adamw"
    hidden = hidden_matrices(model) if solver == "muon" else ()
    wanted = {id(p): "muon" if name in hidden else "adamw" for name, p in named.items()}
    if kind_of != wanted or groups.get("adamw", {}).get("amsgrad"):
        return _NONE_OF_OURS
    return RunningOptimizer(solver=solver, state=_state(solver, named, hidden, groups, states))


def _unwrapped(optimizer: Any) -> Any:
    while not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _alike(one: Mapping[str, Any], other: Mapping[str, Any], kind: str) -> bool:
    return all(one.get(key) == other.get(key) for key in _ALIKE[kind]) and not other.get("maximize")


def _state(
    solver: str,
    named: Mapping[str, Tensor],
    hidden: tuple[str, ...],
    groups: Mapping[str, Mapping[str, Any]],
    states: Mapping[int, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Returns what FirstOrder.state_dict would, had it trained these parameters."""
    stand_in = FirstOrder(solver, named, hidden)
    found = []
    for optimizer in stand_in.optimizers:
        kind = _KINDS[type(optimizer)]
        (group,) = optimizer.param_groups
        own = {i: states.get(id(p)) for i, p in enumerate(group["params"])}
        settings = {key: groups[kind][key] for key in _ALIKE[kind]}
        saved = optimizer.state_dict()
        found.append(
            {
                "state": {i: _copied(state) for i, state in own.items() if state},
                "param_groups": [{**saved["param_groups"][0], **settings}],
            }
        )
    return found


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: x.detach().clone() if isinstance(x, Tensor) else x for key, x in state.items()}
