"""Batches for classifiers: texts with a label each, from lines of JSON or a data set of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessprobe.errors import UserError, first_line
from hessprobe.machine.seeds import key_of
from hessprobe.text.hub_corpus import HUB, HubCorpus
from hessprobe.text.tokenizer import load_tokenizer

TEXT, LABEL = "text", "label"
FROM_HUB = 4096  # texts of a stream that are kept
SHUFFLED = 10_000  # rows of a stream shuffled together: many data sets are sorted by their label
_WANTED = f'lines of JSON with "{TEXT}" and a whole number "{LABEL}" (FILE.jsonl), or hub:OWNER/NAME with such columns'


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledTexts:
    """Texts and their labels, read as padded batches.

    Attributes:
        fingerprint: JSON-able origin, as of a Corpus.
    """

    texts: Sequence[str]
    labels: np.ndarray
    rules: Any
    fingerprint: Mapping[str, Any]

    @classmethod
    def open(
        cls, source: str, *, tokenizer: str, context: int, classes: int, pad: int | None
    ) -> LabelledTexts:
        """Returns the texts at a source, cut to `context` tokens.

        Args:
            classes: labels are 0 .. classes - 1.
            pad: the model's padding token.

        Raises:
            UserError: not such a source, a label that is none, no padding token.
        """
        if pad is None:
            raise UserError(
                "the model's config.json names no pad_token_id, so texts of several lengths make no batch"
            )
        rules = load_tokenizer(tokenizer)
        rows = _of_hub(source, tokenizer, context) if source.startswith(HUB) else _of_file(source)
        texts, labels = [], []
        for number, row in enumerate(rows):
            text, label = row.get(TEXT), row.get(LABEL)
            if not isinstance(text, str) or isinstance(label, bool) or not isinstance(label, int):
                raise UserError(f"{source!r}, row {number}, has {', '.join(map(str, row))}: wanted {_WANTED}")
            if not 0 <= label < classes:
                raise UserError(
                    f"{source!r}, row {number}, has label {label}; the model knows {classes} labels, 0 .. {classes - 1}"
                )
            texts.append(text)
            labels.append(label)
        if not texts:
            raise UserError(f"{source!r} holds no text; wanted {_WANTED}")
        rules.rules.enable_truncation(max_length=context)
        rules.rules.enable_padding(pad_id=pad, direction="right")
        digest = hashlib.sha256(json.dumps([texts, labels]).encode()).hexdigest()
        return cls(
            texts=texts,
            labels=np.array(labels),
            rules=rules.rules,
            fingerprint={
                "source": source,
                "kind": "labelled texts",
                "sha256": digest,
                "hashed": "texts and labels",
                "texts": len(texts),
                **rules.origin,
            },
        )

    def batch(self, *, seed: int, step: int, sequences: int, stream: str = "train") -> dict[str, Tensor]:
        """Returns input_ids and attention_mask, long (b, t), and labels (b,): a pure function of its arguments.

        Raises:
            UserError: more sequences than there are texts.
        """
        if sequences > len(self.texts):
            raise UserError(
                f"{self.fingerprint['source']!r} holds {len(self.texts):,} texts, and a row reads {sequences:,}: give "
                f"more texts, or --sequences {len(self.texts)} or fewer"
            )
        # The order of raw draws, not Generator.permutation, whose stream numpy may change between versions.
        raw = np.random.Philox(key=key_of(stream, seed, step, size=16)).random_raw(len(self.texts))
        chosen = np.argsort(raw, kind="stable")[:sequences]
        encoded = self.rules.encode_batch([self.texts[i] for i in chosen])
        return {
            "input_ids": torch.tensor([text.ids for text in encoded]),
            "attention_mask": torch.tensor([text.attention_mask for text in encoded]),
            "labels": torch.from_numpy(self.labels[chosen]),
        }


def _of_file(source: str) -> Iterator[Mapping[str, Any]]:
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise UserError(f"no labelled texts at {source!r}: a classifier is measured on {_WANTED}")
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                yield row if isinstance(row, dict) else {}
    except (ValueError, OSError) as error:  # not UTF-8, not JSON, not readable
        raise UserError(f"cannot read {source}: {error}; wanted {_WANTED}") from error


def _of_hub(source: str, tokenizer: str, context: int) -> Iterator[Mapping[str, Any]]:
    split = HubCorpus.open(source, context=context, tokenizer=tokenizer).splits["train"]
    try:
        yield from islice(split.shuffle(seed=0, buffer_size=SHUFFLED), FROM_HUB)
    except Exception as error:  # a connection that broke, a file that is none
        raise UserError(
            f"reading {source!r} broke off ({first_line(error)}); try again, or give a file"
        ) from error
