"""Traces of a row of `gn_hessian`: tr G of the batch from layer kernels, or from the probes where those refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from hessprobe.errors import RunFailed, UserError
from hessprobe.instruments.gn_hessian.measure import traces as gn_hessian_traces
from hessprobe.instruments.gn_hessian.measure.traces import COST, KernelTraces, TraceKernels
from hessprobe.instruments.gn_hessian.table import ROUNDS
from hessprobe.instruments.snapshot import Snapshot
from tests.instruments.gn_hessian.truth import case_of, probe, snapshot_of, truths
from tests.models import seeded

SEEDS = 120
MEMORY = 2**29


@cache
def measured(name: str) -> list[KernelTraces]:
    snapshot, kernels = snapshot_of(case_of(name)), TraceKernels(MEMORY)
    found = [kernels.measure(snapshot, seeded(seed)) for seed in range(SEEDS)]
    return [traces for traces in found if traces is not None]


def traces(name: str, whole: bool) -> tuple[Tensor, Tensor]:
    """Returns means and errors of a case over seeds."""
    each = [found.whole if whole else found.blocks for found in measured(name)]
    assert len(each) == SEEDS
    return torch.stack([e.mean for e in each]), torch.stack([e.stderr for e in each])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
@pytest.mark.parametrize("name", ["decoder_ragged", "layernorm", "decoder_tied", "mlp_regression"])
def test_of_g_are_the_batchs_own_with_honest_errors(name, whole):
    wanted = truths(case_of(name))["trace" if whole else "block_trace"][0]
    means, stderrs = traces(name, whole)
    there = means.std(0) > 1e-12 * means.mean(0)
    error = (means.mean(0) - wanted).abs() / (means.std(0) / SEEDS**0.5)
    assert float(error[there].max()) < 3.5
    # The variance of 120 skewed numbers is known to some 20 %.
    ratio = (stderrs.square().mean(0) / means.var(0))[there]
    assert bool((ratio > 0.5).all()) and bool((ratio < 2).all()), ratio
    # A few sequences of 4 rounds carry the error: +- 2 of it hold the truth less often than 0.95, even of normal numbers.
    covered = ((means - wanted).abs() <= 2 * stderrs).double().mean(0)[there]
    assert bool((covered > 0.78).all()), covered


def test_a_blocks_share_adds_up_to_the_whole():
    found = TraceKernels(MEMORY).measure(snapshot_of(case_of("decoder_tied")), seeded(0))
    assert found is not None
    assert float(found.blocks.mean.sum()) == pytest.approx(float(found.whole.mean))
    assert float(found.of_block(1).mean) == float(found.blocks.mean[1])


def test_sequences_that_do_not_go_together_give_the_same_quantity(monkeypatch):
    """One sequence at a time: other signs, the same truth, and the same cost."""
    snapshot = snapshot_of(case_of("decoder_ragged"))
    monkeypatch.setitem(gn_hessian_traces.TOKENS_TOGETHER, "cpu", 1)
    kernels = TraceKernels(MEMORY)
    found = [kernels.measure(snapshot, seeded(seed)) for seed in range(40)]
    means = torch.stack([k.whole.mean for k in found if k is not None])
    wanted = truths(case_of("decoder_ragged"))["trace"][0]
    assert abs(float(means.mean() - wanted)) < 3.5 * float(means.std()) / 40**0.5
    assert found[0] is not None and found[0].gradients == pytest.approx(COST)


def many(sequences: int) -> Snapshot:
    x = torch.randn(sequences, 4, generator=seeded(5), dtype=torch.float64)
    y = torch.randint(5, (sequences,), generator=seeded(6))
    return replace(snapshot_of(case_of("mlp_classifier")), batches=[(x, y)])


def test_they_steady_the_rows_traces():
    """Errors of G and H fall below those of the probes alone, on the same probes."""
    with_kernels, alone = (probe(samples=8, cg_iterations=1) for _ in range(2))
    alone._traces._refused = True
    row, without = (instrument.measure(many(64)) for instrument in (with_kernels, alone))
    assert (row["trace_rounds"], without["trace_rounds"]) == (ROUNDS, 0)
    assert float(row["trace_stderr"][0]) < 0.5 * float(without["trace_stderr"][0])
    assert row["gradient_equivalents"] - without["gradient_equivalents"] == pytest.approx(COST)
    for name in ("fro2", "gn_gap", "cosine", "block_fro2", "ritz_value"):  # what the kernels have no part in
        torch.testing.assert_close(row[name], without[name], rtol=0, atol=0, equal_nan=True)


def test_fewer_sequences_than_probes_are_left_to_the_probes():
    instrument = probe(samples=8, cg_iterations=1, sequences=7)
    assert instrument.measure(many(7))["trace_rounds"] == 0
    more = probe(samples=8, cg_iterations=1, sequences=8)
    assert more.measure(many(8))["trace_rounds"] == ROUNDS
    partition = case_of("mlp_classifier").partition
    assert more.cost(partition) - instrument.cost(partition) == pytest.approx(COST)


def test_a_loss_that_kernels_do_not_know_leaves_the_probes_alone():
    case = case_of("custom_loss")
    row = probe(samples=8, cg_iterations=3).measure(snapshot_of(case))
    assert row["trace_rounds"] == 0
    wanted = truths(case)["trace"]
    assert float(((row["trace"] - wanted) / row["trace_stderr"]).abs().max()) < 5.5  # t with 7
    assert bool(torch.as_tensor(row["block_trace"]).isfinite().all())


@pytest.mark.parametrize("error", [UserError, RuntimeError, IndexError, NotImplementedError, MemoryError])
def test_whatever_kernels_fail_by_no_row_is_lost_and_they_are_not_asked_again(error, monkeypatch):
    calls = []

    def refuse(*args: object, **options: object) -> None:
        calls.append(args)
        raise error("not with this model")

    monkeypatch.setattr(gn_hessian_traces, "layer_kernels", refuse)
    instrument, snapshot = probe(cg_iterations=1), snapshot_of(case_of("mlp_classifier"))
    rows = [instrument.measure(snapshot) for _ in range(2)]
    assert [row["trace_rounds"] for row in rows] == [0, 0] and len(calls) == 1
    foreseen = instrument.cost(snapshot.partition) - COST
    assert rows[0]["gradient_equivalents"] == pytest.approx(foreseen, abs=4 / 3)


def test_a_lost_process_is_not_passed_over(monkeypatch):
    def lost(*args: object, **options: object) -> None:
        raise RunFailed("process 1 is gone")

    monkeypatch.setattr(gn_hessian_traces, "layer_kernels", lost)
    with pytest.raises(RunFailed):
        TraceKernels(MEMORY).measure(snapshot_of(case_of("mlp_classifier")), seeded(0))


def test_the_plan_is_verified_once(monkeypatch):
    calls, real = [], gn_hessian_traces.verified_plan
    monkeypatch.setattr(gn_hessian_traces, "verified_plan", lambda *a: calls.append(a) or real(*a))
    instrument, snapshot = probe(cg_iterations=1), snapshot_of(case_of("layernorm"))
    first, second = (instrument.measure(snapshot) for _ in range(2))
    assert len(calls) == 1
    torch.testing.assert_close(first["trace"], second["trace"], rtol=0, atol=0)
