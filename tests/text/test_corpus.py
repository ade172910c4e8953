"""A batch is a pure function of its arguments, held-out tokens are never trained on, bad data is told."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessprobe.errors import UserError
from hessprobe.text import corpus as corpus_module
from hessprobe.text.corpus import Corpus
from hessprobe.text.sources import _spread


def shard(path: Path, tokens) -> Path:
    np.asarray(tokens, dtype="<u2").tofile(path)
    return path


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Token i at place i, so that a batch shows which places it read."""
    return Corpus.open(shard(tmp_path_factory.mktemp("data") / "counting.bin", range(2000)), context=16)


def test_windows_are_consecutive_and_targets_follow_inputs(counting: Corpus) -> None:
    inputs, targets = counting.batch(seed=0, step=3, sequences=50)
    assert inputs.shape == targets.shape == (50, 16)
    assert inputs.dtype == targets.dtype == torch.long
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], inputs[:, :-1] + 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), stream=st.sampled_from(["train", "probe"]))
def test_batch_is_a_pure_function(counting: Corpus, seed: int, step: int, stream: str) -> None:
    np.random.seed(step % 7)
    torch.manual_seed(step % 5)
    one = counting.batch(seed=seed, step=step, sequences=8, stream=stream)
    counting.batch(seed=seed + 1, step=step, sequences=3)
    two = counting.batch(seed=seed, step=step, sequences=8, stream=stream)
    fewer = counting.batch(seed=seed, step=step, sequences=3, stream=stream)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert torch.equal(one[0][:3], fewer[0])


def test_batches_never_change_between_versions(counting: Corpus) -> None:
    """A resumed or repeated run must see the same data, so these numbers are part of the format."""
    starts = counting.batch(seed=1, step=2, sequences=4, stream="train")[0][:, 0]
    assert starts.tolist() == [1703, 322, 1538, 780]


def test_streams_seeds_and_steps_are_independent_draws(counting: Corpus) -> None:
    def starts(**change):
        arguments = {"seed": 0, "step": 0, "stream": "train", **change}
        return counting.batch(sequences=4000, **arguments)[0][:, 0].double()

    first = starts()
    for change in ({"stream": "line_search"}, {"stream": "probe"}, {"seed": 1}, {"step": 1}):
        correlation = torch.corrcoef(torch.stack([first, starts(**change)]))[0, 1].item()
        assert abs(correlation) * math.sqrt(4000) < 4, change  # a z-score


def test_starts_are_uniform_over_the_training_part(counting: Corpus) -> None:
    places = counting.train_tokens - counting.context
    starts = counting.batch(seed=0, step=0, sequences=200 * places)[0][:, 0]
    counts = torch.bincount(starts, minlength=places).double()
    assert len(counts) == places and counts.min() > 0  # the last place too, none beyond
    chi2 = ((counts - 200) ** 2 / 200).sum().item()
    assert abs(chi2 - (places - 1)) / math.sqrt(2 * (places - 1)) < 4


def test_held_out_tokens_are_never_trained_on(counting: Corpus) -> None:
    trained = counting.batch(seed=0, step=0, sequences=20_000)[1].max().item()
    batches = counting.held_out_batches(sequences=2, count=3)
    assert trained < min(inputs.min().item() for inputs, _ in batches)
    assert (counting.train_tokens, counting.held_out_tokens) == (1900, 100)


def test_held_out_windows_are_fixed_spread_and_apart(counting: Corpus) -> None:
    batches = counting.held_out_batches(sequences=2, count=2)
    starts = torch.cat([inputs[:, 0] for inputs, _ in batches]) - 1900
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(2, 16), (2, 16)]
    assert starts.tolist() == [0, 16, 48, 64]  # 4 of the 6 windows there are
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
    again = counting.held_out_batches(sequences=2, count=2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_held_out_gives_all_there_is_when_asked_for_more(counting: Corpus) -> None:
    batches = counting.held_out_batches(sequences=4, count=9)
    assert [len(inputs) for inputs, _ in batches] == [4, 2]
    assert torch.cat([inputs.flatten() for inputs, _ in batches]).unique().numel() == 96


def test_entropy_of_known_frequencies(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abca" * 100)
    corpus = Corpus.open(path, context=4, held_out_fraction=0.5)
    assert corpus.entropy() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    path = shard(tmp_path / "uniform.bin", [*range(1000)] * 2)
    uniform = Corpus.open(path, context=4, held_out_fraction=0.5)
    assert uniform.entropy() == pytest.approx(math.log(1000))


def test_text_file_fingerprint_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("naïve text\n".encode() * 50)
    corpus = Corpus.open(path, context=8)
    assert corpus.vocabulary == 256
    assert corpus.fingerprint["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert corpus.fingerprint["tokens"] == path.stat().st_size == corpus.train_tokens + corpus.held_out_tokens
    assert corpus.fingerprint["python"] == ".".join(map(str, sys.version_info[:3]))
    assert json.loads(json.dumps(corpus.fingerprint)) == corpus.fingerprint


def test_folder_reads_visible_utf8_in_the_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b/z.md": b"second",
        "a.txt": b"first ",
        "c.log": "né".encode(),
        "latin.txt": "é".encode("latin-1"),
        "picture.png": b"ok\0ok",
        "empty.txt": b"",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    corpus = Corpus.open(tmp_path, context=2, held_out_fraction=0.3)
    assert bytes(corpus.train) + bytes(corpus.held_out) == b"first \0second\0" + "né".encode()
    assert corpus.fingerprint["files"] == 3
    assert corpus.fingerprint["skipped_files"] == 2


def test_nanogpt_folder_uses_its_own_validation_split(tmp_path: Path) -> None:
    shard(tmp_path / "train.bin", range(300))
    shard(tmp_path / "val.bin", range(1000, 1050))
    corpus = Corpus.open(tmp_path, context=8)
    assert isinstance(corpus.train, np.memmap)
    assert (corpus.train_tokens, corpus.held_out_tokens, corpus.vocabulary) == (300, 50, 1050)
    assert corpus.held_out_batches(2, 1)[0][0].min() == 1000
    assert corpus.fingerprint["held_out"] == "val.bin"
    (tmp_path / "val.bin").unlink()
    assert Corpus.open(tmp_path, context=8).held_out_tokens == 15


def test_large_parts_are_hashed_from_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(5000) % 700
    path = shard(tmp_path / "large.bin", tokens)
    whole = Corpus.open(path, context=4)
    monkeypatch.setattr(corpus_module, "READ_WHOLE", 1000)
    monkeypatch.setattr(corpus_module, "BLOCK", 10)
    monkeypatch.setattr(corpus_module, "SAMPLED_BLOCKS", 5)
    with pytest.raises(UserError, match="too large to search. Give vocabulary=N"):
        Corpus.open(path, context=4)
    sampled = Corpus.open(path, context=4, vocabulary=700)
    assert whole.fingerprint["hashed"] == "all bytes"
    assert "5 x 10 tokens" in sampled.fingerprint["hashed"]
    blocks = list(corpus_module._blocks(sampled.train))
    assert [len(b) for b in blocks] == [10] * 5
    assert blocks[0][0] == tokens[0] and blocks[-1][-1] == tokens[4749]
    shard(path, [*tokens[:4749], 1, *tokens[4750:]])  # the end lies in a block, so this is noticed
    changed = Corpus.open(path, context=4, vocabulary=700)
    assert changed.fingerprint["sha256"] != sampled.fingerprint["sha256"]


def test_standard_library_is_enough_text_with_whole_files_held_out() -> None:
    corpus = Corpus.open("stdlib", context=64)
    again = Corpus.open("stdlib", context=64)
    assert corpus.fingerprint == again.fingerprint
    both = bytes(corpus.train) + bytes(corpus.held_out)
    assert corpus.fingerprint["sha256"] == hashlib.sha256(both).hexdigest()
    assert corpus.train_tokens > 5_000_000
    assert corpus.held_out_tokens / corpus.fingerprint["tokens"] == pytest.approx(0.05, rel=0.15)
    held_out, train = (set(bytes(part).split(b"\0")) for part in (corpus.held_out, corpus.train))
    assert len(held_out) > 20
    assert all(len(text) < 0.2 * corpus.held_out_tokens for text in held_out)
    assert (Path(os.__file__).read_bytes() in train) != (Path(os.__file__).read_bytes() in held_out)
    assert 3.0 < corpus.entropy() < 3.6  # nats per byte: Python text


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=200, max_size=300), fraction=st.floats(0.1, 0.5))
def test_spread_takes_about_the_fraction_from_everywhere(sizes: list[int], fraction: float) -> None:
    texts = [bytes([i % 255 + 1]) * size for i, size in enumerate(sizes)]
    train, held_out = _spread(texts, fraction)
    assert sorted(train + held_out) == sorted(texts)
    total = sum(sizes)
    assert abs(sum(map(len, held_out)) - fraction * total) <= 2 * 50
    first_half = sum(map(len, _spread(texts[: len(texts) // 2], fraction)[1]))
    assert first_half > 0


@pytest.mark.processes
def test_opening_needs_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("text " * 50)
    code = (
        "import sys; from hessprobe.text.corpus import Corpus; "
        "Corpus.open(sys.argv[1], context=4).entropy(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_token_outside_the_vocabulary_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="token 300, outside .* of 256 .*vocabulary=301 or more"):
        Corpus.open(shard(tmp_path / "t.bin", [300] * 200), context=8, vocabulary=256)


def test_of_a_large_shard_it_is_told_by_the_batch_that_meets_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("hessprobe.text.corpus.READ_WHOLE", 16)
    corpus = Corpus.open(shard(tmp_path / "t.bin", [300] * 200), context=8, vocabulary=256)
    for read in (lambda: corpus.batch(seed=0, step=0, sequences=1), lambda: corpus.held_out_batches(1, 1)):
        with pytest.raises(UserError, match="token 300, outside .* of 256 .*vocabulary=301 or more"):
            read()


def test_missing_path_lists_what_is_valid(tmp_path: Path) -> None:
    for source in (tmp_path / "absent", str(tmp_path / "absent"), "sdtlib", "", Path("stdlib")):
        with pytest.raises(UserError, match="no corpus at .*Valid: stdlib, a text file, a folder"):
            Corpus.open(source, context=4)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.bin", b"", "is empty"),
        ("a.bin", b"123", "has 3 bytes, an odd number.*uint16"),
        ("a.txt", b"ab\0c" * 100, "NUL bytes, so it is not text. Give a text file"),
        ("a.txt", b"short", "training part .* holds 5 tokens; one sequence needs 9"),
        ("a.txt", b"text" * 25, "held-out part .* holds 5 tokens; one sequence needs 9 .*held_out_fraction"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        Corpus.open(tmp_path / name, context=8)


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens.npy").write_bytes(b"\x93NUMPY\0")
    with pytest.raises(UserError, match="no text in folder .*1 files are not UTF-8.*train.bin and val.bin"):
        Corpus.open(tmp_path, context=8)


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("text" * 100)

    def denied(*_, **__):  # a file mode would not stop a test that runs as root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np, "memmap", denied)
    with pytest.raises(UserError, match="cannot read .*secret.txt: Permission denied. Check its permissions"):
        Corpus.open(path, context=8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"context": 0}, "context must be at least 1"),
        ({"held_out_fraction": 0.0}, "held_out_fraction must be above 0 and below 1"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction"),
        ({"vocabulary": 0}, "vocabulary must be at least 1"),
    ],
)
def test_impossible_arguments_are_refused(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Corpus.open("stdlib", **{"context": 8, **change})


def test_empty_batches_are_refused(counting: Corpus) -> None:
    with pytest.raises(UserError, match="at least 1 sequence, got 0"):
        counting.batch(seed=0, step=0, sequences=0)
    with pytest.raises(UserError, match="got 1 and 0"):
        counting.held_out_batches(1, 0)
