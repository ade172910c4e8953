"""From what a caller names to instruments and their schedules; options are checked as a recipe's are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessprobe.errors import UserError, unknown_name
from hessprobe.instruments.snapshot import Probe
from hessprobe.measuring.row_recorder import build_probes
from hessprobe.measuring.schedule import Every, Schedule, schedule_of
from hessprobe.problem.partition import PARTITIONS
from hessprobe.recipe import build_recipe

Options = Mapping[str, Any]
Chosen = str | Probe | Mapping[str, Options] | Sequence[str | Probe | Mapping[str, Options]]
EVERY = 50  # steps of somebody's own training are many and short; a recipe's are few and long
_LIMITED = ("cross_layer", "gn_hessian")  # whose section has one number for the sequences read


@dataclass(frozen=True, kw_only=True)
class ChosenProbes:
    """Instruments, when each is due, and what was asked for as the log's attribute `recipe` keeps it."""

    probes: list[Probe]
    schedules: dict[str, Schedule]
    recipe: dict[str, Any]


def choose(chosen: Chosen, every: Any, *, sequences: int | None, seed: int) -> ChosenProbes:
    """Returns the instruments for names, names with options, and Probe objects.

    Args:
        every: a schedule for all, one per probe in a mapping, or None for the probes' own, 50 where options say nothing.
        sequences: default of cross_layer's and gn_hessian's `sequences`.

    Raises:
        UserError: none, one twice, an unknown name or option, a schedule that is none.
    """
    listed = [chosen] if isinstance(chosen, str | Probe | Mapping) else list(chosen)
    options: dict[str, Options] = {}
    order: list[str | Probe] = []
    for entry in listed:
        if isinstance(entry, Mapping):
            options |= entry
            order.extend(entry)
        else:
            order.append(entry)
    names = [entry.name if isinstance(entry, Probe) else entry for entry in order]
    if not names or len(set(names)) < len(names):
        raise UserError(f"probes: wanted at least one, each once, got {', '.join(names) or 'none'}")
    named = [entry for entry in order if isinstance(entry, str)]
    sections: dict[str, dict[str, Any]] = {name: dict(options.get(name, {})) for name in named}
    for name in named:
        sections[name].setdefault("every", EVERY)
        if name in _LIMITED and sequences is not None:
            sections[name].setdefault("sequences", sequences)
    checked = build_recipe({"probes": named, "seed": seed, **sections})
    built = {probe.name: probe for probe in build_probes(checked)}
    probes = [entry if isinstance(entry, Probe) else built[entry] for entry in order]
    schedules = _schedules(every, probes)
    dumped = checked.model_dump(mode="json", include={"probes", "seed", *named})
    for name in named:
        schedule = schedules[name]
        dumped[name]["every"] = schedule.steps if isinstance(schedule, Every) else str(schedule)
    return ChosenProbes(probes=probes, schedules=schedules, recipe={**dumped, "probes": names})


def check_choice(probes: Chosen, every: Any, partition: Any, sequences: int | None) -> None:
    """Raises a UserError for a recorder's arguments that are wrong whatever the model."""
    choose(probes, every, sequences=sequences, seed=0)
    if isinstance(partition, str) and partition not in PARTITIONS:
        raise unknown_name("partition", partition, [*PARTITIONS, "a function name -> block"])


def _schedules(every: Any, probes: Iterable[Probe]) -> dict[str, Schedule]:
    own = {probe.name: schedule_of(probe.every) for probe in probes}
    if every is None:
        return own
    if not isinstance(every, Mapping):
        schedule = schedule_of(every)
        return dict.fromkeys(own, schedule)
    for name in every:
        if name not in own:
            raise unknown_name("probe", str(name), own)
    return own | {name: schedule_of(given) for name, given in every.items()}
