"""Text becomes tokens and back; a document ends with its end token; a tokenizer that is not to be had is told."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from hessprobe.errors import UserError
from hessprobe.text import tokenizer as tokenizer_module
from hessprobe.text.corpus import Corpus
from hessprobe.text.tokenizer import load_tokenizer

TEXT = "the cat sat on the mat\nand the naïve dog sat on the cat\n" * 40


def text_of(*documents: str) -> np.ndarray:
    return np.frombuffer("\0".join(documents).encode(), dtype=np.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Returns a tokenizer.json whose token 1 is </s>."""
    rules = tokenizers.Tokenizer(tokenizers.models.BPE())
    rules.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=275,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    rules.train_from_iterator([TEXT], trainer)
    rules.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_learned_byte_pairs_lose_nothing_and_every_document_is_closed():
    rules = load_tokenizer("bpe:270", text=text_of(TEXT, "second"))
    one, two = rules.encode([TEXT, "unseen: Ünïcödé\t\n"])
    assert rules.size == 270 and rules.dtype is np.uint16
    assert one[-1] == two[-1] == rules.end and rules.end not in one[:-1]
    assert rules.rules.decode(two[:-1].tolist()) == "unseen: Ünïcödé\t\n"
    assert len(one) < 0.8 * len(TEXT.encode())  # pairs were learned
    again = load_tokenizer("bpe:270", text=text_of(TEXT, "second"))
    assert again.sha256 == rules.sha256


def test_a_long_text_is_encoded_in_pieces_cut_after_lines(saved, monkeypatch):
    rules = load_tokenizer(str(saved))
    (whole,) = rules.encode([TEXT])
    monkeypatch.setattr(tokenizer_module, "PIECE", 100)
    (pieces,) = rules.encode([TEXT])
    np.testing.assert_array_equal(whole, pieces)
    (unbroken,) = rules.encode(["x" * 1000])
    assert rules.rules.decode(unbroken[:-1].tolist()) == "x" * 1000


def test_a_tokenizer_file_gives_its_own_tokens_and_end(saved):
    rules = load_tokenizer(str(saved))
    assert rules.end == 1
    plain = tokenizers.Tokenizer.from_file(str(saved))
    np.testing.assert_array_equal(rules.encode(["the cat"])[0], [*plain.encode("the cat").ids, 1])
    assert load_tokenizer(str(saved), end_of_text="<pad>").end == 0


def test_a_local_corpus_of_tokens(tmp_path, saved):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.txt").write_text(f"{name} {TEXT}", encoding="utf-8")
    corpus = Corpus.open(folder, context=8, held_out_fraction=0.25, tokenizer=str(saved))
    rules = load_tokenizer(str(saved))
    wanted = np.concatenate(rules.encode([f"{name} {TEXT}" for name in "abc"]))
    np.testing.assert_array_equal(corpus.train[: wanted.size], wanted)
    assert corpus.vocabulary == rules.size == 275
    assert corpus.fingerprint["tokenizer_sha256"] == rules.sha256
    assert corpus.fingerprint["kind"] == "tokenized text"
    assert corpus.batch(seed=0, step=0, sequences=2)[0].shape == (2, 8)
    other = Corpus.open(folder, context=8, held_out_fraction=0.25, tokenizer="bpe:265")
    assert other.fingerprint["sha256"] != corpus.fingerprint["sha256"]


def test_a_model_with_too_small_a_vocabulary_is_told(tmp_path, saved):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(UserError, match="outside the vocabulary of 100"):
        Corpus.open(tmp_path / "text.txt", context=8, tokenizer=str(saved), vocabulary=100)


def test_tokens_are_not_tokenized_again(tmp_path, saved):
    np.arange(500, dtype="<u2").tofile(tmp_path / "t.bin")
    with pytest.raises(UserError, match="the source holds tokens already; leave the tokenizer out"):
        Corpus.open(tmp_path / "t.bin", context=8, tokenizer=str(saved))


def test_mistakes_are_told(tmp_path, saved):
    (tmp_path / "torn.json").write_text('{"version": ', encoding="utf-8")
    for name, words in {
        "bpe:100": "bpe:N with N of at least 257",
        "bpe:many": "bpe:N with N of at least 257",
        str(tmp_path / "none.json"): "no tokenizer at .*none.json; give a tokenizer.json, a name on the Hub",
        str(tmp_path / "torn.json"): "torn.json is not a tokenizer.json",
        "no such/na me!": "names no tokenizer: give a tokenizer.json",
    }.items():
        with pytest.raises(UserError, match=words):
            load_tokenizer(name, text=text_of(TEXT))
    with pytest.raises(UserError, match="learns from a local text; a stream needs"):
        load_tokenizer("bpe:300")
    with pytest.raises(UserError, match=r"has no token <eot> .* name one of its own with data.end_of_text"):
        load_tokenizer(str(saved), end_of_text="<eot>")


def test_offline_says_what_was_sought_and_what_works(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("hessprobe.text.hub.getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(UserError) as caught:
        load_tokenizer("an-owner/no-such-tokenizer")
    for part in ("'an-owner/no-such-tokenizer' from the Hugging Face Hub", "Name or service not known",
                 "pip install 'hessprobe[hf]'", "Offline: --set data.tokenizer=", "bpe:4096"):  # fmt: skip
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        UserError, match=r"'t5-base' needs the library 'tokenizers'.*pip install 'hessprobe\[hf\]'.*stdlib"
    ):
        load_tokenizer("t5-base")
