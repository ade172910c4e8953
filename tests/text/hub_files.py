"""A corpus of the Hub without the Hub: files of rows, their documents, a tokenizer of words."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hessprobe.text.hub_corpus import HubCorpus
from hessprobe.text.tokenizer import Tokenizer

CONTEXT = 6
END = 0


class Files:
    """What `datasets` gives for a streamed split: files of rows, one after the other."""

    def __init__(self, files: list[list[str]], column: str = "text") -> None:
        self.files, self.column = files, column

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def shard(self, num_shards: int, index: int) -> Files:
        assert num_shards == len(self.files)
        return Files([self.files[index]], self.column)

    def skip(self, n: int) -> Files:
        (rows,) = self.files
        return Files([rows[n:]], self.column)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({self.column: row} for rows in self.files for row in rows)


class Words(Tokenizer):
    """Token = the number a word is; counts the documents it is given."""

    def encode(self, texts):
        self.seen.extend(texts)
        return [np.array([*map(int, text.split()), END], dtype=np.uint16) for text in texts]


def words() -> Words:
    made = Words(name="words", size=60_000, end=END, sha256="0", rules=None)
    object.__setattr__(made, "seen", [])
    return made


def documents(files: int, each: int, first: int = 1) -> list[list[str]]:
    """Returns documents of 1 to 9 words, all words of one document being its own number."""
    number, found = first, []
    for _ in range(files):
        rows = []
        for _ in range(each):
            rows.append(" ".join([str(number)] * (number * 7 % 9 + 1)))
            number += 1
        found.append(rows)
    return found


def corpus(files: int = 9, each: int = 12, **changes) -> HubCorpus:
    splits = {
        "train": Files(documents(files, each)),
        "validation": Files(documents(1, 20, first=5000)),
        **changes,
    }
    return HubCorpus(
        splits=splits,
        tokenizer=words(),
        context=CONTEXT,
        vocabulary=60_000,
        fingerprint={"source": "hub:a/b"},
    )
