"""Steps to a loss: every number recomputed from the stored logs; what was not reached has none; seeds, sweeps, batches."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from hessprobe.comparison.compared import MEASURES, Comparison, compare
from tests.comparison.study_runs import CONTEXT, falling, write_losses, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("runs") / "study")


@pytest.fixture(scope="module")
def compared(study: Path) -> Comparison:
    return compare([study], 2.0)


def group(comparison: Comparison, method: str, **wanted: float) -> xr.Dataset:
    """Returns a method's group at its best learning rate, or the one with the values wanted."""
    groups = comparison.groups
    keep = (groups["method"] == method) & (groups["best"] | bool(wanted))
    for name, value in wanted.items():
        keep &= groups[name] == value
    assert int(keep.sum()) == 1
    return groups.isel(group=int(np.flatnonzero(keep)[0]))


def at(group: xr.Dataset, name: str, measure: str = "steps") -> float:
    return float(group[name].sel(measure=measure))


def test_every_run_needs_what_its_log_says(study, compared):
    found = 0
    for run in compared.runs["run"].values:
        log = xr.open_zarr(study / str(run) / "log.zarr", group="train", consolidated=False).load()
        row = compared.runs.sel(run=run)
        below = [i for i, loss in enumerate(log["held_out_loss"].values) if loss <= 2.0]
        assert bool(row["reached"]) == bool(below)
        assert float(row["lowest_loss"]) == log["held_out_loss"].values.min()
        if not below:
            assert np.isnan(row["to_target"].values).all()
            continue
        i = below[0]
        expected = {
            "steps": i + 1,
            "tokens": log["tokens"].values[i],
            "tokens_with_line_search": log["tokens"].values[i] + log["line_search_tokens"].values[i],
            "seconds": log["seconds"].values[i],
            "gradient_equivalents": log["gradient_equivalents"].values[i],
        }
        assert dict(zip(MEASURES, row["to_target"].values, strict=True)) == expected
        found += 1
    assert found == 17 and compared.runs.sizes["run"] == 19


def test_means_and_spread_over_seeds(compared):
    counts = {"full_gn": [10, 11, 12], "layerwise_gn": [13, 14, 16]}
    for method, steps in counts.items():
        one = group(compared, method)
        assert int(one["seeds"]) == int(one["reached"]) == 3
        assert at(one, "mean") == pytest.approx(np.mean(steps))
        assert at(one, "stderr") == pytest.approx(stats.sem(steps))
        assert (at(one, "least"), at(one, "most")) == (min(steps), max(steps))
        tokens = np.array(steps) * 8 * 4 * CONTEXT
        assert at(one, "mean", "tokens") == pytest.approx(tokens.mean())
        assert at(one, "mean", "tokens_with_line_search") == pytest.approx(1.5 * tokens.mean())
        assert at(one, "stderr", "seconds") == pytest.approx(2 * stats.sem(steps))
        assert float(one["tokens_per_step"]) == 8 * 4 * CONTEXT


def test_a_seed_that_did_not_get_there_leaves_no_mean_and_no_ratio(compared):
    soap = group(compared, "soap")
    assert (int(soap["reached"]), int(soap["seeds"]), int(soap["recorded_most"])) == (2, 3, 60)
    for name in ("mean", "stderr", "least", "most", "ratio", "ratio_low", "ratio_high"):
        assert np.isnan(soap[name].values).all(), name


def rounding(*counts: list[int]) -> float:
    """Returns the error of a mean log-ratio that counting whole steps implies: uniform within the last step."""
    return np.sqrt(sum(np.mean([1 / (12 * n**2) for n in steps]) / len(steps) for steps in counts))


def test_ratios_to_full_gauss_newton_are_of_logarithms_paired_by_seed(compared):
    assert str(compared.groups["label"].values[compared.reference]) == "full GN"
    full = [10, 11, 12]
    for steps, one in (
        ([13, 14, 16], group(compared, "layerwise_gn")),
        ([40, 44, 45], group(compared, "adamw", tokens_per_step=8 * 4 * CONTEXT, best=True)),
    ):
        logs = np.log(np.array(steps) / full)
        error = max(stats.sem(logs), rounding(steps, full))
        reach = stats.t.ppf(0.975, 2) * error
        assert at(one, "ratio") == pytest.approx(np.exp(logs.mean()))
        assert at(one, "ratio_stderr") == pytest.approx(np.exp(logs.mean()) * error)
        assert at(one, "ratio_low") == pytest.approx(np.exp(logs.mean() - reach), rel=1e-4)
        assert at(one, "ratio_high") == pytest.approx(np.exp(logs.mean() + reach), rel=1e-4)
        assert at(one, "ratio", "tokens") == pytest.approx(np.exp(logs.mean()))
        assert bool(one["paired"]) and int(one["freedom"]) == 2
    assert np.isnan(compared.groups["ratio"].values[compared.reference]).all()
    double = group(compared, "adamw", tokens_per_step=16 * 4 * CONTEXT, best=True)
    expected = np.exp(np.log(np.array([39, 43, 46]) * 16 / (np.array(full) * 8 * 3)).mean())
    assert at(double, "ratio", "gradient_equivalents") == pytest.approx(expected)


def test_sweeps_mark_the_best_rate_and_the_edge_of_the_grid(compared):
    full = group(compared, "full_gn")
    assert (float(full["learning_rate"]), int(full["rates"]), str(full["edge"].values)) == (0.02, 3, "")
    adamw = group(compared, "adamw", tokens_per_step=8 * 4 * CONTEXT, best=True)
    assert (float(adamw["learning_rate"]), str(adamw["edge"].values)) == (0.03, "largest")
    failed = group(compared, "adamw", learning_rate=0.01)
    assert int(failed["reached"]) == 0 and not failed["best"] and np.isnan(at(failed, "mean"))
    double = group(compared, "adamw", tokens_per_step=16 * 4 * CONTEXT, best=True)
    assert str(double["edge"].values) == "smallest"
    assert str(group(compared, "soap")["edge"].values) == "" and int(group(compared, "soap")["rates"]) == 1


def test_rates_are_judged_on_the_seeds_they_share(tmp_path):
    """Two unlucky further seeds must not make the rate that won the sweep lose to one that ran a single seed."""
    for seed, steps in enumerate((10, 14, 15)):
        write_losses(tmp_path / f"a-{seed}", falling(steps, 20), learning_rate=0.02, seed=seed)
    write_losses(tmp_path / "b", falling(12, 20), learning_rate=0.04)
    write_losses(tmp_path / "c", falling(10, 20), learning_rate=0.01)  # a tie: the rate with more seeds
    best = group(compare([tmp_path], 2.0), "full_gn")
    assert float(best["learning_rate"]) == 0.02 and at(best, "mean") == pytest.approx(13)


def test_where_no_rate_got_there_the_best_has_the_lowest_loss(tmp_path):
    for rate, lowest in ((0.01, 2.6), (0.02, 2.4), (0.04, 2.5)):
        write_losses(tmp_path / f"{rate}", [3.0, lowest], learning_rate=rate)
    best = group(compare([tmp_path], 2.0), "full_gn")
    assert (
        float(best["learning_rate"]) == 0.02 and str(best["edge"].values) == "" and int(best["reached"]) == 0
    )


def test_a_rate_left_to_its_default_is_at_no_edge(tmp_path):
    write_losses(tmp_path / "default", falling(5, 9), learning_rate=None)
    write_losses(tmp_path / "given", falling(7, 9), learning_rate=0.3)
    best = group(compare([tmp_path], 2.0), "full_gn")
    assert np.isnan(best["learning_rate"]) and int(best["rates"]) == 2 and str(best["edge"].values) == ""


def test_batches_of_one_method_are_compared_at_their_best_rates(compared):
    assert compared.batches.sizes["pair"] == 1
    pair = compared.batches.isel(pair=0)
    small, large = (compared.groups.sel(group=int(pair[key])) for key in ("small", "large"))
    assert (
        float(large["tokens_per_step"]) == 2 * float(small["tokens_per_step"])
        and float(pair["batch_ratio"]) == 2
    )
    logs = np.log(np.array([39, 43, 46]) / [40, 44, 45])
    assert float(pair["ratio"]) == pytest.approx(np.exp(logs.mean()))
    error = max(stats.sem(logs), rounding([39, 43, 46], [40, 44, 45]))
    assert float(pair["ratio_stderr"]) == pytest.approx(np.exp(logs.mean()) * error)


def test_batches_pair_only_where_all_else_is_equal_but_the_length(tmp_path):
    for name, minibatches, more in (
        ("a", 8, {}),
        ("b", 16, {"training": {"steps": 10}}),
        ("c", 32, {}),
        ("d", 64, {"optimizer": {"clip": 2.0}}),
    ):
        write_losses(tmp_path / name, falling(4, 20), method="adamw", minibatches=minibatches, **more)
    found = compare([tmp_path], 2.0)
    batch = found.groups["tokens_per_step"].values // (4 * CONTEXT)
    pairs = found.batches[["small", "large"]].to_dataframe().values.tolist()
    assert [[batch[a], batch[b]] for a, b in pairs] == [[8, 16], [16, 32]]


class TestReached:
    """The first evaluated step at or below the target, counted from the run's first row."""

    def one(self, tmp_path: Path, losses: list[float], target: float = 2.0, **more: int) -> xr.Dataset:
        write_losses(tmp_path / "run", losses, **more)
        return compare([tmp_path], target).runs.isel(run=0)

    def test_exactly_the_target_is_reached(self, tmp_path):
        assert float(self.one(tmp_path, [3.0, 2.0, 1.0])["to_target"][0]) == 2

    def test_just_above_is_not(self, tmp_path):
        run = self.one(tmp_path, [3.0, 2.0 + 1e-12])
        assert not run["reached"] and np.isnan(run["to_target"].values).all() and int(run["recorded"]) == 2

    def test_a_later_rise_changes_nothing(self, tmp_path):
        assert float(self.one(tmp_path, [3.0, 1.9, 2.5, 1.0])["to_target"][0]) == 2

    def test_steps_that_were_not_evaluated_count_but_cannot_reach_it(self, tmp_path):
        run = self.one(tmp_path, [3.0, np.nan, np.nan, 1.9, np.nan])
        assert (
            float(run["to_target"][0]) == 4
            and int(run["evaluated_within"]) == 3
            and int(run["recorded"]) == 5
        )

    def test_steps_count_from_the_runs_first_row(self, tmp_path):
        assert float(self.one(tmp_path, [3.0, 1.9], first_step=7)["to_target"][0]) == 2


def test_the_default_target_is_what_every_run_reached(tmp_path):
    write_losses(tmp_path / "a", [3.0, 1.5, 1.8])
    write_losses(tmp_path / "b", [3.0, 2.5, np.nan, 2.7], seed=1)
    found = compare([tmp_path])
    assert found.target == 2.5 and bool(found.runs["reached"].all())
    assert found.target_basis == "the loss that every run reached, the lowest of b"
    assert compare([tmp_path], 2.4).target_basis == "as given"


def test_a_single_run_is_fine(tmp_path):
    found = compare([write_losses(tmp_path / "only", [3.0, 2.5])])
    assert found.target == 2.5 and found.runs["run"].values.tolist() == ["only"] and found.reference == 0
    assert np.isnan(at(group(found, "full_gn"), "stderr")) and at(group(found, "full_gn"), "mean") == 2


def test_the_reference_is_the_full_gauss_newton_with_the_fewest_steps(tmp_path):
    write_losses(tmp_path / "a", falling(9, 12))
    write_losses(tmp_path / "b", falling(6, 12), minibatches=16)
    write_losses(tmp_path / "c", falling(20, 12), minibatches=32)
    found = compare([tmp_path], 2.0)
    assert str(found.groups["label"].values[found.reference]) == "full GN at 4,096 tokens a step"
    assert compare([tmp_path / "c"], 2.0).reference is None


def test_labels_say_what_sets_variants_of_a_method_apart(tmp_path):
    write_losses(tmp_path / "a", [2.0], optimizer={"inner_solver": "cg"})
    write_losses(tmp_path / "b", [2.0], optimizer={"inner_solver": "muon"})
    write_losses(tmp_path / "c", [2.0], method="soap")
    write_losses(tmp_path / "d", [2.0], method="prox_linear", optimizer={"structure": "layerwise"})
    write_losses(tmp_path / "e", [2.0], method="something_new")
    assert sorted(compare([tmp_path]).groups["label"].values) == [
        "SOAP", "full GN, inner_solver cg", "full GN, inner_solver muon", "layerwise prox-linear GN", "something_new",
    ]  # fmt: skip


def test_what_is_only_looked_at_does_not_split_a_group(tmp_path):
    more = {"evaluate_every": 2, "threads": 1, "checkpoint_every": 5, "stop_at": 1.0}
    write_losses(tmp_path / "a", [3.0, 2.0])
    write_losses(tmp_path / "b", [3.0, 2.0], seed=1, training=more, device="other")
    assert compare([tmp_path]).groups.sizes["group"] == 1


def test_runs_without_a_recipe_are_methods_of_their_own(tmp_path):
    for name in ("mine", "yours"):
        write_losses(tmp_path / name, [3.0, 2.0], recipe={}, seed=None)
    found = compare([tmp_path])
    assert sorted(found.groups["label"].values) == ["mine", "yours"] and found.groups[
        "seeds"
    ].values.tolist() == [1, 1]


def test_a_folder_is_searched_at_any_depth_and_a_run_counts_once(study, monkeypatch):
    nested = study / "full-gn" / "learning_rate-0.02"
    found = compare([study / "full-gn", nested, nested / "seed-0", nested / "seed-0" / "log.zarr"], 2.0)
    assert found.runs["run"].values.tolist() == [
        "learning_rate-0.01/seed-0", "learning_rate-0.02/seed-0", "learning_rate-0.02/seed-1",
        "learning_rate-0.02/seed-2", "learning_rate-0.04/seed-0",
    ]  # fmt: skip
    monkeypatch.chdir(study.parent)
    assert compare([Path(os.curdir)], 2.0).runs.sizes["run"] == 19
