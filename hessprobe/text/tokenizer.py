"""Text to token numbers: a tokenizer.json, one from the Hugging Face Hub, or byte pairs learned from the text itself.

The library `tokenizers` does the work and is imported when one is asked for; bytes need none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hessprobe.errors import UserError, first_line
from hessprobe.text.hub import offline, require_hub
from hessprobe.text.sources import SEPARATOR, Parts

LEARNED = "bpe:"
SMALLEST = 257  # every byte, and the end of a text
END = "<|endoftext|>"
_ENDS = ("</s>", END, "<|end_of_text|>", "<eos>", "[SEP]")
# A long text is encoded in pieces of about this many characters, cut after a line's end: some tokenizers take
# time that grows faster than their text.
PIECE = 2**16


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer as a corpus needs it.

    Attributes:
        name: as it was asked for.
        size: tokens are 0 .. size - 1.
        end: the token put after every document.
        sha256: of its tokenizer.json, so that two runs can be told to have read the same tokens.
    """

    name: str
    size: int
    end: int
    sha256: str
    rules: Any

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest type that holds its tokens."""
        return np.uint16 if self.size <= 2**16 else np.uint32

    @property
    def origin(self) -> dict[str, str]:
        """What a fingerprint says of it."""
        return {"tokenizer": self.name, "tokenizer_sha256": self.sha256}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns each text's tokens with the end after them, 1-D."""
        pieces = [list(_pieces(text)) for text in texts]
        encoded = iter(
            self.rules.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False)
        )
        found = []
        for text in pieces:
            numbers = [number for _ in text for number in next(encoded).ids]
            found.append(np.array([*numbers, self.end], dtype=self.dtype))
        return found


def load_tokenizer(name: str, *, end_of_text: str | None = None, text: np.ndarray | None = None) -> Tokenizer:
    """Returns the tokenizer of that name.

    Args:
        name: a tokenizer.json; "bpe:4096" for byte pairs learned from `text`; else a name on the Hub.
        end_of_text: the token that ends a document. None looks for the usual ones.
        text: the bytes to learn from, a NUL between documents; None where a source streams.

    Raises:
        UserError: no such tokenizer, not to be had offline, a library missing, or no token that ends a text.
    """
    tokenizers = require_hub("tokenizers", f"data.tokenizer = {name!r}")
    if name.startswith(LEARNED):
        rules = _learned(tokenizers, name, text)
    elif name.endswith(".json") or Path(os.path.expanduser(name)).exists():
        rules = _from_file(tokenizers, Path(os.path.expanduser(name)))
    else:
        rules = _from_hub(tokenizers, name)
    wanted = _ENDS if end_of_text is None else (end_of_text,)
    ends = [number for token in wanted if (number := rules.token_to_id(token)) is not None]
    if not ends:
        raise UserError(
            f"tokenizer {name!r} has no token {' or '.join(wanted)} to put between documents; "
            "name one of its own with data.end_of_text"
        )
    return Tokenizer(
        name=name,
        size=rules.get_vocab_size(with_added_tokens=True),
        end=ends[0],
        sha256=hashlib.sha256(rules.to_str().encode()).hexdigest(),
        rules=rules,
    )


def tokenized(parts: Parts, tokenizer: Tokenizer) -> Parts:
    """Returns the tokens of a text's parts, each document closed by the end token.

    Raises:
        UserError: the parts are tokens already.
    """
    if parts.origin["kind"] != "text":
        raise UserError(
            f"data.tokenizer = {tokenizer.name!r}: the source holds tokens already; leave the tokenizer out, "
            "or give a text"
        )
    train, held_out = (
        np.concatenate(tokenizer.encode(_documents(part))) for part in (parts.train, parts.held_out)
    )
    return Parts(train, held_out, {**parts.origin, "kind": "tokenized text", **tokenizer.origin})


def _documents(text: np.ndarray) -> list[str]:
    # The cut between the two parts may go through a character: its halves are dropped.
    return [document.decode(errors="ignore") for document in text.tobytes().split(SEPARATOR)]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _learned(tokenizers: Any, name: str, text: np.ndarray | None) -> Any:
    size = name.removeprefix(LEARNED)
    if not size.isdigit() or int(size) < SMALLEST:
        raise UserError(
            f"data.tokenizer = {name!r}: wanted {LEARNED}N with N of at least {SMALLEST}, as bpe:4096"
        )
    if text is None:
        raise UserError(
            f"data.tokenizer = {name!r} learns from a local text; a stream needs a tokenizer.json or a name on the Hub"
        )
    rules = tokenizers.Tokenizer(tokenizers.models.BPE())
    rules.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=int(size),
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rules.train_from_iterator((p for document in _documents(text) for p in _pieces(document)), trainer)
    return rules


def _from_file(tokenizers: Any, path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"no tokenizer at {path}; give a tokenizer.json, a name on the Hub (t5-base), or bpe:4096"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer.json: {first_line(error)}") from error


def _from_hub(tokenizers: Any, name: str) -> Any:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    what = f"tokenizer {name!r} from the Hugging Face Hub"
    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError as error:
        raise UserError(
            f"{name!r} names no tokenizer: give a tokenizer.json, a name on the Hub (t5-base), or bpe:4096"
        ) from error
    if isinstance(cached, str):
        return _from_file(tokenizers, Path(cached))
    if reason := offline():
        raise _unreachable(what, reason)
    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:
        raise _unreachable(what, first_line(error)) from error


def _unreachable(what: str, reason: str) -> UserError:
    return UserError(
        f"cannot get {what} ({reason}). It needs a network and pip install 'hessprobe[hf]'. Offline: "
        "--set data.tokenizer=PATH/tokenizer.json, or bpe:4096 for byte pairs learned from a local text"
    )
