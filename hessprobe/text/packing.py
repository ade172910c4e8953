"""Documents packed into windows of a fixed length, from any place on: what a stream without an end is read by.

A bookmark is where in the documents a window begins. It follows from the documents alone, so losing one costs time
and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from hessprobe.text.tokenizer import Tokenizer

TOKENIZED_TOGETHER = 64  # documents


class Bookmark(NamedTuple):
    """Where window `window` begins: token `offset` of document `document` of the `file`-th file, counted on and on."""

    window: int = 0
    file: int = 0
    document: int = 0
    offset: int = 0


@dataclass(kw_only=True, eq=False)
class Packed:
    """The windows of one stream in order; going back or jumping ahead works and costs reading.

    Args:
        documents: (file, document) -> the documents from there on, each with its place.
        context: tokens in a window; it reads one more for its last target.
        start: a known place to begin from.
    """

    documents: Callable[[int, int], Iterator[tuple[int, int, str]]]
    tokenizer: Tokenizer
    context: int
    start: Bookmark = Bookmark()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        self._go_to(self.start)

    @property
    def bookmark(self) -> Bookmark:
        """Where the next window begins."""
        file, document = self._held[0][:2] if self._held else self._place
        return Bookmark(self._window, file, document, self._offset)

    def read(self, first: int, count: int) -> np.ndarray:
        """Returns windows first .. first + count - 1, (count, context + 1); fewer where the documents end."""
        if first < self._window:
            self._go_to(self.start if self.start.window <= first else Bookmark())
        while self._window < first:
            if not len(self._take(min(first - self._window, 64))):
                break
        return self._take(count)

    def _go_to(self, place: Bookmark) -> None:
        self._window, self._place, self._offset = place.window, (place.file, place.document), place.offset
        self._source = self.documents(place.file, place.document)
        self._held: list[tuple[int, int, np.ndarray]] = []

    def _take(self, count: int) -> np.ndarray:
        while sum(len(tokens) for *_, tokens in self._held) - self._offset <= count * self.context:
            found = list(islice(self._source, TOKENIZED_TOGETHER))
            if not found:
                break
            encoded = self.tokenizer.encode([text for *_, text in found])
            self._held += [(file, number, ids) for (file, number, _), ids in zip(found, encoded, strict=True)]
        tokens = np.concatenate([ids for *_, ids in self._held] or [np.empty(0, dtype=self.tokenizer.dtype)])
        tokens = tokens[self._offset :]
        count = min(count, max(0, (tokens.size - 1) // self.context))
        places = np.arange(count)[:, None] * self.context + np.arange(self.context + 1)
        windows = tokens[places] if count else np.empty((0, self.context + 1), dtype=tokens.dtype)
        self._window += count
        self._offset += count * self.context
        while self._held and self._offset >= len(self._held[0][2]):
            self._offset -= len(self._held.pop(0)[2])
        return windows
