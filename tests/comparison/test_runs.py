"""What cannot be compared is refused or set aside with its reason, and what limits a comparison is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from hessprobe.comparison.compared import compare
from hessprobe.comparison.findings import comparison_findings
from hessprobe.errors import UserError
from hessprobe.store.writer import RunWriter
from tests.comparison.study_runs import falling, write_losses
from tests.report.runs import write_run


@pytest.mark.parametrize("target", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_target_must_be_a_loss(tmp_path, target):
    with pytest.raises(UserError, match=r"--target .*: a held-out loss in nats per token is wanted, above 0"):
        compare([tmp_path], target)


def test_no_run_is_one_clear_line(tmp_path):
    (tmp_path / "hollow" / "deeper").mkdir(parents=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"no run at .*none: there is no such folder"):
        compare([tmp_path / "none"])
    with pytest.raises(UserError, match=r"no run at .*file: it is not a folder"):
        compare([tmp_path / "file"])
    with pytest.raises(
        UserError, match=r"no run at .*hollow: neither it nor a folder below it holds a log.zarr"
    ):
        compare([tmp_path / "hollow"])


def test_runs_on_other_text_or_other_held_out_windows_are_refused(tmp_path):
    write_losses(tmp_path / "a", [2.0])
    other = write_losses(tmp_path / "b", [2.0], sha256="cd34")
    with pytest.raises(
        UserError, match=r"losses of a and b are not comparable.*sha256 \"ab12\" against \"cd34\""
    ):
        compare([tmp_path])
    shutil.rmtree(other)
    recipe = {
        "optimizer": {"name": "adamw"},
        "data": {"held_out_fraction": 0.05, "held_out_sequences": 64},
        "seed": 0,
    }
    write_losses(tmp_path / "c", [2.0], recipe=recipe)
    with pytest.raises(UserError, match="held_out_sequences 256 against 64"):
        compare([tmp_path])
    shutil.rmtree(tmp_path / "c")
    recipe["data"]["held_out_sequences"] = 256
    write_losses(tmp_path / "d", [2.0], recipe=recipe | {"model": {"context": 32}})
    with pytest.raises(UserError, match="model.context not recorded against 32"):
        compare([tmp_path])


def test_where_the_text_was_not_recorded_that_is_said(tmp_path):
    write_losses(tmp_path / "a", [2.0], data=None, recipe={"seed": 0, "optimizer": {"name": "adamw"}})
    assert "comparable is not checked" in compare([tmp_path]).cautions[0]


def test_warm_ups_that_others_start_from_are_left_out(tmp_path):
    study = tmp_path / "study"
    for seed in range(2):
        warm = write_losses(study / "warm-up" / f"seed-{seed}", [6.0], method="adamw", seed=seed)
        write_losses(study / "a" / f"seed-{seed}", [3.0, 2.0], seed=seed, training={"start_from": str(warm)})
    left_out = {f"warm-up/seed-{seed}": "others started from it" for seed in range(2)}
    assert compare([study]).left_out == left_out
    moved = study.rename(tmp_path / "moved")  # start_from names the old place
    assert compare([moved]).left_out == left_out
    named = compare([moved, moved / "warm-up" / "seed-0"])
    assert sorted(named.runs["run"].values) == ["a/seed-0", "a/seed-1", "warm-up/seed-0"]
    alone = compare([moved / "warm-up"])
    assert alone.runs.sizes["run"] == 2 and alone.left_out == {}


def test_a_checkpoint_file_names_its_run(tmp_path):
    warm = write_losses(tmp_path / "runs" / "warm", [3.0], method="adamw")
    start = {"start_from": str(warm / "checkpoint" / "state.pt")}
    write_losses(tmp_path / "runs" / "a", [2.0], training=start)
    assert compare([tmp_path]).left_out == {"warm": "others started from it"}


def test_a_repeat_of_a_recipe_and_seed_is_no_further_seed(tmp_path):
    write_losses(tmp_path / "nano", falling(5, 9))
    write_losses(tmp_path / "nano-2", falling(5, 9))
    found = compare([tmp_path], 2.0)
    assert found.left_out == {"nano-2": "the recipe and seed of nano"}
    assert found.groups["seeds"].values.tolist() == [1]


def test_runs_without_a_step_are_left_out(tmp_path):
    write_losses(tmp_path / "a", [3.0, 2.0])
    write_run(tmp_path / "empty", steps=None, train_steps=0)
    RunWriter.create(tmp_path / "bare", {}).close()
    found = compare([tmp_path])
    assert found.left_out == dict.fromkeys(("bare", "empty"), "it holds no training step yet")
    with pytest.raises(UserError, match="nothing to compare: empty: it holds no training step yet"):
        compare([tmp_path / "empty"])


def test_a_run_that_diverged_did_not_reach_the_target_and_is_part_of_its_sweep(tmp_path):
    nan = float("nan")
    write_losses(tmp_path / "a", [3.0, 2.0], learning_rate=0.1)
    write_losses(tmp_path / "b", [3.0, 2.5], learning_rate=0.01)
    write_losses(tmp_path / "c", [nan, nan], learning_rate=1.0)
    found = compare([tmp_path])
    assert found.target == 2.5
    assert found.target_basis == "the loss that every run but 1 without a finite one reached, the lowest of b"
    best = found.groups.isel(group=found.groups["best"].values.tolist().index(True))
    assert float(best["learning_rate"]) == 0.1 and int(best["rates"]) == 3 and str(best["edge"].values) == ""
    row = found.runs.sel(run="c")
    assert not row["reached"] and np.isnan(row["to_target"].values).all() and int(row["recorded"]) == 2
    assert np.isinf(row["lowest_loss"])
    with pytest.raises(UserError, match="no run has a finite held-out loss yet"):
        compare([tmp_path / "c"])
    (finding,) = comparison_findings(compare([tmp_path / "c"], 2.0))
    assert "has not reached" in finding.sentence and "its lowest was not finite" in finding.sentence


def damage(run: Path) -> None:
    chunk = next(p for p in (run / "log.zarr" / "train" / "held_out_loss" / "c").rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:5])


def test_a_run_that_cannot_be_read_stops_only_a_comparison_that_names_it(tmp_path):
    write_losses(tmp_path / "a", [3.0, 2.0])
    torn = write_losses(tmp_path / "torn", [3.0, 2.0], seed=1)
    newer = write_losses(tmp_path / "newer", [3.0, 2.0], seed=2)
    damage(torn)
    root = json.loads((newer / "log.zarr" / "zarr.json").read_text())
    root["attributes"]["schema_version"] = 99
    (newer / "log.zarr" / "zarr.json").write_text(json.dumps(root))
    found = compare([tmp_path])
    assert found.runs["run"].values.tolist() == ["a"]
    assert "damaged" in found.left_out["torn"] and "schema version 99" in found.left_out["newer"]
    with pytest.raises(UserError, match="table 'train' is damaged"):
        compare([tmp_path / "a", torn])
    with pytest.raises(UserError, match="Update hessprobe"):
        compare([newer])


def said(tmp_path: Path, target: float | None = 2.0) -> str:
    return "\n".join(compare([tmp_path], target).cautions)


def test_nothing_limits_runs_that_differ_only_in_method(tmp_path):
    write_losses(tmp_path / "a", falling(5, 9))
    write_losses(tmp_path / "b", falling(5, 9), method="adamw")
    assert said(tmp_path) == ""


def test_other_devices_minibatches_models_and_starts_are_said(tmp_path):
    write_losses(tmp_path / "a", falling(5, 9), device="cpu")
    write_losses(tmp_path / "b", falling(5, 9), device="cuda", sequences=8, training={"start_from": "runs/x"})
    text = said(tmp_path)
    assert "different devices: cpu; cuda" in text
    assert "Minibatches differ (4, 8 sequences)" in text
    assert "do not all start from the same point: from scratch, runs/x" in text
    recipe = {"seed": 0, "optimizer": {"name": "soap"}, "model": {"size": "45M"},
              "data": {"held_out_fraction": 0.05, "held_out_sequences": 256}}  # fmt: skip
    write_losses(tmp_path / "c", [3.0, 1.9], recipe=recipe)
    assert "different models: they differ in model.size" in said(tmp_path)


def test_each_seeds_own_warm_up_is_one_start(tmp_path):
    for seed in (0, 1):
        write_losses(
            tmp_path / f"{seed}", falling(5, 9), seed=seed, training={"start_from": f"x/warm-up/seed-{seed}"}
        )
    found = compare([tmp_path], 2.0)
    assert found.cautions == () and found.groups["seeds"].values.tolist() == [2]


def test_a_run_that_stopped_above_the_target_says_nothing_of_its_method(tmp_path):
    write_losses(tmp_path / "a", falling(5, 9))
    write_losses(tmp_path / "b", [3.0, 2.4], method="adamw", training={"stop_at": 2.5, "steps": 9})
    assert "1 run (b) stopped at a loss above this target (training.stop_at)" in said(tmp_path)
    assert "cut off" not in said(tmp_path)


def test_a_run_that_is_not_done_is_said_to_be_so(tmp_path):
    write_losses(tmp_path / "a", [3.0, 2.4], training={"steps": 9, "stop_at": 2.0})
    assert "1 run (a) took fewer steps than the recipe asks for" in said(tmp_path)


def test_a_target_reached_at_once_and_sparse_evaluations_are_said(tmp_path):
    write_losses(tmp_path / "a", [1.9, 1.8])
    assert "1 run (a) reached the target by the first evaluation" in said(tmp_path)
    write_losses(tmp_path / "b", [3.0, np.nan, np.nan, 1.9], seed=1)
    assert "up to 2 too many" in said(tmp_path)
