"""Findings of a comparison: a difference beyond the 95 % interval, or it is said that there is none to claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hessprobe.comparison.compared import compare
from hessprobe.comparison.findings import comparison_findings, reading_order
from hessprobe.comparison.reference_study import reference_study
from hessprobe.reading.finding import Finding
from tests.comparison.study_runs import falling, write_losses, write_study

LENGTH = {"steps": 60}


def said(path: Path, target: float | None = 2.0) -> dict[str, Finding]:
    return {finding.name: finding for finding in comparison_findings(compare([path], target))}


def seeds(path: Path, steps: list[int], **more) -> None:
    for seed, count in enumerate(steps):
        write_losses(path / f"seed-{seed}", falling(count), seed=seed, training=LENGTH, **more)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    return said(write_study(tmp_path_factory.mktemp("runs") / "study"))


def test_the_reference_states_its_steps_and_its_tokens(found):
    reference = found["steps_reference"]
    assert reference.sentence == (
        "full GN reaches a held-out loss of 2 nats per token in 11.00 ± 0.58 steps, reading 33,792 tokens, line search "
        "included."
    )
    assert reference.value == 11 and reference.stderr == pytest.approx(1 / np.sqrt(3))
    assert reference.basis == "3 seeds, learning rate 0.02 (best of 3 rates), 2,048 tokens a step"


def test_a_resolved_ratio_is_stated_with_error_cost_and_the_studys(found):
    ratio = found["steps_ratio.layerwise GN"]
    value = np.exp(np.log([13 / 10, 14 / 11, 16 / 12]).mean())
    assert ratio.resolved and ratio.value == pytest.approx(value)
    assert ratio.sentence.startswith(
        f"layerwise GN needs {value:.3f} ± {ratio.stderr:.3f} times as many steps as full GN to reach 2 nats per token "
        "(14.33 ± 0.88 against 11.00 ± 0.58), at 1.302"
    )
    assert "mean log-ratio, paired by seed, 95 % interval" in ratio.basis
    assert "Student's t with 2 degrees of freedom" in ratio.basis
    assert ratio.basis.endswith("Abreu et al. 2025, 150M: 1.44 times")


def test_a_ratio_within_its_error_is_not_claimed(tmp_path):
    seeds(tmp_path / "full", [10, 14, 12])
    seeds(tmp_path / "layerwise", [12, 13, 15], method="layerwise_gn")
    ratio = said(tmp_path)["steps_ratio.layerwise GN"]
    assert (
        not ratio.resolved and "that are not told apart" in ratio.sentence and "needs 1" not in ratio.sentence
    )


def test_one_seed_claims_no_difference(tmp_path):
    seeds(tmp_path / "full", [10])
    seeds(tmp_path / "adamw", [50], method="adamw")
    ratio = said(tmp_path)["steps_ratio.AdamW"]
    assert not ratio.resolved and ratio.stderr is None and ratio.value == pytest.approx(5)
    assert (
        "took 5 times as many steps as full GN" in ratio.sentence and "with no error known" in ratio.sentence
    )
    assert "no difference is claimed" in ratio.basis


def test_what_was_not_reached_is_never_a_number(found, tmp_path):
    soap = found["steps.SOAP"]
    assert soap.sentence == (
        "SOAP reached a held-out loss of 2 nats per token with 2 of 3 seeds, so there is no mean and no ratio."
    )
    assert np.isnan(soap.value) and soap.stderr is None
    seeds(tmp_path / "full", [5])
    write_losses(tmp_path / "a", [3.0, 2.5, 2.25], method="adamw", training=LENGTH)
    write_losses(tmp_path / "b", [3.0, 2.75], method="adamw", seed=1, training=LENGTH)
    adamw = said(tmp_path)["steps.AdamW"]
    assert adamw.sentence == (
        "AdamW has not reached a held-out loss of 2 nats per token in 2 to 3 steps; its lowest was 2.5, the mean over "
        "seeds."
    )
    assert np.isnan(adamw.value)


def test_without_a_reference_it_is_said_why(tmp_path):
    seeds(tmp_path / "adamw", [5, 6], method="adamw")
    found = said(tmp_path)
    assert list(found) == ["steps.AdamW"]
    assert found["steps.AdamW"].sentence.endswith(
        "5.50 ± 0.50 steps; no full_gn run is among them to compare with."
    )
    write_losses(tmp_path / "full", [3.0, 2.5])
    found = said(tmp_path)
    assert "full GN did not reach it with every seed" in found["steps.AdamW"].sentence
    assert "not reached" in found["steps.full GN"].sentence


def test_a_sweep_that_ends_too_early_is_said(found):
    edges = {name: finding for name, finding in found.items() if name.startswith("edge.")}
    assert sorted(edges) == ["edge.AdamW at 2,048 tokens a step", "edge.AdamW at 4,096 tokens a step"]
    assert edges["edge.AdamW at 2,048 tokens a step"].sentence == (
        "The best learning rate of AdamW at 2,048 tokens a step, 0.03, is the largest tried: a larger one may do better."
    )
    assert "smallest tried: a smaller one" in edges["edge.AdamW at 4,096 tokens a step"].sentence


def test_doubling_a_batch(found, tmp_path):
    batch = found["batch.AdamW.2,048"]
    assert batch.sentence.startswith(
        "Doubling AdamW's batch from 2,048 to 4,096 tokens changes steps to 2 nats per token from 43.0 ± 1.5 to "
        "42.7 ± 2.0, 0.991 ±"
    )
    assert "no resolved change; a batch that pays in full gives 0.5" in batch.sentence and not batch.resolved
    seeds(tmp_path / "one", [40, 41, 42], method="adamw")
    seeds(tmp_path / "four", [20, 21, 22], method="adamw", minibatches=32)
    gain = said(tmp_path)["batch.AdamW.2,048"]
    assert gain.sentence.startswith("Multiplying by 4 AdamW's batch from 2,048 to 8,192 tokens")
    assert "(fewer; a batch that pays in full gives 0.25)" in gain.sentence and gain.resolved
    write_losses(tmp_path / "four" / "seed-3", [3.0], method="adamw", minibatches=32, seed=3, training=LENGTH)
    unjudged = said(tmp_path)["batch.AdamW.2,048"].sentence
    assert "cannot be judged" in unjudged and "with the one, 3 of 4 reached with the other" in unjudged


def test_methods_are_read_from_the_fewest_steps_to_those_that_failed(found, tmp_path):
    names = [name.split(".", 1)[-1] for name in found if name.startswith("steps")]
    assert [name.split(" at ")[0] for name in names] == [
        "steps_reference",
        "layerwise GN",
        "AdamW",
        "AdamW",
        "SOAP",
    ]
    write_losses(tmp_path / "a", [3.0, 2.5])
    write_losses(tmp_path / "b", [3.0, 2.4], method="adamw")
    write_losses(tmp_path / "c", [3.0, 2.0], method="soap")
    groups = compare([tmp_path], 2.0).groups
    assert groups["method"].values[reading_order(groups)].tolist() == ["soap", "adamw", "full_gn"]


def test_the_reference_studys_numbers_are_those_it_reports():
    steps = {
        row.method: (row.batch_tokens, row.steps, row.ratio_to_full_gn)
        for row in reference_study("steps_to_loss")
    }
    assert {row.validation_loss for row in reference_study("steps_to_loss")} == {3.25}
    np.testing.assert_equal(
        steps,
        {"full_gn": (240e6, 54, 1), "layerwise_gn": (120e6, 78, 1.44), "soap": (240e6, 292, 5.4),
         "muon": (40e6, np.nan, 16)},
    )  # fmt: skip
    for batch, count, ratio in steps.values():
        assert batch and (np.isnan(count) or ratio == pytest.approx(count / 54, rel=5e-3))
    critical = {row.method: row.batch_tokens for row in reference_study("critical_batch")}
    assert critical == {"adamw": 4e6, "soap": 12e6, "muon": 12e6, "full_gn": 40e6}
