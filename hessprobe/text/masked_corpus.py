"""Batches for masked language models: a corpus's windows with 15 % of their tokens hidden (Devlin et al. 2019).

Of the hidden places 80 % hold the mask, 10 % a random token, 10 % what was there; only they carry a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.machine.seeds import generator_of
from hessprobe.text.corpus import Corpus
from hessprobe.text.hub_corpus import HubCorpus
from hessprobe.text.tokenizer import load_tokenizer

HIDDEN, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1
_MASKS = ("[MASK]", "<mask>")
_FIRST, _LAST = ("[CLS]", "<s>"), ("[SEP]", "</s>")
NO_TARGET = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskedCorpus:
    """A corpus whose batches are mappings with "labels", some tokens hidden.

    Attributes:
        mask: the token put in place of hidden ones.
        first, last: tokens that every window begins and ends with, or None.
        size: random tokens are 0 .. size - 1.
    """

    corpus: Corpus | HubCorpus
    mask: int
    first: int | None
    last: int | None
    size: int

    @classmethod
    def of(cls, corpus: Corpus | HubCorpus, tokenizer: str | None) -> MaskedCorpus:
        """Returns the corpus masked as its tokenizer has it.

        Raises:
            UserError: a tokenizer without a mask, or none.
        """
        if tokenizer is None:
            raise UserError(
                "a masked language model needs to know which token is its mask: give a text and a data.tokenizer"
            )
        rules = load_tokenizer(tokenizer).rules
        mask, first, last = (_first_of(rules, names) for names in (_MASKS, _FIRST, _LAST))
        if mask is None:
            raise UserError(
                f"tokenizer {tokenizer!r} has no token {' or '.join(_MASKS)}, which a masked language model is asked by; "
                "give the model's own with --set data.tokenizer="
            )
        return cls(corpus=corpus, mask=mask, first=first, last=last, size=rules.get_vocab_size())

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """The corpus's, and how much is hidden."""
        return {**self.corpus.fingerprint, "hidden": HIDDEN}

    def batch(self, *, seed: int, step: int, sequences: int, stream: str = "train") -> dict[str, Tensor]:
        """Returns input_ids, attention_mask and labels, long (b, t) each: a pure function of its arguments.

        Every sequence has as many hidden tokens, at least one; labels elsewhere are -100.
        """
        tokens, _ = self.corpus.batch(seed=seed, step=step, sequences=sequences, stream=stream)
        generator = generator_of("mask", stream, seed, step)
        tokens = tokens.clone()
        inner = torch.ones_like(tokens[0], dtype=torch.bool)
        for place, token in ((0, self.first), (-1, self.last)):
            if token is not None and tokens.shape[1] > 2:
                tokens[:, place], inner[place] = token, False
        drawn = torch.rand(tokens.shape, generator=generator).masked_fill(~inner, torch.inf)
        count = max(1, round(HIDDEN * int(inner.sum())))
        places = drawn.argsort(dim=1)[:, :count]
        hidden = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, places, True)
        chance = torch.rand(tokens.shape, generator=generator)
        random = torch.randint(self.size, tokens.shape, generator=generator)
        shown = torch.where(chance < AS_MASK, torch.full_like(tokens, self.mask), tokens)
        shown = torch.where((chance >= AS_MASK) & (chance < AS_MASK + AS_RANDOM), random, shown)
        return {
            "input_ids": torch.where(hidden, shown, tokens),
            "attention_mask": torch.ones_like(tokens),
            "labels": tokens.masked_fill(~hidden, NO_TARGET),
        }


def _first_of(rules: Any, names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := rules.token_to_id(name)) is not None), None)
