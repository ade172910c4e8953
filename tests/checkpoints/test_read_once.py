"""A checkpoint's file is opened once: step, weights and hash are of one state, whatever a run moves onto it meanwhile."""

from __future__ import annotations

import builtins
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hessprobe.checkpoints import state_dicts
from hessprobe.checkpoints.measure_series import measure_series, open_series
from hessprobe.models import pretrained
from hessprobe.problem.partition import Partition
from hessprobe.training import checkpoint
from hessprobe.training.checkpoint import load_start
from hessprobe.training.loop import train
from tests.checkpoints.hugging_face import save_model, save_tokenizer
from tests.training.runs import attributes, recipe, tables, text_file

MEASURED = ('probes=["cross_layer"]', "cross_layer.sequences=4", "training.threads=1")


class Opened:
    """Counts how often files are opened in Python (torch.load opens a path there, too), and what is hashed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.files, self.hashed = Counter[str](), Counter[int]()
        plain, sha256 = builtins.open, hashlib.sha256

        def note(file: Any, *rest: Any, **more: Any) -> Any:
            self.files[str(file)] += 1
            return plain(file, *rest, **more)

        def hashes(data: Any = b"") -> Any:
            self.hashed[len(data)] += 1
            return sha256(data)

        patch.setattr(builtins, "open", note)
        patch.setattr(checkpoint.hashlib, "sha256", hashes)


@pytest.fixture
def kept(tmp_path: Path) -> list[Path]:
    """Returns two checkpoints of one run, the earlier first."""
    folder = tmp_path / "run"
    for steps in (1, 2):
        chosen = recipe(tmp_path, "optimizer.name=adamw", f"training.steps={steps}", MEASURED[0])
        train(chosen, tmp_path / f"of-{steps}")
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / f"of-{steps}" / "recipe.toml", folder)
        shutil.copy(
            tmp_path / f"of-{steps}" / "checkpoint" / "state.pt", folder / "checkpoint" / f"{steps}.pt"
        )
    return [folder / "checkpoint" / f"{steps}.pt" for steps in (1, 2)]


def test_checkpoints_of_a_run_are_opened_and_hashed_once(kept, tmp_path, monkeypatch):
    opened = Opened(monkeypatch)
    measure_series(open_series([str(file) for file in kept], MEASURED), tmp_path / "out")
    assert [opened.files[str(file)] for file in kept] == [1, 1]
    assert sum(opened.hashed[size] for size in {file.stat().st_size for file in kept}) == 2
    origins = json.loads(attributes(tmp_path / "out")["checkpoints"])
    for step, file in zip(("1", "2"), kept, strict=True):
        assert (origins[step]["path"], origins[step]["step"]) == (str(file), int(step))
        assert origins[step]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_that_starts_from_another_opens_its_checkpoint_once(kept, monkeypatch):
    theta = torch.load(kept[0], weights_only=True)["parameters"]
    series = open_series([str(kept[0])], MEASURED)
    partition = Partition.of(series.model())
    opened = Opened(monkeypatch)
    start = load_start(str(kept[0]), partition)
    assert opened.files[str(kept[0])] == 1 and opened.hashed[kept[0].stat().st_size] == 1
    assert torch.equal(start.parameters, theta) and start.origin["step"] == 1


def test_a_run_that_goes_on_meanwhile_changes_nothing_of_what_was_opened(kept, tmp_path):
    wanted = tmp_path / "wanted"
    measure_series(open_series([str(kept[0])], MEASURED), wanted)
    series = open_series([str(kept[0])], MEASURED)
    kept[1].replace(kept[0])
    measure_series(series, tmp_path / "out")
    found, before = tables(tmp_path / "out")["cross_layer"], tables(wanted)["cross_layer"]
    assert found.step.values.tolist() == [1]
    np.testing.assert_array_equal(found.loss.values, before.loss.values)
    assert attributes(tmp_path / "out")["checkpoints"] == attributes(wanted)["checkpoints"]


def test_transformers_loads_a_checkpoint_once_and_it_is_hashed_once(tmp_path, monkeypatch):
    run, loads, hashed = tmp_path / "trained", Counter[str](), Counter[str]()
    for step in (1, 2):
        save_model(run / f"checkpoint-{step}", "gpt2", seed=step)
    save_tokenizer(run, ["<|endoftext|>"])
    load, sha256 = pretrained.Pretrained.load, pretrained._sha256
    monkeypatch.setattr(
        pretrained.Pretrained, "load", lambda self: loads.update([Path(self.name).name]) or load(self)
    )
    monkeypatch.setattr(pretrained, "_sha256", lambda f: hashed.update([f.parent.name]) or sha256(f))
    series = open_series([str(run)], MEASURED, data=str(text_file(tmp_path)), context=12)
    measure_series(series, tmp_path / "out")
    assert loads == hashed == {"checkpoint-1": 1, "checkpoint-2": 1}


def test_files_of_weights_are_read_once(tmp_path, monkeypatch):
    (tmp_path / "model_and_batch_of_mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))\n"
        "def batch():\n    x = torch.arange(24).reshape(4, 6) % 11\n    return x, x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for step in (1, 2):
        torch.save(
            torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 11)).state_dict(),
            tmp_path / f"step{step}.pt",
        )
    read, plain = Counter[str](), state_dicts.read_weights
    monkeypatch.setattr(state_dicts, "read_weights", lambda f: read.update([Path(f).name]) or plain(f))
    settings = (*MEASURED, "partition=module", "device=cpu")
    files, own = [str(tmp_path / "step*.pt")], "model_and_batch_of_mine"
    measure_series(open_series(files, settings, model=f"{own}:model", data=f"{own}:batch"), tmp_path / "out")
    assert read == {"step1.pt": 1, "step2.pt": 1}
    assert tables(tmp_path / "out")["cross_layer"].step.values.tolist() == [1, 2]
