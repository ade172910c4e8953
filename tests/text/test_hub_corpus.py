"""A stream's windows are the documents packed in order, whoever asks when; streams share no document."""

from __future__ import annotations

import json
import socket
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessprobe.errors import RunFailed, UserError
from hessprobe.text.hub_corpus import HubCorpus
from hessprobe.text.packing import TOKENIZED_TOGETHER
from tests.text.hub_files import CONTEXT, END, Files, corpus, documents


def windows(of: HubCorpus, count: int, stream: str = "train", seed: int = 0) -> np.ndarray:
    inputs, targets = of.batch(seed=seed, step=0, sequences=count, stream=stream)
    return np.column_stack([inputs.numpy(), targets.numpy()[:, -1]])


def in_order(read: np.ndarray) -> list[int]:
    """Returns the documents' numbers in the order in which windows show them."""
    tokens = np.concatenate([read[:, :-1].ravel(), read[-1:, -1]])
    numbers = [int(t) for t in tokens if t != END]
    return [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n]


@pytest.mark.parametrize("files", [1, 3, 9, 20])
def test_windows_are_whole_documents_packed_with_an_end_between(files):
    read = windows(corpus(files), 12)
    shown = in_order(read)
    packed = [t for n in shown for t in [*[n] * (n * 7 % 9 + 1), END]]
    expected = [packed[i * CONTEXT : i * CONTEXT + CONTEXT + 1] for i in range(12)]
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("files", [1, 9, 20])
def test_streams_share_no_document_and_seeds_differ_in_order(files):
    of = corpus(files, each=60)
    seen = {
        name: set(in_order(windows(of, 8, name))) for name in ("train", "line_search", "probe/cross_layer")
    }
    assert not seen["train"] & seen["line_search"]
    assert not (seen["train"] | seen["line_search"]) & seen["probe/cross_layer"]
    if files > 1:
        assert in_order(windows(of, 8)) != in_order(windows(of, 8, seed=1))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.integers(0, 12), min_size=1, max_size=6), files=st.sampled_from([2, 9]))
def test_a_batch_is_a_pure_function_whatever_was_read_before(steps, files):
    of, whole = corpus(files), windows(corpus(files), 3 * 13)
    for step in steps:
        inputs, targets = of.batch(seed=0, step=step, sequences=3)
        np.testing.assert_array_equal(inputs, whole[3 * step : 3 * step + 3, :-1])
        np.testing.assert_array_equal(targets, whole[3 * step : 3 * step + 3, 1:])


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 15), files=st.sampled_from([2, 9]))
def test_a_bookmark_gives_the_same_windows_and_spares_the_tokenizer(step, files):
    of = corpus(files, each=40)
    for i in range(step):
        of.batch(seed=3, step=i, sequences=2)
    marks = json.loads(json.dumps(of.bookmarks()))
    wanted = of.batch(seed=3, step=step, sequences=2)
    resumed = corpus(files, each=40)
    resumed.restore(marks)
    found = resumed.batch(seed=3, step=step, sequences=2)
    assert torch.equal(wanted[0], found[0]) and torch.equal(wanted[1], found[1])
    assert len(resumed.tokenizer.seen) <= TOKENIZED_TOGETHER
    if step:
        first = int(found[0][0, 0]) or int(found[0][0, 1])
        assert int(resumed.tokenizer.seen[0].split()[0]) in (first, first - 1)  # no document before it
        earlier = resumed.batch(seed=3, step=0, sequences=2)  # behind its bookmark
        assert torch.equal(earlier[0], corpus(files, each=40).batch(seed=3, step=0, sequences=2)[0])


def test_a_data_set_read_to_its_end_begins_again():
    few = corpus(2, each=8)
    shown = in_order(windows(few, 40))
    once = list(dict.fromkeys(shown))
    assert len(once) == 8  # half of the documents are for training
    assert shown[: len(once) * 2] == once * 2


def test_held_out_windows_are_the_validation_splits_first_and_never_trained_on():
    of = corpus()
    batches = of.held_out_batches(sequences=3, count=2)
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(3, CONTEXT)] * 2
    first = int(batches[0][0][0, 0])
    assert first == 5000
    assert (
        min(int(i[i != END].min()) for i, _ in batches)
        >= 5000
        > int(of.batch(seed=0, step=0, sequences=9)[0].max())
    )
    everything = of.held_out_batches(sequences=4, count=1000)
    tokens = sum(n * 7 % 9 + 2 for n in range(5000, 5020))
    assert sum(len(inputs) for inputs, _ in everything) == (tokens - 1) // CONTEXT


def test_mistakes_in_the_data_are_told():
    with pytest.raises(UserError, match="no column 'text' in split train; it has: content"):
        corpus(train=Files(documents(2, 3), "content")).batch(seed=0, step=0, sequences=1)
    with pytest.raises(UserError, match="split validation .* holds less than one sequence of 6 tokens"):
        corpus(validation=Files([["1 2"]])).held_out_batches(1, 1)
    with pytest.raises(
        UserError, match="too few documents to give training, line search and probes their own"
    ):
        corpus(1, each=3).batch(seed=0, step=0, sequences=1, stream="line_search")
    with pytest.raises(UserError, match="at least 1 sequence, got 0"):
        corpus().batch(seed=0, step=0, sequences=0)
    with pytest.raises(UserError, match="outside the vocabulary of 60,000"):
        corpus(train=Files([["60001"] * 99])).batch(seed=0, step=0, sequences=3)


def test_a_stream_that_breaks_off_says_how_to_go_on():
    class Broken(Files):
        def __iter__(self):
            yield from islice(super().__iter__(), 2)
            raise ConnectionError("connection reset by peer\nmany lines")

        def shard(self, num_shards, index):
            return Broken([self.files[index]])

    with pytest.raises(
        RunFailed,
        match="reading split train of 'hub:a/b' broke off .connection reset by peer.; go on with --resume",
    ):
        corpus(train=Broken(documents(9, 3))).batch(seed=0, step=0, sequences=50)


class TestOpen:
    """A data set is opened by name, and everything missing is told before a run exists."""

    @pytest.fixture
    def rules(self, tmp_path: Path) -> str:
        made = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({"</s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?")
        )
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        made.save(str(tmp_path / "rules.json"))
        return str(tmp_path / "rules.json")

    @pytest.fixture
    def offline(self, monkeypatch) -> None:
        def unknown(*_):
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        monkeypatch.setattr("hessprobe.text.hub.getproxies", dict)

    def test_offline_says_what_was_sought_and_what_works(self, monkeypatch, rules, offline):
        monkeypatch.setitem(sys.modules, "datasets", object())
        with pytest.raises(UserError) as caught:
            HubCorpus.open("hub:allenai/c4/en", context=4, tokenizer=rules)
        for part in ("cannot stream 'hub:allenai/c4/en' (configuration en, split train)", "not known",
                     "pip install 'hessprobe[hf]'", "Offline: --set data.source=stdlib"):  # fmt: skip
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_without_the_library_the_error_says_how_to_install_it(self, monkeypatch, rules):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(
            UserError, match=r"'hub:a/b' needs the library 'datasets'.*pip install 'hessprobe\[hf\]'.*stdlib"
        ):
            HubCorpus.open("hub:a/b", context=4, tokenizer=rules)

    def test_a_name_or_a_tokenizer_that_is_missing_is_told(self, monkeypatch, rules):
        monkeypatch.setitem(sys.modules, "datasets", object())
        with pytest.raises(UserError, match="needs a data.tokenizer, such as t5-base"):
            HubCorpus.open("hub:a/b", context=4)
        with pytest.raises(UserError, match="wanted hub:OWNER/NAME or hub:OWNER/NAME/CONFIG"):
            HubCorpus.open("hub:c4", context=4, tokenizer=rules)

    def test_files_in_a_folder_are_streamed_by_the_real_library(self, tmp_path, rules, monkeypatch):
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        data = tmp_path / "data"
        data.mkdir()
        for name, texts in {
            "train-0": ["a a b"] * 40,
            "train-1": ["b b a"] * 40,
            "validation-0": ["a b"] * 9,
        }.items():
            lines = (json.dumps({"text": text, "url": "-"}) for text in texts)
            (data / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        of = HubCorpus.open(f"hub:{data}", context=4, tokenizer=rules)
        assert (of.vocabulary, of.fingerprint["files"]) == (4, 2)
        (held_out,) = of.held_out_batches(2, 1)
        assert held_out[0].tolist() == [[1, 2, 0, 1], [2, 0, 1, 2]]
        wanted = of.batch(seed=0, step=9, sequences=2)
        again = HubCorpus.open(f"hub:{data}", context=4, tokenizer=rules)
        assert again.fingerprint == of.fingerprint
        for step in range(9):
            again.batch(seed=0, step=step, sequences=2)
        third = HubCorpus.open(f"hub:{data}", context=4, tokenizer=rules)
        third.restore(again.bookmarks())
        assert torch.equal(third.batch(seed=0, step=9, sequences=2)[0], wanted[0])
        (data / "validation-0.jsonl").unlink()
        with pytest.raises(UserError, match="split validation.: .*Available splits: .'train'."):
            HubCorpus.open(f"hub:{data}", context=4, tokenizer=rules)
