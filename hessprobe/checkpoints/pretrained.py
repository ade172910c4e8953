"""Checkpoints of transformers' models: measured through the model's own tokenizer, on one and the same batch each."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hessprobe.checkpoints.series import Reader, check_probes, put_parameters, recipe_of
from hessprobe.errors import UserError
from hessprobe.models.pretrained import CLASSIFICATION, CONFIG, MASKED, Pretrained
from hessprobe.problem.objective import Objective
from hessprobe.recipe import ModelRecipe
from hessprobe.text.labelled_texts import LabelledTexts
from hessprobe.text.masked_corpus import MaskedCorpus
from hessprobe.text.tokenizer import load_tokenizer
from hessprobe.training.builds import open_corpus

CONTEXT = 128  # tokens, where nothing else is asked for: a model's own thousands would make every row dear
_PARTS = "checkpoint-*"


def spread(given: str) -> list[str]:
    """Returns a folder's checkpoint-N folders in order where it holds only these, as Trainer leaves them; else itself."""
    path = Path(os.path.expanduser(given))
    if not path.is_dir() or (path / CONFIG).is_file():
        return [given]
    found = [f for f in path.glob(_PARTS) if (f / CONFIG).is_file() and f.name.rpartition("-")[2].isdigit()]
    if found:
        return [str(f) for f in sorted(found, key=lambda f: int(f.name.rpartition("-")[2]))]
    runs = sorted(f.parent.parent.name for f in path.glob("*/checkpoint/state.pt"))
    inside = f"; runs in it: {', '.join(runs)}" if runs else ""
    raise UserError(
        f"{given} holds no model: neither checkpoint/state.pt (a run of hessprobe) nor {CONFIG} (transformers){inside}. "
        "An adapter alone is none either: merge it into its model first. Files of another code's weights need --model "
        "module:function"
    )


class PretrainedCheckpoints:
    """A series of transformers' checkpoints.

    Args:
        given: folders, or names on the Hub.
        settings, data, sequences: see `recipe_of`; the data default to Python's own sources.
        context: tokens in a sequence; default: 128, or as many as the model reads.
    """

    def __init__(
        self,
        given: Sequence[str],
        settings: Sequence[str],
        *,
        data: str | None,
        sequences: int | None,
        context: int | None,
    ) -> None:
        self.names = list(given)
        self.checkpoints = [Pretrained.find(name) for name in given]
        self.first = self.checkpoints[0]
        for other in self.checkpoints[1:]:
            if apart := self.first.differs(other):
                raise UserError(
                    f"{self.first.name} and {other.name} are different models, and a series is of one: {apart}. Measure "
                    "them one by one, and compare with hessprobe report RUN RUN"
                )
        self.recipe = recipe_of(self._values(data), settings, data=data, sequences=sequences)
        check_probes(self.recipe)
        self.vocabulary = self.first.vocabulary
        most = self.first.positions
        self.context = context or min(CONTEXT, most or CONTEXT)
        if self.context < 2 or (most is not None and self.context > most):
            raise UserError(
                f"--context {self.context}: this model reads 2 to {most or 'any number of'} tokens at a time"
            )
        self.known = [checkpoint.step for checkpoint in self.checkpoints]
        self.reads = [0] * len(given)

    def reader(self) -> Reader:
        data = self.recipe.data
        if self.first.kind == CLASSIFICATION:
            return LabelledTexts.open(
                data.source,
                tokenizer=self._tokenizer("texts"),
                context=self.context,
                classes=self.first.config.num_labels,
                pad=self.first.config.get_text_config().pad_token_id,
            )
        if data.tokenizer is not None:
            self._check_vocabulary(data.tokenizer)
        elif not _holds_tokens(data.source):
            self._tokenizer(data.source)
        # Of a recipe's model, a corpus looks at these two alone.
        model = ModelRecipe(context=self.context, vocabulary=self.vocabulary)
        corpus = open_corpus(self.recipe.model_copy(update={"model": model}))
        return MaskedCorpus.of(corpus, data.tokenizer) if self.first.kind == MASKED else corpus

    def model(self) -> nn.Module:
        return self.first.load()

    def objective(self, model: nn.Module) -> Objective:
        return Objective(model)

    def place(self, number: int, model: nn.Module) -> None:
        put_parameters(model, self.checkpoints[number].load().state_dict())

    def origin(self, number: int) -> dict[str, Any]:
        return self.checkpoints[number].origin

    def described(self) -> dict[str, Any]:
        return {
            "checkpoint": self.first.name,
            "architecture": self.first.config.architectures[0],
            "kind": self.first.kind,
            "context": self.context,
            "vocabulary": self.vocabulary,
            "transformers": importlib.metadata.version("transformers"),
        }

    def _values(self, data: str | None) -> dict[str, Any]:
        """Returns the recipe's values before flags and settings: the model's own tokenizer where text is read."""
        path = Path(self.first.name)
        known = self.first.step is not None and path.is_dir()
        name = (path.resolve().parent if known else path).name.replace("@", "-")
        values: dict[str, Any] = {"name": f"{name}-probe"}
        if self.first.kind == CLASSIFICATION and data is None:
            raise UserError(
                f"{self.first.name} is a classifier: give --data FILE.jsonl, lines of JSON with text and label, or "
                "hub:OWNER/NAME with such columns"
            )
        if self.first.tokenizer and not _holds_tokens(data or ""):
            values["data"] = {"tokenizer": self.first.tokenizer}
        return values

    def _tokenizer(self, source: str) -> str:
        """Returns the tokenizer's name.

        Raises:
            UserError: there is none to make tokens of a text.
        """
        if self.recipe.data.tokenizer is None:
            raise UserError(
                f"{self.first.name} has no tokenizer.json, so {source!r} cannot be read as its tokens: save one beside "
                "it (AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)), name one with --set data.tokenizer=, "
                "or give uint16 tokens, --data FILE.bin"
            )
        return self.recipe.data.tokenizer

    def _check_vocabulary(self, tokenizer: str) -> None:
        if tokenizer.startswith("bpe:"):
            raise UserError(
                f"data.tokenizer = {tokenizer!r}: a model that is trained already reads its own tokens only"
            )
        found = load_tokenizer(tokenizer, end_of_text=self.recipe.data.end_of_text)
        # Added tokens (padding, say) may lie beyond: packed text holds none of them.
        size = found.rules.get_vocab_size(with_added_tokens=False)
        if size > self.vocabulary:
            raise UserError(
                f"tokenizer {tokenizer!r} makes {size:,} tokens, and {self.first.name} knows {self.vocabulary:,}: give "
                "the model's own with --set data.tokenizer="
            )


def _holds_tokens(source: str) -> bool:
    """Tells token shards from texts, by name."""
    return source.endswith(".bin") or (Path(os.path.expanduser(source)) / "train.bin").is_file()
