"""The Python of every README runs as it stands, and the figures at the head of the first are the shipped run's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import matplotlib
import pytest
import torch

import hessprobe as hp
from tests.contracts.readmes import NAMES, READMES, ROOT, blocks
from tests.models import decoder, seeded

# Trainer's and Lightning's need a model of theirs; tests/integrations trains with both callbacks.
ELSEWHERE = "hessprobe.integrations"
# The first two of the README itself: test_readme_commands runs them on a run that was made by its command.
EXAMPLES = [
    pytest.param(block, id=f"{name}-{i}")
    for path, name in zip(READMES, NAMES, strict=True)
    for i, block in enumerate(blocks(path, "python"))
    if ELSEWHERE not in block and (name != "README.md" or i > 1)
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    (tmp_path / "data").symlink_to(ROOT / "data")
    model = decoder(seeded(0)).model.float()
    generator = seeded(1)
    batches = [
        (torch.randint(7, (4, 5), generator=generator), torch.randint(7, (4, 5), generator=generator))
    ] * 2
    optimizer = torch.optim.AdamW(model.parameters())

    def train_step(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        optimizer.step()

    names = {
        "hp": hp, "torch": torch, "model": model, "optimizer": optimizer, "train_step": train_step, "loader": batches,
        "inputs": batches[0][0], "targets": batches[0][1], "minibatches": batches, "fresh_minibatches": batches,
    }  # fmt: skip
    exec(compile(example, "README.md", "exec"), names)
    if "print(" in example:
        assert capsys.readouterr().out
    if "Recorder(" in example:
        row = hp.open_run(tmp_path / "runs/mine")["cross_layer"].isel(step=0)
        assert row["failure"].item() == "" and row["coupling"].notnull().all()


def test_the_figures_at_the_head_are_findings_of_the_shipped_run(tmp_path):
    run = tmp_path / "sample_run"
    shutil.copytree(ROOT / "data/sample_run", run, ignore=shutil.ignore_patterns("findings.json"))
    command = [sys.executable, "-m", "hessprobe", "report", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    findings = json.loads((run / "findings.json").read_text(encoding="utf-8"))["findings"]
    sentences = " ".join(finding["sentence"] for finding in findings)
    head = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Two commands")[0]
    figures = re.findall(r"\d[\d.]* ± [\d.]*\d(?: %)?", head)
    assert len(figures) >= 5
    assert [figure for figure in figures if figure not in sentences] == []
