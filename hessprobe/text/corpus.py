"""Which tokens a step sees: a pure function of (stream, seed, step), so a resumed run sees the same data.

Part of the corpus is held out and never trained on. Opening one needs no torch, so that mistakes about data
are told before anything slow is imported.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hessprobe.errors import UserError
from hessprobe.machine.seeds import key_of
from hessprobe.text.sources import Parts, read_parts

if TYPE_CHECKING:
    from torch import Tensor

READ_WHOLE = 2**28  # bytes; of a larger part, hash and entropy read SAMPLED_BLOCKS blocks only
SAMPLED_BLOCKS = 64
BLOCK = 2**20  # tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """A training part and a held-out part of one token sequence, cut into windows of `context` tokens.

    Attributes:
        train, held_out: tokens, uint8, uint16 or uint32; a window never crosses from one to the other.
        context: tokens in a sequence; targets are the inputs moved by one, so a window reads context + 1.
        vocabulary: tokens are 0 .. vocabulary - 1; checked in every batch.
        fingerprint: JSON-able origin: source, kind, sha256 (of the training, then the held-out bytes; for a
            single file read as bytes what `sha256sum FILE` prints), hashed (which bytes were: of parts above 256 MiB a
            sample), bytes, tokens, held_out_tokens, held_out (which tokens), vocabulary, python; files and
            skipped_files where there are several; tokenizer and its tokenizer_sha256 where there is one.
    """

    train: np.ndarray
    held_out: np.ndarray
    context: int
    vocabulary: int
    fingerprint: Mapping[str, Any]

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        context: int,
        held_out_fraction: float = 0.05,
        vocabulary: int | None = None,
        tokenizer: str | None = None,
        end_of_text: str | None = None,
    ) -> Corpus:
        """Returns the corpus at `source`, its held-out part fixed.

        Args:
            source: "stdlib"; a text file; a folder, of which every visible file that is UTF-8 text is read in
                the order of the paths; a .bin file of uint16 tokens; a folder with train.bin and val.bin.
            context: tokens in a sequence.
            held_out_fraction: of the corpus. Its tail is held out; val.bin instead where there is one; of
                "stdlib" whole files spread over the library, since the tail of its alphabet is mostly xml.
            vocabulary: number of token ids. Default: 256 for text, or the tokenizer's own; the largest id + 1 for
                shards up to 256 MiB; required for larger ones.
            tokenizer, end_of_text: what makes tokens of text, see `load_tokenizer`. None reads bytes.

        Raises:
            UserError: nothing there, not readable, empty, not the format, or a part shorter than a sequence.
        """
        if context < 1:
            raise UserError(f"context must be at least 1 token, got {context}")
        if vocabulary is not None and vocabulary < 1:
            raise UserError(f"vocabulary must be at least 1 token, got {vocabulary}. Text needs 256")
        if not 0 < held_out_fraction < 1:
            raise UserError(f"held_out_fraction must be above 0 and below 1, got {held_out_fraction}")
        try:
            parts = read_parts(source, held_out_fraction)
        except OSError as error:
            raise UserError(
                f"cannot read {error.filename or source}: {error.strerror or error}. "
                'Check its permissions, or use another corpus ("stdlib" is always there).'
            ) from error
        if tokenizer is not None:
            from hessprobe.text.tokenizer import load_tokenizer, tokenized

            rules = load_tokenizer(tokenizer, end_of_text=end_of_text, text=parts.train)
            parts, vocabulary = tokenized(parts, rules), vocabulary or rules.size
        for name, tokens in (("training", parts.train), ("held-out", parts.held_out)):
            if tokens.size <= context:
                raise UserError(
                    f"the {name} part of corpus {str(source)!r} holds {tokens.size:,} tokens; one sequence "
                    f"needs {context + 1:,} (context {context:,} and the last target). "
                    "Use a longer corpus, a shorter context or another held_out_fraction."
                )
        if vocabulary is None:
            vocabulary = _infer_vocabulary(source, parts)
        elif parts.train.nbytes <= READ_WHOLE:  # larger ones are checked batch by batch
            largest = max(int(parts.train.max()), int(parts.held_out.max()))
            if largest >= vocabulary:
                raise _outside(str(source), largest, vocabulary)
        digest, hashed = _digest(parts)
        fingerprint = {
            "source": str(source),
            **parts.origin,
            "sha256": digest,
            "hashed": hashed,
            "bytes": int(parts.train.nbytes + parts.held_out.nbytes),
            "tokens": int(parts.train.size + parts.held_out.size),
            "held_out_tokens": int(parts.held_out.size),
            "vocabulary": int(vocabulary),
            "python": platform.python_version(),
        }
        return cls(
            train=parts.train,
            held_out=parts.held_out,
            context=context,
            vocabulary=int(vocabulary),
            fingerprint=fingerprint,
        )

    @property
    def train_tokens(self) -> int:
        """The number of tokens in the training part."""
        return int(self.train.size)

    @property
    def held_out_tokens(self) -> int:
        """The number of tokens in the held-out part."""
        return int(self.held_out.size)

    def batch(self, *, seed: int, step: int, sequences: int, stream: str = "train") -> tuple[Tensor, Tensor]:
        """Returns (inputs, targets), long (b, t) each: windows at random places of the training part.

        A pure function of its arguments and the corpus, the same on every machine and numpy: Philox keyed by
        (stream, seed, step). Different streams, seeds or steps are independent draws; fewer sequences are the
        first of more.

        Raises:
            UserError: a token outside the vocabulary; fewer than one sequence.
        """
        if sequences < 1:
            raise UserError(f"a batch needs at least 1 sequence, got {sequences}")
        # random_raw, not Generator.integers, whose stream numpy may change between versions. The bias of the
        # remainder is below (training tokens) / 2^64.
        raw = np.random.Philox(key=key_of(stream, seed, step, size=16)).random_raw(sequences)
        starts = raw % np.uint64(self.train.size - self.context)
        return self._windows(self.train, starts.astype(np.int64))

    def held_out_batches(self, sequences: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Returns up to `count` batches of up to `sequences` windows, spread evenly over the held-out part.

        Always the same windows, no two overlapping in their inputs. Where the held-out part holds fewer than
        sequences x count of them, all there are: the last batch may be smaller, so weight by tokens.
        """
        if sequences < 1 or count < 1:
            raise UserError(f"held-out batches: at least 1 sequence and 1 batch, got {sequences} and {count}")
        available = (self.held_out.size - 1) // self.context
        wanted = min(sequences * count, available)
        starts = np.arange(wanted, dtype=np.int64) * available // wanted * self.context
        return [self._windows(self.held_out, starts[i : i + sequences]) for i in range(0, wanted, sequences)]

    def entropy(self) -> float:
        """Returns the entropy of the training part's token frequencies, in nats per token.

        The loss of the best model that knows frequencies alone. Exact up to 256 MiB; of a larger part from 64
        evenly spaced blocks of 2^20 tokens.
        """
        counts = np.zeros(max(2**16, self.vocabulary), dtype=np.int64)
        for block in _blocks(self.train):
            counts += np.bincount(block, minlength=counts.size)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def bookmarks(self) -> dict[str, list[int]]:
        """Returns nothing: a batch depends on no place that was reached (see HubCorpus for one that does)."""
        return {}

    def restore(self, bookmarks: Mapping[str, Sequence[int]]) -> None:
        """Does nothing, see `bookmarks`."""

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = tokens[starts[:, None] + np.arange(self.context + 1)]
        return as_batch(windows, self.vocabulary, str(self.fingerprint["source"]))


def as_batch(windows: np.ndarray, vocabulary: int, source: str) -> tuple[Tensor, Tensor]:
    """Returns (inputs, targets), long (b, t) each, of windows (b, t + 1).

    Raises:
        UserError: a token outside the vocabulary.
    """
    import torch

    windows = windows.astype(np.int64)
    largest = int(windows.max())
    if largest >= vocabulary:
        raise _outside(source, largest, vocabulary)
    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _outside(source: str, token: int, vocabulary: int) -> UserError:
    return UserError(
        f"corpus {source!r} holds token {token:,}, outside the vocabulary of {vocabulary:,} (0 .. {vocabulary - 1:,}). "
        f"Give vocabulary={token + 1} or more: the size of the tokenizer it was made with."
    )


def _blocks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the tokens in blocks: all of them, or of a large part SAMPLED_BLOCKS, its first and last too."""
    if tokens.nbytes <= READ_WHOLE:
        starts = range(0, tokens.size, BLOCK)
    else:
        starts = [i * (tokens.size - BLOCK) // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)]
    yield from (tokens[start : start + BLOCK] for start in starts)


def _digest(parts: Parts) -> tuple[str, str]:
    digest, hashed = hashlib.sha256(), "all bytes"
    for tokens in (parts.train, parts.held_out):
        if tokens.nbytes > READ_WHOLE:
            digest.update(f"{tokens.nbytes}:".encode())
            hashed = f"of a part above {READ_WHOLE:,} bytes its size and {SAMPLED_BLOCKS} x {BLOCK:,} tokens"
        for block in _blocks(tokens):
            digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest(), hashed


def _infer_vocabulary(source: str | Path, parts: Parts) -> int:
    if parts.origin["kind"] == "text":
        return 256
    if max(parts.train.nbytes, parts.held_out.nbytes) > READ_WHOLE:
        raise UserError(
            f"token shards do not record their vocabulary, and {str(source)!r} is too large to search. "
            "Give vocabulary=N, the size of its tokenizer (GPT-2: 50257)."
        )
    return 1 + max(int(block.max()) for tokens in (parts.train, parts.held_out) for block in _blocks(tokens))
