"""Where measurements without a training step stand on the step axis: whole numbers as they are, other labels counted."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index

ATTRIBUTE = "labels"  # of the log's root: JSON, step -> label


class Labels:
    """The steps that labels stand for.

    Args:
        known: what the log's attribute says already.
        last: the highest step in use.
    """

    def __init__(self, known: Mapping[str, str], last: int) -> None:
        self._steps = {label: int(step) for step, label in known.items()}
        self._last = max([last, *self._steps.values()])

    def step_of(self, label: object) -> int:
        """Returns a label's step: a whole number from 0 on is its own, any other takes the next free one, once."""
        number = _number(label)
        if number is None:
            number = self._steps.setdefault(str(label), self._last + 1)
        self.used(number)
        return number

    def used(self, step: int) -> None:
        """Keeps a step from being given to a label."""
        self._last = max(self._last, step)

    def knows(self, label: object) -> bool:
        """Tells whether the label needs no place of its own, or has it."""
        return _number(label) is not None or str(label) in self._steps

    @property
    def by_step(self) -> dict[str, str]:
        """The attribute's value: labels by step."""
        return {str(step): label for label, step in self._steps.items()}


def _number(label: object) -> int | None:
    if isinstance(label, (bool, str)):
        return None
    try:
        number = index(label)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number if number >= 0 else None
