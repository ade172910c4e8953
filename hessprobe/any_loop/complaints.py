"""What a recorder says of what goes wrong, to the logger "hessprobe": once, and never by raising."""

from __future__ import annotations

import logging

LOGGER = logging.getLogger("hessprobe")


class Complaints:
    """What has been said already is not said again."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._said: set[str] = set()

    def failed(self, step: int, what: str, reason: str) -> None:
        """Logs a failure, once as long as its reason stays the same."""
        if self._reasons.get(what) != reason:
            self._reasons[what] = reason
            LOGGER.warning("step %d: %s failed: %s (training goes on)", step, what, reason)

    def once(self, text: str, kind: str = "") -> None:
        """Logs a sentence, once a kind; of no kind, once in these words."""
        if (kind or text) not in self._said:
            self._said.add(kind or text)
            LOGGER.warning("%s", text)
