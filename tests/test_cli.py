"""A mistake in a call is one clear line and exit 2; nothing is written by it, and nothing that was there is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hessprobe import cli
from hessprobe.report import page
from tests.command_answers import Answer, Command, contents, refused
from tests.training.runs import attributes, parameters, state, tables, text_file, tiny

WRITE_REPORT = page.write_report


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training ends without drawing the report, which has tests of its own."""
    monkeypatch.setattr(page, "write_report", lambda run, out=None: Path(out or run / "report.html"))


@pytest.fixture
def hessprobe(tmp_path, monkeypatch, capsys) -> Command:
    """Returns the function words... -> Answer, run in a folder of its own with a small text beside it."""
    work = tmp_path / "work"
    work.mkdir()
    text_file(tmp_path)
    monkeypatch.chdir(work)

    def run(*words: str) -> Answer:
        monkeypatch.setattr("sys.argv", ["hessprobe", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        return Answer(int(end.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def small(tmp_path) -> list[str]:
    """Returns the flags of a tiny run of two steps."""
    return [*(f"--set={s}" for s in tiny(text_file(tmp_path))), "--steps=2", "--optimizer=adamw"]


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


def test_every_applies_to_probes_of_the_recipes_file_too(hessprobe, small, tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\nprobes = ["cross_layer"]\n')
    words = [word for word in small if "cross_layer.every" not in word]
    assert hessprobe("train", "../mine.toml", *words, "--every", "1").code == 0
    assert tables(Path("runs/mine"))["cross_layer"].step.values.tolist() == [0, 1]


def test_a_run_without_probes_says_so(hessprobe, small):
    assert "only the training itself is recorded" in hessprobe("train", *small).error


@pytest.mark.parametrize("verb", ["report", "show"])
def test_a_run_that_is_not_there_is_told(verb, hessprobe, monkeypatch):
    monkeypatch.setattr(page, "write_report", WRITE_REPORT)
    refused(hessprobe(verb, "runs/none"), "no run at runs/none")
    assert not any(Path.cwd().iterdir())


class TestLossThatIsNotFinite:
    """The run stops with exit 1, says at which step, and keeps what it logged."""

    @pytest.fixture
    def diverged(self, hessprobe, small) -> Answer:
        words = ["--steps=6", "--set=optimizer.learning_rate=1e30", "--probe=cross_layer"]
        return hessprobe("train", *small, *words, "--out", "runs/a")

    def test_it_stops_and_says_at_which_step(self, diverged):
        assert diverged.code == 1
        *_, last = diverged.error.splitlines()
        assert last.startswith("failed: step ") and "the loss is not finite" in last
        assert "its log is kept in runs/a" in last and "learning_rate" in last
        assert "Traceback" not in diverged.error and diverged.out == ""

    def test_its_log_is_kept_up_to_that_step(self, diverged):
        step = int(diverged.error.splitlines()[-1].split()[2].rstrip(":"))
        found = tables(Path("runs/a"))
        assert found["train"].step.values.tolist() == list(range(step + 1))
        assert torch.isfinite(torch.tensor(found["train"].loss.values[0]))

    def test_its_checkpoint_is_of_a_step_before(self, diverged):
        step = int(diverged.error.splitlines()[-1].split()[2].rstrip(":"))
        assert state(Path("runs/a"))["step"] <= step
        assert torch.isfinite(parameters(Path("runs/a"))).all()


class TestFullDisk:
    """No space left: one line, exit 2, what was recorded stays, and the run goes on once there is space."""

    @pytest.fixture
    def disk(self, tmp_path) -> Iterator[Callable[[str], Path]]:
        """Returns the function size -> a disk of that size; called again it changes the size."""
        path = tmp_path / "disk"
        path.mkdir()
        mounted = False

        def sized(size: str) -> Path:
            nonlocal mounted
            options = f"{'remount,' * mounted}size={size}"
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"needs to mount a small disk, and may not: {done.stderr.strip()}")
            mounted = True
            return path

        yield sized
        if mounted:
            subprocess.run(["umount", str(path)], check=True)

    @pytest.mark.parametrize("size", ["4k", "16k", "100k", "200k"])
    def test_it_is_one_line_and_the_run_goes_on_when_there_is_space(self, hessprobe, small, disk, size):
        folder = disk(size) / "a"
        words = [*small, "--probe=cross_layer", f"--out={folder}"]
        answer = hessprobe("train", *words)
        assert answer.code == 2 and answer.out == "", answer
        assert "Traceback" not in answer.error
        last = answer.error.splitlines()[-1]
        assert last.startswith("error: ") and "space" in last and str(folder) in last
        disk("8m")
        assert hessprobe("train", "--resume", *words).code == 0
        assert hessprobe("train", *small, "--probe=cross_layer", "--out=whole").code == 0
        assert torch.equal(parameters(folder), parameters(Path("whole")))
        assert tables(folder)["train"].step.values.tolist() == [0, 1]
        assert attributes(folder)["seed"] == 0

    def test_a_page_that_does_not_fit_loses_nothing(self, hessprobe, small, monkeypatch):
        def full(run: Path, out: Path | None = None) -> Path:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(page, "write_report", full)
        refused_at_the_end = hessprobe("train", *small, "--out", "runs/a")
        assert refused_at_the_end.code == 2
        last = refused_at_the_end.error.splitlines()[-1]
        assert "cannot write the report of runs/a (No space left on device)" in last
        assert "hessprobe report runs/a --out FILE" in last
        assert tables(Path("runs/a"))["train"].sizes["step"] == 2


def test_a_run_is_not_resumed_on_another_text(hessprobe, small, tmp_path):
    text = tmp_path / "changing.txt"
    text.write_text("one two three four five six seven " * 200)
    call = ["train", *small, f"--set=data.source={text}", "--out=run"]
    assert hessprobe(*call).code == 0
    text.write_text("another text of no less length than the one before " * 200)
    refused(hessprobe(*call, "--resume"), "is not what run was trained on", "sha256")


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


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(hessprobe, small, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hessprobe.training.loop.train", interrupted)
    answer = hessprobe("train", *small)
    assert answer.code == 130
    assert "stopped; the log and the last checkpoint are kept: go on with --resume" in answer.error


def test_a_misspelt_command_or_flag_is_told_with_the_likely_one(hessprobe):
    answer = hessprobe("trian")
    assert answer.code == 2 and "Did you mean 'train'?" in answer.error and not answer.out
    answer = hessprobe("train", "--prob", "cross_layer")
    assert answer.code == 2 and "--probe" in answer.error
