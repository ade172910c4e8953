"""Labelled texts come as padded batches, a pure function of seed and step; rows that are none are told by number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.text.labelled_texts import LabelledTexts
from tests.checkpoints.hugging_face import hub_folder, labelled_file, save_tokenizer

CONTEXT = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the file of a tokenizer whose token 0 pads."""
    return str(save_tokenizer(tmp_path_factory.mktemp("rules"), ["[PAD]", "[CLS]", "[SEP]"]))


def opened(source: object, tokenizer: str, **changed: int | None) -> LabelledTexts:
    given = {"context": CONTEXT, "classes": 3, "pad": 0, **changed}
    return LabelledTexts.open(str(source), tokenizer=tokenizer, **given)


def test_every_text_stands_once_with_its_own_tokens_and_label(tmp_path, tokenizer):
    read = opened(labelled_file(tmp_path), tokenizer)
    batch = read.batch(seed=0, step=0, sequences=24)
    found = []
    for ids, mask, label in zip(
        *(batch[key].tolist() for key in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length) and not any(ids[length:])
        found.append((ids[:length], label))
    plain = [read.rules.encode(text).ids for text in read.texts]
    rows = [json.loads(line) for line in (tmp_path / "labelled.jsonl").read_text().splitlines()]
    wanted = [([t for t in ids if t][:CONTEXT], row["label"]) for ids, row in zip(plain, rows, strict=True)]
    assert sorted(found) == sorted(wanted)
    assert batch["input_ids"].shape[1] == CONTEXT and batch["attention_mask"].sum(1).min() < CONTEXT


def test_a_batch_depends_on_its_arguments_alone_and_fewer_are_the_first_of_more(tmp_path, tokenizer):
    read = opened(labelled_file(tmp_path), tokenizer)
    one, two = (read.batch(seed=3, step=1, sequences=9, stream="probe") for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert torch.equal(read.batch(seed=3, step=1, sequences=5, stream="probe")["labels"], one["labels"][:5])
    assert not torch.equal(
        read.batch(seed=4, step=1, sequences=9, stream="probe")["input_ids"], one["input_ids"]
    )


def test_a_data_set_of_the_hub_is_read_shuffled(tmp_path, tokenizer):
    read = opened(f"hub:{hub_folder(tmp_path / 'set')}", tokenizer)
    assert len(read.texts) == 30 and read.fingerprint["kind"] == "labelled texts"
    assert read.labels.tolist() != [i % 3 for i in range(30)]
    assert sorted(read.labels.tolist()) == sorted(i % 3 for i in range(30))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"text": "a", "label": 0}\n{"text": "b"}', "row 1, has text: wanted lines of JSON"),
        ('{"text": "a", "label": 3}', "row 0, has label 3; the model knows 3 labels, 0 .. 2"),
        ('{"text": "a", "label": -1}', "has label -1"),
        ('{"text": "a", "label": true}', "wanted lines of JSON"),
        ('{"text": 5, "label": 1}', "wanted lines of JSON"),
        ("[1]", "wanted lines of JSON"),
        ("just words", "cannot read"),
        ("\n\n", "holds no text"),
    ],
)  # fmt: skip
def test_rows_that_are_none_are_told(lines, said, tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        opened(tmp_path / "rows.jsonl", tokenizer)


def test_what_else_is_missing_is_told(tmp_path: Path, tokenizer):
    with pytest.raises(UserError, match="no labelled texts at 'none.jsonl'"):
        opened("none.jsonl", tokenizer)
    with pytest.raises(UserError, match="names no pad_token_id"):
        opened(labelled_file(tmp_path), tokenizer, pad=None)
    with pytest.raises(UserError, match="holds 24 texts, and a row reads 25.*--sequences 24"):
        opened(labelled_file(tmp_path), tokenizer).batch(seed=0, step=0, sequences=25)
