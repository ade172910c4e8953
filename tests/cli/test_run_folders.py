"""No run is written over, and --resume goes on with a run under its own recipe alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.commands import contents, refused
from tests.training.runs import parameters

pytestmark = pytest.mark.usefixtures("no_page")


def test_a_folder_with_a_run_is_not_written_over(hessprobe, small):
    assert hessprobe("train", *small, "--out", "runs/a").code == 0
    before = contents(Path("runs"))
    refused(
        hessprobe("train", *small, "--out", "runs/a"),
        "runs/a holds a run already",
        "--resume",
        "another name",
    )
    assert contents(Path("runs")) == before


def test_without_out_a_second_run_takes_the_next_name(hessprobe, small):
    for name in ("nano", "nano-2", "nano-3"):
        answer = hessprobe("train", *small)
        assert answer.code == 0
        assert answer.out.splitlines()[-1].split() == ["next", "hessprobe", "show", f"runs/{name}"]


class TestResume:
    """--resume goes on with a run under its own recipe, and with no other."""

    @pytest.fixture
    def run(self, hessprobe, small) -> Path:
        assert hessprobe("train", *small, "--out", "runs/a", "--seed", "3").code == 0
        return Path("runs/a")

    @pytest.mark.parametrize(
        "words", [[], ["--seed", "3"], ["--steps", "2", "--optimizer", "adamw"]], ids=str
    )
    def test_nothing_or_the_same_need_be_said_again(self, hessprobe, run, words):
        theta = parameters(run)
        answer = hessprobe("train", "--resume", "--out", "runs/a", *words)
        assert answer.code == 0 and "runs/a at step 2" in answer.error
        assert torch.equal(parameters(run), theta)

    @pytest.mark.parametrize(
        ("words", "difference"),
        [
            (["--seed", "4"], "seed: 3 -> 4"),
            (["--steps", "3"], "training.steps: 2 -> 3"),
            (["--probe", "cross_layer"], "probes: () -> ('cross_layer',)"),
            (["--set", "optimizer.learning_rate=0.5"], "optimizer.learning_rate: None -> 0.5"),
            (["--every", "9"], "cross_layer.every: 2 -> 9"),
        ],
    )
    def test_another_recipe_is_told_by_its_differences(self, hessprobe, run, words, difference):
        before = contents(run)
        refused(
            hessprobe("train", "--resume", "--out", "runs/a", *words), "runs/a", difference, "another --out"
        )
        assert contents(run) == before

    def test_the_newest_run_is_taken_where_none_is_named(self, hessprobe, small, run):
        hessprobe("train", *small, "--seed", "7")
        assert "runs/nano at step 2" in hessprobe("train", "--resume").error

    def test_a_recipe_file_cut_off_by_a_kill_is_not_needed(self, hessprobe, run):
        wanted = (run / "recipe.toml").read_text()
        (run / "recipe.toml").unlink()
        assert hessprobe("train", "--resume", "--out", "runs/a").code == 0
        assert (run / "recipe.toml").read_text() == wanted


def test_a_run_is_not_resumed_on_another_text(hessprobe, small, tmp_path):
    text = tmp_path / "changing.txt"
    text.write_text("one two three four five six seven " * 200)
    call = ["train", *small, f"--set=data.source={text}", "--out=run"]
    assert hessprobe(*call).code == 0
    text.write_text("another text of no less length than the one before " * 200)
    refused(hessprobe(*call, "--resume"), "is not what run was trained on", "sha256")
