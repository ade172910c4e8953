"""A study is ordinary runs in folders: from one warm-up, a sweep, the best rate at the other seeds; it resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hessprobe.comparison.compared import compare
from hessprobe.errors import RunFailed, UserError
from hessprobe.recipe import Recipe, build_recipe
from hessprobe.training import study as study_module
from hessprobe.training.ending import Diverged, RunEnd
from hessprobe.training.study import run_seeds, run_study
from tests.training.runs import attributes, parameters, state, tables, text_file, tiny


def study_recipe(folder: Path, *settings: str, **study) -> Recipe:
    """Returns a tiny study: AdamW at three rates, one of which diverges, and full Gauss-Newton."""
    values = {
        "name": "little",
        "optimizer": {"schedule": "constant", "line_search_grid": 2},
        "training": {"steps": 4},
        "study": {
            "target_loss": 5.55,
            "seeds": 2,
            "warm_up_steps": 1,
            "variants": [
                {
                    "name": "adamw",
                    "learning_rates": [0.001, 0.05, 1e30],
                    "settings": {"optimizer.name": "adamw"},
                },
                {"name": "full_gn", "learning_rates": [0.02], "settings": {"training.steps": 3}},
            ],
            **study,
        },
    }
    return build_recipe(values, [*tiny(text_file(folder)), *settings])


FOLDERS = {
    "warm-up/seed-0", "warm-up/seed-1", "adamw/learning_rate-0.001/seed-0", "adamw/learning_rate-0.05/seed-0",
    "adamw/learning_rate-1e+30/seed-0", "adamw/learning_rate-0.05/seed-1", "full_gn/learning_rate-0.02/seed-0",
    "full_gn/learning_rate-0.02/seed-1",
}  # fmt: skip


def runs_in(out: Path) -> set[str]:
    return {log.parent.relative_to(out).as_posix() for log in out.rglob("log.zarr")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a finished study."""
    folder = tmp_path_factory.mktemp("study")
    run_study(study_recipe(folder), folder / "out")
    return folder / "out"


def test_every_run_has_a_folder_and_the_best_rate_goes_to_the_other_seeds(done):
    assert runs_in(done) == FOLDERS
    sweep = {rate: state(done / f"adamw/learning_rate-{rate}/seed-0") for rate in ("0.001", "0.05")}
    assert sweep["0.05"]["held_out_loss"] < sweep["0.001"]["held_out_loss"]
    for folder in FOLDERS:
        chosen = build_recipe(json.loads(attributes(done / folder)["recipe"]))
        assert chosen.study is None and f"seed-{chosen.seed}" == Path(folder).name


def test_every_variant_starts_from_its_seeds_warm_up(done):
    for folder in FOLDERS:
        if folder.startswith("warm-up"):
            assert tables(done / folder)["train"].step.values.tolist() == [0]
            continue
        found, seed = attributes(done / folder), Path(folder).name
        origin = json.loads(found["start_from"])
        assert origin["path"] == str(done / "warm-up" / seed)
        chosen = build_recipe(json.loads(found["recipe"]))
        assert (chosen.training.start_from, chosen.optimizer.warmup_steps) == (origin["path"], 0)
        assert chosen.training.stop_at == 5.55
    assert not torch.equal(parameters(done / "warm-up/seed-0"), parameters(done / "warm-up/seed-1"))


def test_a_run_that_diverged_keeps_its_log_and_the_sweep_goes_on(done):
    table = tables(done / "adamw/learning_rate-1e+30/seed-0")["train"]
    assert table.outcome.values[-1].startswith("diverged") or not torch.isfinite(
        torch.tensor(table.held_out_loss.values[-1])
    )


def test_what_it_says_is_which_run_of_how_many_and_how_it_ended(tmp_path, capsys):
    ends = run_study(study_recipe(tmp_path, seeds=1), tmp_path / "out")
    said = capsys.readouterr().err
    numbered = re.findall(r"^run +(\d+) of (\d+)  (.*)$", said, re.MULTILINE)
    assert [(int(i), int(n)) for i, n, _ in numbered] == [(i, 5) for i in range(1, 6)]
    assert numbered[0][2] == "warm-up seed 0" and numbered[2][2] == "adamw learning_rate 0.05 seed 0"
    assert "failed" in said and "the loss is not finite" in said
    assert [end.name for end in ends] == ["adamw", "full_gn"]
    assert ends[0].learning_rate == 0.05 and list(ends[0].ends) == [0]
    assert str(ends[0]).startswith("learning rate 0.05: target ")


def test_a_study_that_was_cut_off_goes_on_and_leaves_finished_runs_alone(tmp_path, done, monkeypatch, capsys):
    out, wanted = tmp_path / "out", study_recipe(tmp_path)
    real, made = study_module.train, []

    def dies(recipe, folder, *, resume=False, processes):
        if len(made) == 4:  # in the second run of the sweep
            with monkeypatch.context() as patched:
                patched.setattr(
                    "hessprobe.training.loop.Run._save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
                )
                real(recipe, folder, resume=resume, processes=processes)
        made.append(folder)
        return real(recipe, folder, resume=resume, processes=processes)

    with monkeypatch.context() as patched:
        patched.setattr(study_module, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            run_study(wanted, out)
    before = {folder: (out / folder / "checkpoint/state.pt").stat().st_mtime_ns for folder in
              ("warm-up/seed-0", "warm-up/seed-1", "adamw/learning_rate-0.001/seed-0")}  # fmt: skip
    capsys.readouterr()
    run_study(wanted, out, resume=True)
    assert "before: target not reached in 4 steps" in capsys.readouterr().err
    assert runs_in(out) == FOLDERS
    for folder, time in before.items():
        assert (out / folder / "checkpoint/state.pt").stat().st_mtime_ns == time
    for folder in FOLDERS:
        if "1e+30" not in folder:
            assert torch.equal(parameters(out / folder), parameters(done / folder)), folder


def test_it_is_what_compare_opens(done):
    compared = compare([done])
    assert compared is not None


def test_another_recipe_in_a_folder_is_told(done, tmp_path):
    with pytest.raises(UserError, match="holds runs already: go on with them by --resume"):
        run_study(study_recipe(tmp_path), done)
    with pytest.raises(
        UserError, match="warm-up/seed-0 was made with another recipe; .*optimizer.warmup_learning_rate"
    ):
        run_study(study_recipe(tmp_path, f"data.source={text_file(done.parent)}", "optimizer.warmup_learning_rate=0.1"),
                  done, resume=True)  # fmt: skip


def test_a_file_in_the_folders_place_is_told(tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match="cannot write runs to .*out"):
        run_study(study_recipe(tmp_path), tmp_path / "out")


def ended(steps: int, loss: float, target: float | None = 1.0) -> RunEnd:
    return RunEnd(steps=steps, held_out_loss=loss, target=target)


@pytest.mark.parametrize(
    ("sweep", "best"),
    [
        ({0.1: ended(9, 0.9), 0.2: ended(7, 0.99), 0.3: ended(8, 0.5)}, 0.2),  # fewest steps
        ({0.1: ended(7, 0.9), 0.2: ended(7, 0.8), 0.3: None}, 0.2),  # ties by loss
        ({0.1: ended(50, 1.2), 0.2: ended(50, 1.1), 0.3: ended(49, 0.9)}, 0.3),  # never reached sorts last
        ({0.1: ended(50, 1.2), 0.2: ended(50, 1.1), 0.3: None}, 0.2),
        ({0.1: None, 0.2: ended(50, float("nan")), 0.3: ended(50, 9.9)}, 0.3),
    ],
)
def test_the_best_rate_of_a_sweep(tmp_path, monkeypatch, sweep, best):
    def train(recipe, folder, *, resume=False, processes):
        end = sweep[recipe.optimizer.learning_rate]
        if end is None:
            raise Diverged("step 0: the loss is not finite")
        return end

    monkeypatch.setattr(study_module, "train", train)
    variant = {"name": "a", "learning_rates": list(sweep), "settings": {}}
    wanted = study_recipe(tmp_path, variants=[variant], warm_up_steps=0, target_loss=1.0)
    (found,) = run_study(wanted, tmp_path / "out")
    assert found.learning_rate == best
    assert found.ends == {0: sweep[best], 1: sweep[best]}


def test_where_every_rate_diverges_no_other_seed_is_run(tmp_path, monkeypatch, capsys):
    def train(recipe, folder, *, resume=False, processes):
        raise Diverged("step 0: the loss is not finite")

    monkeypatch.setattr(study_module, "train", train)
    variant = {"name": "a", "learning_rates": [0.1, 0.2]}
    (found,) = run_study(study_recipe(tmp_path, variants=[variant], warm_up_steps=0), tmp_path / "out")
    assert (found.ends, str(found)) == ({}, "diverged at every learning rate")
    assert "run         2 of 3" in capsys.readouterr().err
    with pytest.raises(RunFailed, match="the warm-up in .*seed-0 diverged"):
        run_study(study_recipe(tmp_path), tmp_path / "other")


def test_a_rate_at_the_edge_of_its_sweep_is_pointed_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        study_module,
        "train",
        lambda recipe, folder, *, resume=False, processes: ended(3, recipe.optimizer.learning_rate),
    )
    variants = [
        {"name": "low", "learning_rates": [0.1, 0.2]},
        {"name": "single", "learning_rates": [0.1]},
    ]
    run_study(study_recipe(tmp_path, variants=variants, warm_up_steps=0), tmp_path / "out")
    said = capsys.readouterr().err
    assert said.count("a better one may lie beyond") == 1 and "(the lowest swept" in said


class TestSeeds:
    """One recipe at several seeds."""

    def test_they_are_runs_at_consecutive_seeds(self, tmp_path):
        out = tmp_path / "out"
        base = build_recipe(
            {}, [*tiny(text_file(tmp_path)), "optimizer.name=adamw", "training.steps=1", "seed=4"]
        )
        folders = run_seeds(base, out, 3)
        assert [f.relative_to(out).as_posix() for f in folders] == ["seed-4", "seed-5", "seed-6"]
        assert [attributes(f)["seed"] for f in folders] == [4, 5, 6]
        thetas = [parameters(f) for f in folders]
        assert not torch.equal(thetas[0], thetas[1]) and not torch.equal(thetas[1], thetas[2])
        assert run_seeds(base, out, 4, resume=True)[3].name == "seed-7"
        with pytest.raises(UserError, match="holds runs already"):
            run_seeds(base, out, 3)

    def test_one_that_diverges_does_not_keep_the_others_from_being_made(self, tmp_path):
        out = tmp_path / "out"
        settings = ["optimizer.name=adamw", "training.steps=3", "optimizer.learning_rate=1e30"]
        base = build_recipe({}, [*tiny(text_file(tmp_path)), *settings])
        with pytest.raises(RunFailed, match="2 of 2 runs diverged: .*seed-0, .*seed-1; their logs are kept"):
            run_seeds(base, out, 2)
        assert runs_in(out) == {"seed-0", "seed-1"}
