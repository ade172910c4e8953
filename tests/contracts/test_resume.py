"""A run that was cut off anywhere and resumed ends as if it had never been: weights, optimizer, rows, bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from hessprobe.recipe import OPTIMIZERS, Recipe
from hessprobe.text.hub_corpus import HubCorpus
from hessprobe.training import loop
from hessprobe.training.loop import train
from tests.text.hub_files import Files, corpus, documents
from tests.training.runs import assert_same_rows, recipe, state, tables

STEPS, WARMUP = 5, 2
SETTINGS = (f"training.steps={STEPS}", f"optimizer.warmup_steps={WARMUP}", 'probes=["cross_layer"]')


class CutOffError(Exception):
    """What ends a run in these tests."""


def cut_off_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next run die right after the row of `step` is recorded, before its checkpoint."""
    record = loop.Run._record

    def record_and_die(self: loop.Run, at: int, *rest) -> None:
        record(self, at, *rest)
        if at == step:
            raise CutOffError

    monkeypatch.setattr(loop.Run, "_record", record_and_die)


def cut_off_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next run die before `step`, right after the checkpoint of the step before it is saved."""
    save = loop.save_checkpoint

    def save_and_die(*words, **named) -> None:
        save(*words, **named)
        if named["step"] == step:
            raise CutOffError

    monkeypatch.setattr(loop, "save_checkpoint", save_and_die)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    """Returns the function settings -> folder of a run nothing interrupted, made once."""

    @cache
    def of(*settings: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        train(recipe(folder, *SETTINGS, *settings), folder)
        return folder

    return of


def resumed(folder: Path, cut, at: int, *settings: str) -> Path:
    """Returns the folder of a run that was cut off once, and resumed."""
    wanted = recipe(folder, *SETTINGS, *settings)
    with pytest.MonkeyPatch.context() as monkeypatch:
        cut(at, monkeypatch)
        with pytest.raises(CutOffError):
            train(wanted, folder)
    train(wanted, folder, resume=True)
    return folder


def assert_same(folder: Path, other: Path, steps: int = STEPS) -> None:
    one, two = state(folder), state(other)
    assert torch.equal(one["parameters"], two["parameters"])
    torch.testing.assert_close(one["optimizer"], two["optimizer"], rtol=0, atol=0)
    assert one["step"] == two["step"] == steps
    for count in ("tokens", "line_search_tokens", "gradient_equivalents"):
        assert one["totals"][count] == two["totals"][count]
    assert_same_rows(folder, other)


@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize("optimizer", ["full_gn", "adamw"])
def test_cut_off_between_two_steps(tmp_path, uninterrupted, optimizer, step):
    """Step 2 is the first after the warm-up: its optimizer starts afresh in both."""
    setting = f"optimizer.name={optimizer}"
    assert_same(resumed(tmp_path / "run", cut_off_before, step, setting), uninterrupted(setting))


OTHERS = {
    **{name: (f"optimizer.name={name}",) for name in OPTIMIZERS if name not in ("full_gn", "adamw")},
    "layerwise prox_linear": ("optimizer.name=prox_linear", "optimizer.structure=layerwise"),
    "conjugate gradients": ("optimizer.inner_solver=cg", "optimizer.cg_iterations=4", "optimizer.damping=0.1"),
    "layerwise conjugate gradients": (
        "optimizer.name=layerwise_gn", "optimizer.inner_solver=cg", "optimizer.cg_iterations=3",
    ),
    "inner soap": ("optimizer.inner_solver=soap", "optimizer.inner_steps=3"),
    "curvature refreshed every third step": ("optimizer.name=kfac", "optimizer.refresh=3"),
    "sophia refreshed every second step": ("optimizer.name=sophia", "optimizer.refresh=2"),
    "a rising learning rate": ("optimizer.name=soap", "optimizer.learning_rate_warmup=3", "optimizer.refresh=2"),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", OTHERS)
def test_every_other_optimizer_cut_off_between_two_steps(tmp_path, uninterrupted, optimizer):
    """After two steps of its own, before a third."""
    settings = (*OTHERS[optimizer], "probes=[]", "training.steps=4", "optimizer.warmup_steps=1")
    assert_same(resumed(tmp_path / "run", cut_off_before, 3, *settings), uninterrupted(*settings), steps=4)


def test_a_run_that_started_from_another_and_a_stream_cut_off(tmp_path, monkeypatch):
    """Weights and place in the data come from the first run; the second goes on reading behind it."""
    opened = []

    def streamed(recipe: Recipe) -> HubCorpus:
        held_out = Files(documents(1, 20, first=150))
        found = corpus(9, 12, validation=held_out)
        found.context, found.vocabulary = 8, 256
        found.fingerprint = {**found.fingerprint, "sha256": "of a stream"}
        opened.append(found)
        return found

    monkeypatch.setattr(loop, "open_corpus", streamed)
    short = ("optimizer.name=full_gn", "probes=[]", "training.steps=4", "optimizer.warmup_steps=1")
    first = tmp_path / "first"
    train(recipe(first, *short), first)
    settings = (*short, f"training.start_from={first}")
    whole = tmp_path / "whole"
    train(recipe(whole, *settings), whole)
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patched:
        cut_off_before(2, patched)
        with pytest.raises(CutOffError):
            train(recipe(cut, *settings), cut)
    train(recipe(cut, *settings), cut, resume=True)
    assert torch.equal(state(cut)["parameters"], state(whole)["parameters"])
    assert state(cut)["data"] == state(whole)["data"]
    assert_same_rows(cut, whole)
    trained = [[text for text in found.tokenizer.seen if int(text.split()[0]) < 150] for found in opened]
    assert trained[0][0] != trained[1][0]  # behind what the first run read, which is not tokenized again
    assert trained[1][0] != trained[3][0]


@pytest.mark.parametrize("step", [0, WARMUP - 1, STEPS - 1])
def test_cut_off_between_a_row_and_its_checkpoint(tmp_path, uninterrupted, step):
    setting = "optimizer.name=full_gn"
    assert_same(resumed(tmp_path / "run", cut_off_after, step, setting), uninterrupted(setting))


@pytest.mark.parametrize("step", [1, 4])
def test_cut_off_steps_after_the_last_checkpoint(tmp_path, uninterrupted, step):
    settings = ("optimizer.name=full_gn", "training.checkpoint_every=3")
    assert_same(resumed(tmp_path / "run", cut_off_after, step, *settings), uninterrupted(*settings))


def test_a_cold_started_and_an_adamw_solved_inner_problem_resume_too(tmp_path, uninterrupted):
    settings = (
        "optimizer.warm_start=false",
        "optimizer.inner_solver=adamw",
        "optimizer.schedule=inner-cosine",
    )
    assert_same(resumed(tmp_path / "run", cut_off_before, 3, *settings), uninterrupted(*settings))


def test_a_finished_run_resumes_to_itself(tmp_path):
    folder = tmp_path / "run"
    wanted = recipe(folder, "training.steps=2", "optimizer.name=adamw")
    train(wanted, folder)
    before, rows = state(folder), tables(folder)["train"]
    train(wanted, folder, resume=True)
    assert torch.equal(before["parameters"], state(folder)["parameters"])
    assert tables(folder)["train"].identical(rows)
