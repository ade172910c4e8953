"""Masked batches hide 15 % of a window's tokens, mostly behind the mask; only these have a target, the true token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.text.corpus import Corpus
from hessprobe.text.masked_corpus import MaskedCorpus
from tests.checkpoints.hugging_face import save_tokenizer
from tests.training.runs import text_file

SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def opened(folder: Path, specials: list[str], context: int = 40) -> tuple[MaskedCorpus, Corpus]:
    tokenizer = str(save_tokenizer(folder, specials))
    corpus = Corpus.open(text_file(folder), context=context, tokenizer=tokenizer)
    return MaskedCorpus.of(corpus, tokenizer), corpus


def test_what_is_hidden_how_and_where(tmp_path):
    masked, corpus = opened(tmp_path, SPECIALS)
    batch = masked.batch(seed=1, step=2, sequences=500, stream="probe")
    tokens, _ = corpus.batch(seed=1, step=2, sequences=500, stream="probe")
    shown, labels = batch["input_ids"], batch["labels"]
    hidden = labels != -100
    assert (shown[:, 0] == 1).all() and (shown[:, -1] == 2).all()  # [CLS] and [SEP]
    assert not hidden[:, 0].any() and not hidden[:, -1].any()
    assert (hidden.sum(1) == round(0.15 * 38)).all()
    assert torch.equal(labels[hidden], tokens[hidden])
    inner = ~hidden[:, 1:-1]
    assert torch.equal(shown[:, 1:-1][inner], tokens[:, 1:-1][inner])
    assert batch["attention_mask"].all() and batch["attention_mask"].shape == shown.shape
    # 3,000 hidden places: standard errors of the shares 0.0073 and 0.0055.
    as_mask = (shown[hidden] == 3).double().mean().item()
    kept = (shown[hidden] == tokens[hidden]).double().mean().item()
    assert abs(as_mask - 0.8) < 4 * 0.0073 + 1 / 280 and abs(kept - 0.1) < 4 * 0.0055 + 1 / 280
    places = hidden[:, 1:-1].double().mean(0)
    assert (places - 6 / 38).abs().max() < 5 * 0.0163  # every place alike


def test_a_batch_depends_on_its_arguments_alone(tmp_path):
    masked, _ = opened(tmp_path, SPECIALS)
    given = {"seed": 1, "step": 2, "sequences": 4, "stream": "probe"}
    one = masked.batch(**given)
    torch.manual_seed(99)
    other = masked.batch(**given)
    assert all(torch.equal(one[key], other[key]) for key in one)
    for change in ({"seed": 2}, {"step": 3}, {"stream": "train"}):
        assert not torch.equal(masked.batch(**given | change)["labels"], one["labels"])


def test_without_words_for_begin_and_end_and_in_the_shortest_windows_something_is_hidden(tmp_path):
    masked, _ = opened(tmp_path, ["<mask>", "<eos>"], context=2)
    labels = masked.batch(seed=0, step=0, sequences=50)["labels"]
    assert ((labels != -100).sum(1) == 1).all() and (labels[:, 0] != -100).any()


def test_the_fingerprint_is_the_corpuss_and_says_how_much_is_hidden(tmp_path):
    masked, corpus = opened(tmp_path, SPECIALS)
    assert masked.fingerprint == {**corpus.fingerprint, "hidden": 0.15}


def test_tokens_without_a_mask_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no token \[MASK\] or <mask>"):
        opened(tmp_path, ["[SEP]"])
    corpus = Corpus.open(text_file(tmp_path), context=8)
    with pytest.raises(UserError, match="which token is its mask"):
        MaskedCorpus.of(corpus, None)
