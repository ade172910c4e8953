"""`hessprobe probe`: a checkpoint becomes a run's folder with a page; a mistake is one line, and nothing is written."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from hessprobe.cli import main
from tests.checkpoints.hugging_face import labelled_file, save_model, save_tokenizer, saved
from tests.cli.commands import Answer, Command, answered, contents, refused
from tests.training.runs import attributes, tables, text_file, tiny

FEW = ["--probe", "cross_layer", "--sequences", "6", "--context", "12"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with what can be named: runs of two sizes, models of transformers good and bad, texts."""
    root = tmp_path_factory.mktemp("made")
    text_file(root)
    labelled_file(root)
    small = [f"--set={setting}" for setting in tiny(root / "text.txt")]
    words = ["hessprobe", "train", "--steps=1", "--optimizer=adamw", "--out", str(root / "a"), *small]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("hessprobe.report.page.write_report", lambda run, out=None: run)
        patch.setattr("sys.argv", words)
        main()
    assert not end.value.code
    shutil.copytree(root / "a", root / "wide")
    stored = (root / "wide" / "recipe.toml").read_text()
    (root / "wide" / "recipe.toml").write_text(stored.replace("\nwidth = 8", "\nwidth = 16"))
    for kind in ("gpt2", "bert", "classifier", "headless"):
        saved(root / kind, kind)
    save_model(root / "bare", "gpt2")
    saved(root / "narrow", "gpt2", vocab_size=120)
    saved(root / "deeper", "gpt2", n_layer=3)
    saved(root / "regression", "classifier", num_labels=1)
    saved(root / "half", "headless")
    _rename(root / "half", architectures=["BertForMaskedLM"])
    saved(root / "strange", "gpt2")
    _rename(root / "strange", model_type="of_tomorrow")
    saved(root / "maskless", "bert")
    save_tokenizer(root / "maskless", ["[SEP]"])
    (root / "hollow").mkdir()
    (root / "notes.pt").write_text("no checkpoint")
    shutil.copytree(root / "a", root / "unsaved")
    shutil.rmtree(root / "unsaved" / "checkpoint")
    return root


def _rename(folder: Path, **changed: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))


@pytest.fixture
def hessprobe(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Command:
    """Returns the function words... -> Answer, run offline in an empty folder; `@NAME` stands for what was made."""

    def unknown(*_: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Answer:
        named = [str(made / word[1:]) if word.startswith("@") else word for word in words]
        return answered(["probe", *named], monkeypatch, capsys)

    return run


def test_a_runs_folder_is_measured_on_its_own_data_and_reported(hessprobe, made):
    answer = hessprobe("@a", "--probe", "cross_layer")
    assert answer.code == 0, answer.error
    assert [line.split() for line in answer.out.splitlines()] == [
        ["log", "runs/nano-probe/log.zarr"],
        ["report", "runs/nano-probe/report.html"],
        ["next", "hessprobe", "show", "runs/nano-probe"],
    ]
    assert "step 1" in answer.error and "cross_layer: off-block energy" in answer.error
    out = Path("runs/nano-probe")
    assert tables(out)["cross_layer"].step.values.tolist() == [1]
    page = (out / "report.html").read_text()
    assert str(made / "a") in page and "Training" in page
    assert hessprobe("@a", "--probe", "cross_layer").out.split()[1] == "runs/nano-probe-2/log.zarr"


def test_there_is_no_training_to_resume_in_what_was_measured(hessprobe, monkeypatch, capsys):
    assert hessprobe("@a", "--probe", "cross_layer").code == 0
    answer = answered(["train", "--resume", "--out", "runs/nano-probe"], monkeypatch, capsys)
    refused(answer, "runs/nano-probe holds checkpoints measured by hessprobe probe")


def test_what_was_measured_is_kept_when_it_is_stopped(hessprobe, monkeypatch):
    def stop(**_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("hessprobe.measuring.snapshots.Snapshot", stop)
    answer = hessprobe("@a", "--probe", "cross_layer")
    assert (answer.code, answer.out) == (130, "")
    assert answer.error.splitlines() == ["stopped; the rows measured so far are kept"]
    assert tables(Path("runs/nano-probe"))["cross_layer"].sizes["step"] == 0


def test_a_series_of_transformers_is_measured_and_named_after_its_folder(hessprobe, made, tmp_path):
    for step in (5, 10):
        save_model(tmp_path / "trained" / f"checkpoint-{step}", "gpt2", seed=step)
    save_tokenizer(tmp_path / "trained", ["<|endoftext|>"])
    answer = hessprobe("trained", *FEW, "--data", "@text.txt")
    assert answer.code == 0, answer.error
    assert tables(Path("runs/trained-probe"))["cross_layer"].step.values.tolist() == [5, 10]
    assert json.loads(attributes(Path("runs/trained-probe"))["recipe"])["model"]["kind"] == "causal"


MISTAKES = {
    "no such folder": (["./none"], ["no model at './none'", "no such file or folder", "checkpoint/state.pt"]),
    "no such run": (["runs/none"], ["no model 'runs/none'", "no such folder here", "Offline give a run's"]),
    "a name on the Hub, offline": (
        ["gpt2"],
        ["no model 'gpt2'", "Hugging Face Hub (huggingface.co: Name or service not known)", "save_pretrained"],
    ),
    "an empty folder": (["@hollow"], ["hollow holds no model", "checkpoint/state.pt", "config.json"]),
    "a folder of runs": (["@."], ["holds no model", "runs in it: a, wide"]),
    "a file that is none": (["@notes.pt"], ["notes.pt lies in no run's folder", "give RUN"]),
    "a run that has saved nothing": (["@unsaved"], ["unsaved holds no checkpoint/state.pt"]),
    "no probe": (["@a"], ["no --probe given", "valid: cross_layer"]),
    "unknown probe": (["@a", "--probe", "crosslayer"], ["no probe named 'crosslayer'"]),
    "unknown logger": (["@a", *FEW, "--log", "paper"], ["'paper'", "'tensorboard' or 'wandb'"]),
    "another model's settings": (
        ["@a", *FEW, "--set", "model.width=4"],
        ["--set model.width=4: nothing is trained here", "cross_layer"],
    ),
    "a setting that does not exist": (["@a", *FEW, "--set", "cross_layer.sketches=4"], ["named 'sketches'"]),
    "too few sequences": (["@a", *FEW, "--sequences", "3"], ["--sequences 3: a row needs at least 4"]),
    "a long context": (["@a", *FEW], ["--context 12: this model reads 1 to 8 tokens"]),
    "a longer context": (["@gpt2", *FEW, "--context", "17"], ["--context 17", "2 to 16 tokens"]),
    "two models": (["@a", "@wide", *FEW], ["hold different models", "one by one"]),
    "two models of transformers": (
        ["@gpt2", "@deeper", *FEW],
        ["are different models", "n_layer is 2 there and 3 here"],
    ),
    "a run and another's model": (["@a", "@gpt2", *FEW], ["is a run of hessprobe", "is not"]),
    "no such text": (["@gpt2", *FEW, "--data", "none.txt"], ["no corpus at 'none.txt'"]),
    "no such data set": (["@gpt2", *FEW, "--data", "hub:a/b"], ["cannot stream 'hub:a/b'", "Offline"]),
    "no head": (["@headless", *FEW], ["headless is a bert model (BertModel)", "...ForMaskedLM"]),
    "weights without a head": (["@half", *FEW, "--data", "@text.txt"], ["holds no weights for", "cls.predictions"]),
    "an architecture unheard of": (["@strange", *FEW], ["strange is not one that transformers can read", "of_tomorrow"]),
    "no tokenizer": (["@bare", *FEW], ["has no tokenizer.json", "--set data.tokenizer=", "FILE.bin"]),
    "a vocabulary too small": (
        ["@narrow", *FEW, "--data", "@text.txt"],
        ["makes 2", "narrow knows 120", "data.tokenizer="],
    ),
    "no mask": (["@maskless", *FEW, "--data", "@text.txt"], ["has no token [MASK] or <mask>"]),
    "no labels": (["@classifier", *FEW], ["is a classifier: give --data FILE.jsonl"]),
    "a text for a classifier": (["@classifier", *FEW, "--data", "@text.txt"], ["wanted lines of JSON", "label"]),
    "no classes": (["@regression", *FEW], ["no classifier with one label per text (1 label(s)", "hp.Recorder"]),
    "a run in the way": (["@a", "--probe", "cross_layer", "--out", "@wide"], ["wide holds a run already", "--out"]),
    "unknown device": (["@a", "--probe", "cross_layer", "--device", "gpu"], ["--device gpu", "auto, cpu"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake, hessprobe, made):
    before = contents(made)
    words, parts = MISTAKES[mistake]
    refused(hessprobe(*words), *parts)
    assert contents(made) == before
    assert not any(Path.cwd().iterdir())


def test_without_transformers_the_pip_command_is_named_and_own_runs_work(hessprobe, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("@gpt2", "gpt2"):
        refused(hessprobe(name, *FEW), "pip install 'hessprobe[hf]'", "Without it: a run's folder")
    assert hessprobe("@a", "--probe", "cross_layer").code == 0
