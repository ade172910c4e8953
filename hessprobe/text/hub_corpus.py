"""Which tokens a step sees of a data set streamed from the Hugging Face Hub, without an end and without a copy.

Documents are tokenized and packed, an end token after each, into windows of `context` tokens: window n of a stream
is a pure function of (data set, tokenizer, stream, seed), and a batch of (..., step). Files are taken in an order
drawn from the seed, documents within a file as they come (C4 is shuffled). Bookmarks make a resumed run fast: it
skips documents without tokenizing them; they change no token.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessprobe.errors import RunFailed, UserError, first_line
from hessprobe.text.corpus import as_batch
from hessprobe.text.hub import OFFLINE_SOURCES, offline, require_hub
from hessprobe.text.packing import Bookmark, Packed
from hessprobe.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

HUB = "hub:"
HELD_OUT = "validation"
TEXT = "text"
FINGERPRINTED = 64  # held-out documents
# Streams share no document: each takes its lanes of the files, or of the documents where there are few files.
LANES = 8
_LANES = {"train": range(4), "line_search": range(4, 7)}
_OTHER = range(7, 8)


@dataclass(kw_only=True, eq=False)
class HubCorpus:
    """A streamed data set with the interface of Corpus.

    Attributes:
        context, vocabulary, fingerprint: as of a Corpus; sha256 is of the first held-out documents.
    """

    splits: Mapping[str, Any]
    tokenizer: Tokenizer
    context: int
    vocabulary: int
    fingerprint: Mapping[str, Any]
    _streams: dict[tuple[str, int], Packed] = field(default_factory=dict)
    _start: dict[tuple[str, int], Bookmark] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        source: str,
        *,
        context: int,
        vocabulary: int | None = None,
        tokenizer: str | None = None,
        end_of_text: str | None = None,
    ) -> HubCorpus:
        """Returns the data set of "hub:OWNER/NAME/CONFIG"; "hub:./FOLDER" reads files with splits there instead.

        Raises:
            UserError: no such data set, configuration or split, no network, a library missing, no tokenizer.
        """
        if tokenizer is None:
            raise UserError(
                f"data.source = {source!r} needs a data.tokenizer, such as t5-base or a tokenizer.json"
            )
        datasets = require_hub("datasets", f"data.source = {source!r}")
        rules = load_tokenizer(tokenizer, end_of_text=end_of_text)
        path, config = _dataset_of(source)
        splits = {split: _opened(datasets, source, path, config, split) for split in ("train", HELD_OUT)}
        digest = hashlib.sha256(rules.sha256.encode())
        for text in islice(_rows(splits[HELD_OUT], source, HELD_OUT), FINGERPRINTED):
            digest.update(text.encode())
        fingerprint = {
            "source": source,
            "kind": "hub stream",
            "sha256": digest.hexdigest(),
            "hashed": f"the tokenizer and the first {FINGERPRINTED} documents of split {HELD_OUT}",
            "files": splits["train"].num_shards,
            "held_out": f"split {HELD_OUT}",
            **rules.origin,
            "vocabulary": vocabulary or rules.size,
            "python": platform.python_version(),
        }
        return cls(
            splits=splits,
            tokenizer=rules,
            context=context,
            vocabulary=vocabulary or rules.size,
            fingerprint=fingerprint,
        )

    def batch(self, *, seed: int, step: int, sequences: int, stream: str = "train") -> tuple[Tensor, Tensor]:
        """Returns (inputs, targets), long (b, t) each: windows step * sequences and on of the stream.

        A pure function of its arguments as long as a stream is always asked for as many sequences.

        Raises:
            UserError: a token outside the vocabulary; fewer than one sequence.
            RunFailed: the stream broke off.
        """
        if sequences < 1:
            raise UserError(f"a batch needs at least 1 sequence, got {sequences}")
        key = (stream, seed)
        if key not in self._streams:
            documents = _Documents(self, seed, _LANES.get(stream, _OTHER))
            start = self._start.get(key, Bookmark())
            self._streams[key] = Packed(
                documents=documents, tokenizer=self.tokenizer, context=self.context, start=start
            )
        windows = self._streams[key].read(step * sequences, sequences)
        return as_batch(windows, self.vocabulary, str(self.fingerprint["source"]))

    def held_out_batches(self, sequences: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Returns up to `count` batches of up to `sequences` windows: the first of the split "validation"."""
        if sequences < 1 or count < 1:
            raise UserError(f"held-out batches: at least 1 sequence and 1 batch, got {sequences} and {count}")
        source = str(self.fingerprint["source"])

        def documents(file: int, document: int) -> Iterator[tuple[int, int, str]]:
            rows = islice(_rows(self.splits[HELD_OUT], source, HELD_OUT), document, None)
            return ((0, number, text) for number, text in enumerate(rows, start=document))

        packed = Packed(documents=documents, tokenizer=self.tokenizer, context=self.context)
        windows = packed.read(0, sequences * count)
        if not len(windows):
            raise UserError(
                f"split {HELD_OUT} of {source!r} holds less than one sequence of {self.context:,} tokens; "
                "use a shorter context"
            )
        parts = (windows[i : i + sequences] for i in range(0, len(windows), sequences))
        return [as_batch(part, self.vocabulary, source) for part in parts]

    def bookmarks(self) -> dict[str, list[int]]:
        """Returns where each stream stands, for a checkpoint."""
        return {f"{stream}@{seed}": list(packed.bookmark) for (stream, seed), packed in self._streams.items()}

    def restore(self, bookmarks: Mapping[str, Sequence[int]]) -> None:
        """Takes up bookmarks: what lies before them is skipped, not tokenized again."""
        for key, place in bookmarks.items():
            stream, _, seed = key.rpartition("@")
            self._start[stream, int(seed)] = Bookmark(*place)
            self._streams.pop((stream, int(seed)), None)


@dataclass(frozen=True)
class _Documents:
    """The documents of a stream from a place on, over and over: a data set read to its end begins again."""

    corpus: HubCorpus
    seed: int
    lanes: range

    def __call__(self, file: int, document: int) -> Iterator[tuple[int, int, str]]:
        data, source = self.corpus.splits["train"], str(self.corpus.fingerprint["source"])
        files = data.num_shards
        order = sorted(range(files), key=lambda i: hashlib.sha256(f"{self.seed:d}/{i:d}".encode()).digest())
        by_file, nothing_since = files >= LANES, 0
        for position in counting(file):
            skipped, document = document, 0
            if by_file and position % files % LANES not in self.lanes:
                continue
            rows = data.shard(num_shards=files, index=order[position % files])
            rows = rows.skip(skipped) if skipped else rows
            nothing_since += 1
            for number, text in enumerate(_rows(rows, source, "train"), start=skipped):
                if by_file or number % LANES in self.lanes:
                    nothing_since = 0
                    yield position, number, text
            if nothing_since > files:
                raise UserError(
                    f"{source!r} has too few documents to give training, line search and probes their own; "
                    "use a larger data set"
                )


def _dataset_of(source: str) -> tuple[str, str | None]:
    """Returns path and configuration: hub:allenai/c4/en is configuration en of allenai/c4."""
    name = source.removeprefix(HUB)
    if name.startswith((".", "/", "~")):
        return str(Path(os.path.expanduser(name))), None
    owner, _, rest = name.partition("/")
    dataset, _, config = rest.partition("/")
    if not owner or not dataset:
        raise UserError(
            f"data.source = {source!r}: wanted {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG, as hub:allenai/c4/en"
        )
    return f"{owner}/{dataset}", config or None


def _opened(datasets: Any, source: str, path: str, config: str | None, split: str) -> Any:
    reason = "" if Path(path).is_dir() else offline()
    if not reason:
        try:
            return datasets.load_dataset(path, name=config, split=split, streaming=True)
        except Exception as error:  # a dozen types, from a wrong configuration to a lost connection
            reason = first_line(error)
            cause = error
    else:
        cause = None
    raise UserError(
        f"cannot stream {source!r} ({f'configuration {config}, ' if config else ''}split {split}): {reason}. It needs "
        f"a network and pip install 'hessprobe[hf]'. Offline: --set data.source={OFFLINE_SOURCES.replace(', ', ' | ')}"
    ) from cause


def _rows(rows: Any, source: str, split: str) -> Iterator[str]:
    try:
        for row in rows:
            if TEXT not in row:
                raise UserError(
                    f"{source!r} has no column {TEXT!r} in split {split}; it has: {', '.join(row)}. "
                    "Use a data set of plain texts"
                )
            yield row[TEXT]
    except UserError:
        raise
    except Exception as error:
        raise RunFailed(
            f"reading split {split} of {source!r} broke off ({first_line(error)}); go on with --resume"
        ) from error
