"""Findings on groupings claim what lies beyond their errors, the largest of many only beyond more, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from hessprobe.analysis import Finding
from hessprobe.instruments.cross_layer.grouping.findings import grouping_findings
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, ranked_gains, study_groupings
from tests.instruments.cross_layer.grouping.tables import table as sketched_table

BLOCKS = ("embedding", "block.0", "block.1", "head")


def study(**changed: Any) -> GroupingStudy:
    """Returns a study of four blocks in which everything is resolved, or what is changed of it: name=(value, stderr)."""
    gains = np.array([[0, 1, 2, 3], [1, 0, 30, 4], [2, 30, 0, 5], [3, 4, 5, 0]]) / 100
    stated: dict[str, Any] = {
        "full_over_layerwise": (1.4, 0.05),
        "merge_gain": (gains, 0.002),
        "importance": (np.array([0.01, 0.2, 0.1, 0.02]), 0.01),
        "curve": (np.array([1.0, 1.3, 1.38, 1.4]), 0.01),
        "captured": (np.array([0.71, 0.93, 0.985, 1.0]), np.array([0.02, 0.01, 0.004, 0.0])),
    } | changed
    dims = {"merge_gain": ("block", "other_block"), "importance": ("block",)}
    columns: dict[str, Any] = {}
    for name, (value, stderr) in stated.items():
        value = np.asarray(value, dtype=float)
        stderr = np.broadcast_to(stderr, value.shape)
        neutral = 0.0 if name in dims else 1.0
        dim = dims.get(name, ("groups",) if value.ndim else ())
        reached = np.isfinite(value)
        columns |= {
            name: (dim, value),
            f"{name}_stderr": (dim, stderr),
            f"{name}_reached": (dim, reached),
            f"{name}_resolved": (dim, reached & (np.abs(value - neutral) > 2 * stderr)),
            f"{name}_reason": (dim, np.where(reached, "", "too small")),
        }
    members = [
        "a | b | c | d",
        "embedding | block.0 + block.1 | head",
        "embedding | block.0 + block.1 + head",
        "all",
    ]
    columns["members"] = ("groups", np.array(members, dtype=object))
    names = list(BLOCKS)
    last = xr.Dataset(
        columns, coords={"block": names, "other_block": names, "groups": [4, 3, 2, 1], "step": 8}
    )
    return GroupingStudy(
        damping=0.5, basis="64 sequences, damping 0.5", last=last, over_training=last, measured=1
    )


def said(**changed: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in grouping_findings(study(**changed))}


def test_what_is_resolved_is_stated_with_its_error():
    found = said()
    assert list(found) == ["full_over_layerwise", "best_merge", "groups_needed", "most_important_block"]
    gain = found["full_over_layerwise"]
    assert gain.resolved and gain.value == pytest.approx(0.4) and gain.stderr == 0.05
    assert (
        "At step 8, joining all layers in the preconditioner adds 40.0 ± 5.0 % to the decrease"
        in gain.sentence
    )
    pair = found["best_merge"]
    assert pair.resolved and pair.value == 0.3
    assert "joining block.0 and block.1 adds most" in pair.sentence and "30.00 ± 0.20 %" in pair.sentence
    needed = found["groups_needed"]
    assert needed.value == 0.985 and needed.stderr == 0.004
    assert "2 groups of layers (embedding | block.0 + block.1 + head)" in needed.sentence
    assert "98.50 ± 0.40 %" in needed.sentence and "layerwise 71.0 ± 2.0 % with 4" in needed.sentence
    assert "cutting block.0 off the other layers costs most" in found["most_important_block"].sentence
    assert all("damping 0.5" in each.basis for each in found.values())


def test_full_behind_layerwise_is_said_so_and_a_tie_is_no_claim():
    behind = said(full_over_layerwise=(0.8, 0.05))["full_over_layerwise"]
    assert behind.resolved and behind.value == pytest.approx(-0.2)
    assert "costs 20.0 ± 5.0 % of the decrease" in behind.sentence and behind.headline.startswith("−20.0")
    tie = said(full_over_layerwise=(1.05, 0.05))["full_over_layerwise"]
    assert not tie.resolved and "cannot be told apart" in tie.sentence


def test_the_largest_of_many_must_lie_beyond_more_than_two_errors():
    one = np.full((4, 4), 0.0)
    one[0, 1] = one[1, 0] = 0.025
    noise = said(merge_gain=(one, 0.01))["best_merge"]  # 2.5 errors, and the largest of six needs 2.7
    assert not noise.resolved and "no pair of layers adds a resolved share" in noise.sentence
    assert "the largest of 6 must lie beyond 2.7 errors" in noise.sentence
    close = np.full((4, 4), 0.29)
    shared = said(merge_gain=(close, 0.01))["best_merge"]
    assert "6 pairs of layers add most" in shared.sentence and "cannot be told apart" in shared.sentence
    layers = said(importance=([0.2, 0.19, 0.0, 0.0], 0.01))["most_important_block"]
    assert "cutting any of 2 layers off the others costs most" in layers.sentence


def test_pure_noise_is_rarely_claimed():
    rng, claimed = np.random.default_rng(0), 0
    for _ in range(400):
        noise = np.triu(rng.standard_normal((4, 4)), 1)
        claimed += said(merge_gain=(noise + noise.T, 1.0))["best_merge"].resolved
    assert claimed <= 0.05 * 400  # one-sided, so half of what two errors allow


def test_without_a_gap_no_groups_are_needed_and_with_no_shortcut_that_is_said():
    assert "groups_needed" not in said(captured=([0.97, 0.98, 0.99, 1.0], 0.02))
    assert "groups_needed" not in said(captured=([1.2, 1.1, 1.05, 1.0], [0.02, 0.02, 0.02, 0.0]))
    late = said(captured=([0.5, 0.6, 0.7, 1.0], [0.02, 0.02, 0.02, 0.0]))["groups_needed"]
    assert "no greedy grouping short of joining all layers closes nine tenths" in late.sentence


def test_what_the_sketches_do_not_reach_is_not_spoken_of():
    nan = np.full(4, np.nan)
    found = said(full_over_layerwise=(np.nan, np.nan), importance=(nan, nan), captured=(nan, nan))
    assert list(found) == ["best_merge"]
    assert grouping_findings(GroupingStudy(reason="rounds 1")) == []


def test_pairs_are_ranked_and_the_ends_can_be_taken():
    gains = ranked_gains(study())
    assert gains["gain"].values.tolist() == [0.3, 0.05, 0.04, 0.03, 0.02, 0.01]
    assert (gains["block"].values[0], gains["other_block"].values[0]) == ("block.0", "block.1")
    assert ranked_gains(study(), 2, 1)["gain"].values.tolist() == [0.3, 0.05, 0.01]


def test_a_table_is_studied_at_one_damping_and_its_last_row_is_the_last():
    table = sketched_table(3).assign(coupling=(("step", "block"), np.ones((3, 4))))
    found = study_groupings(table)
    assert found.reason == "" and found.damping in (0.5, 1.0, 2.0, 5.0, 10.0) and found.measured == 3
    assert found.over_training["step"].values.tolist() == [0, 10, 20] and int(found.last["step"]) == 20
    np.testing.assert_array_equal(
        found.over_training["importance"].values[-1], found.last["importance"].values
    )
    asked = study_groupings(table, damping=7.5)
    assert asked.damping == 7.5 and "damping 7.5" in asked.basis
    assert study_groupings(table.drop_vars("kernel")).reason.startswith(
        "this cross_layer table holds no layer"
    )
    assert "no measured row" in study_groupings(table.isel(step=[])).reason
