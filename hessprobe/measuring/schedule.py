"""When a probe is due, as data: every so many steps, at steps that spread out by a factor, or at steps named one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index

from hessprobe.errors import UserError

LOGARITHMIC = "log"
PER_DECADE = 4
_WANTED = "wanted a number of steps (50), 'log' or 'log:N' (N steps per factor of ten), or a list of steps"


class Schedule:
    """Which steps are due. `step in schedule` costs a microsecond, whatever the schedule."""

    def __contains__(self, step: int) -> bool:
        raise NotImplementedError

    def below(self, length: int | None) -> Sequence[int] | None:
        """Returns the steps due in a run of `length` steps, rising; None where there is no end to them."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Every(Schedule):
    """Steps 0, `steps`, 2 `steps`, ..."""

    steps: int

    def __contains__(self, step: int) -> bool:
        return step % self.steps == 0

    def below(self, length: int | None) -> Sequence[int] | None:
        return None if length is None else range(0, length, self.steps)

    def __str__(self) -> str:
        return f"every {self.steps}"


@dataclass(frozen=True, kw_only=True)
class Logarithmic(Schedule):
    """Steps 0 and 10^(i / per_decade) rounded: with four per decade 0, 1, 2, 3, 6, 10, 18, 32, 56, 100, ..."""

    per_decade: int = PER_DECADE

    def __contains__(self, step: int) -> bool:
        # Near `step`, neighbouring powers lie at most one index away from the rounded logarithm.
        nearest = round(self.per_decade * math.log10(step)) if step > 0 else 0
        return step == 0 or any(step == self._at(i) for i in (nearest - 1, nearest, nearest + 1))

    def below(self, length: int | None) -> Sequence[int] | None:
        if length is None:
            return None
        last = math.ceil(self.per_decade * math.log10(max(length, 1))) + 1
        return sorted({step for step in (0, *map(self._at, range(last + 1))) if step < length})

    def _at(self, i: int) -> int:
        return round(10 ** (i / self.per_decade)) if i >= 0 else 0

    def __str__(self) -> str:
        return f"{LOGARITHMIC}:{self.per_decade}"


@dataclass(frozen=True, kw_only=True)
class At(Schedule):
    """The steps named, and no others."""

    steps: frozenset[int]

    def __contains__(self, step: int) -> bool:
        return step in self.steps

    def below(self, length: int | None) -> Sequence[int] | None:
        return sorted(step for step in self.steps if length is None or step < length)

    def __str__(self) -> str:
        return f"steps {', '.join(map(str, sorted(self.steps)))}"


def schedule_of(given: int | str | Iterable[int] | Schedule) -> Schedule:
    """Returns the schedule that a number N (every N), "log", "log:N" or a collection of steps stands for.

    Raises:
        UserError: anything else, a number below 1, no steps at all.
    """
    if isinstance(given, Schedule):
        return given
    if isinstance(given, str):
        word, colon, count = given.partition(":")
        if word != LOGARITHMIC or (colon and not (count.isdecimal() and int(count) > 0)):
            raise UserError(f"every={given!r}: {_WANTED}")
        return Logarithmic(per_decade=int(count) if colon else PER_DECADE)
    if isinstance(given, Iterable):
        steps = frozenset(_whole(step, 0) for step in given)
        if not steps:
            raise UserError(f"every=[]: no step is due; {_WANTED}")
        return At(steps=steps)
    return Every(steps=_whole(given, 1))


def _whole(given: object, least: int) -> int:
    """Returns a whole number of steps; numpy's integers are whole numbers too, booleans are not."""
    try:
        number = index(given)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if isinstance(given, bool) or number < least:
        raise UserError(f"every={given!r}: {_WANTED}, counted from {least}")
    return number
