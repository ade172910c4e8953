"""Stages in order of worth under a budget of time: each leaves its figures, whatever happens in it or after it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessprobe.validation.figures import Figure, failure, failures, skipped
from hessprobe.validation.page import render_validation

if TYPE_CHECKING:
    import torch

JSON, PAGE, SCRATCH = "validate.json", "validate.html", "scratch"
SCHEMA = 1


class Budget:
    """How many seconds are left, of all and of the stage that is running.

    Args:
        seconds: for everything, from now on.
        clock: seconds as a monotonic clock counts them.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.began = clock, clock()
        self.end = self.stage_end = self.began + seconds

    @property
    def left(self) -> float:
        """Seconds left of everything."""
        return self.end - self.clock()

    @property
    def stage_left(self) -> float:
        """Seconds left of the running stage's share."""
        return self.stage_end - self.clock()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.began

    def start_stage(self, share: float) -> None:
        """Gives the coming stage a share (0 to 1) of what is left; what it does not need is left for the others."""
        self.stage_end = self.clock() + share * max(0.0, self.left)

    def fits(self, seconds: float) -> bool:
        """Whether something of that length fits the running stage's share."""
        return seconds <= self.stage_left


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a stage works with: the device, whether sizes are shrunken, a folder for files, and the time there is."""

    device: torch.device
    small: bool
    folder: Path
    budget: Budget


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a validation.

    Attributes:
        name: a word; also the anchor on the page.
        title: a line for readers.
        run: yields the figures.
        weight: its share of the time that is left is weight over the weights of all stages still to come.
        least: seconds below which it is not begun.
    """

    name: str
    title: str
    run: Callable[[Bench], Iterator[Figure]]
    weight: float = 1.0
    least: float = 2.0


@dataclass(kw_only=True)
class Validation:
    """Everything found so far.

    Attributes:
        machine: facts by name: device, versions, commit, what was asked for.
        titles: the stages' titles by name, in order.
        seconds: what each finished stage took.
    """

    machine: Mapping[str, str]
    titles: Mapping[str, str]
    figures: list[Figure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    @property
    def failures(self) -> list[Figure]:
        """The checks that did not pass."""
        return failures(self.figures)

    @property
    def checks(self) -> int:
        """How many checks there are."""
        return sum(figure.kind == "check" for figure in self.figures)

    def of_stage(self, name: str) -> list[Figure]:
        """Returns one stage's figures in their order."""
        return [figure for figure in self.figures if figure.stage == name]

    def as_json(self) -> dict[str, Any]:
        """Returns what validate.json holds."""
        return {
            "schema": SCHEMA,
            "machine": dict(self.machine),
            "finished": self.finished,
            "checks": self.checks,
            "failed": len(self.failures),
            "stages": [
                {"name": name, "title": title, "seconds": self.seconds.get(name)}
                for name, title in self.titles.items()
            ],
            "figures": [figure.as_json() for figure in self.figures],
        }

    def write(self, folder: Path) -> None:
        """Writes validate.json and validate.html, each whole or not at all."""
        for name, text in (
            (JSON, json.dumps(self.as_json(), indent=1, allow_nan=False)),
            (PAGE, render_validation(self)),
        ):
            partial = folder / f".{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(folder / name)


def run_stages(
    stages: Sequence[Stage],
    bench: Bench,
    machine: Mapping[str, str],
    folder: Path,
    say: Callable[[str], None] = print,
) -> Validation:
    """Runs the stages in their order and returns what they found; writes JSON and page after every one.

    A stage that raises leaves a failed check and the figures it had; one that no longer fits is said to be left out.
    """
    found = Validation(machine=machine, titles={stage.name: stage.title for stage in stages})
    for number, stage in enumerate(stages):
        budget = bench.budget
        began = budget.clock()
        budget.start_stage(stage.weight / sum(later.weight for later in stages[number:]))
        say(f"\n{stage.title}")
        for figure in _figures(stage, bench):
            now = budget.clock()
            figure = replace(figure, stage=stage.name, seconds=round(now - began - _spent(found, stage), 3))
            found.figures.append(figure)
            say(figure.line)
        found.seconds[stage.name] = round(budget.clock() - began, 3)
        found.finished = number == len(stages) - 1
        found.write(folder)
    return found


def _spent(found: Validation, stage: Stage) -> float:
    return sum(figure.seconds for figure in found.of_stage(stage.name))


def _figures(stage: Stage, bench: Bench) -> Iterator[Figure]:
    """Yields a stage's figures, and where it raises or is not begun, that."""
    if bench.budget.left < stage.least:
        left = max(0.0, bench.budget.left)
        yield skipped(
            "the whole stage", f"{left:.0f} s are left and it takes {stage.least:g}: give more --minutes"
        )
        return
    try:
        yield from stage.run(bench)
    except Exception as error:  # the next stage has figures of its own to leave
        yield failure("the rest of the stage", error)
