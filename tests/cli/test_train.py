"""`hessprobe train`: a mistake is one line and writes nothing; many runs lie in folders of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import contents, refused
from tests.training.runs import attributes, tables

pytestmark = pytest.mark.usefixtures("no_page")

MISTAKES = {
    "unknown probe": (["--probe", "crosslayer"], ["no probe named 'crosslayer'", "Valid: cross_layer"]),
    "unknown optimizer": (
        ["--optimizer", "sgd"],
        ["no optimizer named 'sgd'", "Valid: full_gn, layerwise_gn"],
    ),
    "unknown recipe key": (["--set", "optimizer.rate=1"], ["named 'rate'", "Valid: name, minibatches"]),
    "unknown recipe": (["tiny"], ["no recipe named 'tiny'", "nano"]),
    "no recipe file": (["a/b.toml"], ["no recipe file at a/b.toml", "nano"]),
    "no steps": (["--steps", "0"], ["--steps 0: a run needs at least 1 step"]),
    "no steps in the recipe": (
        ["--set", "training.steps=0"],
        ["training.steps = 0", "greater than or equal to 1"],
    ),
    "no step between rows": (["--every", "0"], ["--every 0: at least 1 step between rows"]),
    "no seeds": (["--seeds", "0"], ["--seeds 0: at least 1 seed"]),
    "a batch that does not divide": (["--set", "optimizer.batch=7"], ["batch = 7 does not divide", "6 or 8"]),
    "an optimizer that is not": (
        ["--optimizer", "prox_linear", "--set", "optimizer.inner_solver=cg"],
        ["there is no prox_linear with inner_solver cg", "there are full_gn"],
    ),
    "no step size to try": (
        ["--set", "optimizer.line_search_grid=0"],
        ["line search needs at least 1 step size"],
    ),
    "no run to start from": (
        ["--set", "training.start_from=../none"],
        ["training.start_from = '../none'", "give a run's folder"],
    ),
    "a stream without a tokenizer": (["--set", "data.source=hub:a/b"], ["needs a data.tokenizer", "t5-base"]),
    "a seed below 0": (["--seed", "-1"], ["seed = -1"]),
    "unknown device": (["--device", "gpu"], ["--device gpu", "auto, cpu"]),
    "no such corpus": (["--set", "data.source=nowhere.txt"], ["no corpus at 'nowhere.txt'", "stdlib"]),
    "an empty corpus": (["--set", "data.source=../empty.txt"], ["empty.txt is empty"]),
    "an empty folder": (["--set", "data.source=../hollow"], ["no text in folder ../hollow"]),
    "a corpus shorter than a sequence": (
        ["--set", "data.source=../short.txt"],
        ["short.txt", "one sequence needs 9"],
    ),
    "a model that cannot be": (["--set", "model.heads=3"], ["heads must split width 8"]),
    "a setting without a value": (["--set", "seed"], ["--set seed: wanted key=value"]),
    "a file in the folder's place": (["--out", "../text.txt"], ["cannot write a run to ../text.txt"]),
    "nothing to resume": (["--resume"], ["--resume: no run of nano under runs/", "--out"]),
    "nothing to resume there": (["--resume", "--out", "runs/a"], ["--resume: runs/a holds no run"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake, hessprobe, small, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    before = contents(tmp_path)
    words, parts = MISTAKES[mistake]
    refused(hessprobe("train", *small, *words), *parts)
    assert contents(tmp_path) == before
    assert not any(Path.cwd().iterdir())


def test_every_applies_to_probes_of_the_recipes_file_too(hessprobe, small, tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\nprobes = ["cross_layer"]\n')
    words = [word for word in small if "cross_layer.every" not in word]
    assert hessprobe("train", "../mine.toml", *words, "--every", "1").code == 0
    assert tables(Path("runs/mine"))["cross_layer"].step.values.tolist() == [0, 1]


def test_a_run_without_probes_says_so(hessprobe, small):
    assert "only the training itself is recorded" in hessprobe("train", *small).error


def test_a_vocabulary_smaller_than_the_texts_leaves_no_run_behind(hessprobe, small):
    refused(
        hessprobe("train", *small, "--set=model.vocabulary=100", "--out=run"), "outside the vocabulary of 100"
    )
    assert not Path("run").exists()


class TestManyRuns:
    """--seeds and a recipe with a study make runs in folders of their own, and end by naming what compares them."""

    @pytest.fixture
    def study(self, tmp_path) -> str:
        path = tmp_path / "little.toml"
        path.write_text(
            'name = "little"\n[training]\nsteps = 1\n[study]\ntarget_loss = 1.0\nseeds = 1\nwarm_up_steps = 1\n'
            '[[study.variants]]\nname = "adamw"\nlearning_rates = [0.01]\n', encoding="utf-8"
        )  # fmt: skip
        return "../little.toml"

    def test_seeds(self, hessprobe, small):
        answer = hessprobe("train", *small, "--seeds", "2", "--seed", "3", "--out", "runs/a")
        assert answer.code == 0, answer.error
        assert answer.out.splitlines() == ["runs     runs/a", "next     hessprobe compare runs/a"]
        assert [attributes(Path("runs/a") / f"seed-{seed}")["seed"] for seed in (3, 4)] == [3, 4]
        assert "2 of 2  seed 4" in answer.error
        refused(
            hessprobe("train", *small, "--seeds", "2", "--out", "runs/a"), "holds runs already", "--resume"
        )
        again = hessprobe("train", *small, "--seeds", "2", "--seed", "3", "--out", "runs/a", "--resume")
        assert again.code == 0 and again.error.count("before: ") == 2

    def test_without_out_the_next_name_is_taken(self, hessprobe, small):
        for name in ("nano", "nano-2"):
            assert f"runs     runs/{name}" in hessprobe("train", *small, "--seeds", "1").out
        assert hessprobe("train", *small).out.splitlines()[-1].endswith("runs/nano-3")

    def test_a_study_and_its_resumption(self, hessprobe, small, study):
        answer = hessprobe("train", study, *small, "--out", "s")
        assert answer.code == 0, answer.error
        first, *rest = answer.out.splitlines()
        name, end = first.split(maxsplit=1)
        assert name == "adamw" and end.startswith(
            "learning rate 0.01: target not reached in 2 steps, held-out loss"
        )
        assert rest == ["runs     s", "next     hessprobe compare s"]
        assert Path("s/adamw/learning_rate-0.01/seed-0/log.zarr").is_dir()
        assert Path("s/warm-up/seed-0/log.zarr").is_dir()
        again = hessprobe("train", "--resume", "--out", "s")  # its own recipe lies in its folder
        assert again.code == 0 and again.error.count("before: ") == 2
        more = hessprobe("train", study, *small, "--out", "s", "--seeds", "2", "--resume")
        assert more.code == 0 and Path("s/adamw/learning_rate-0.01/seed-1").is_dir()

    def test_a_mistake_in_a_variant_is_told_before_anything_runs(self, hessprobe, small, tmp_path, study):
        path = tmp_path / "little.toml"
        path.write_text(path.read_text() + 'settings = { "optimizer.rate" = 1 }\n')
        refused(hessprobe("train", study, *small), "study variant 'adamw'", "named 'rate'")
        assert not any(Path.cwd().iterdir())

    def test_a_run_that_diverges_is_exit_1(self, hessprobe, small):
        words = ["--steps=3", "--set=optimizer.learning_rate=1e30", "--seeds=1"]
        answer = hessprobe("train", *small, *words)
        assert answer.code == 1 and "1 of 1 runs diverged" in answer.error.splitlines()[-1]


def test_a_dry_run_prints_the_plan_and_makes_nothing(hessprobe, small):
    answer = hessprobe("train", *small, "--dry-run")
    assert answer.code == 0 and answer.error == ""
    assert "block.0" in answer.out and "optimizer adamw, learning rate" in answer.out
    assert not any(Path.cwd().iterdir())
    refused(hessprobe("train", *small, "--dry-run", "--optimizer", "sgd"), "no optimizer named 'sgd'")
