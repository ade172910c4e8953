"""Every number of the table `cross_layer` is the dense truth's: exact ones to rounding, estimates by z-score."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.grouping.sketches import sketches_of
from hessprobe.instruments.cross_layer.measure import probe as cross_layer
from hessprobe.instruments.cross_layer.measure.probe import DIRECTIONS, CrossLayerProbe
from hessprobe.instruments.snapshot import Row, Snapshot
from hessprobe.kernels import layer_kernels as layer_kernels_module
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.measuring.row_recorder import ProbeRecorder
from hessprobe.recipe import CrossLayerRecipe
from hessprobe.store.writer import RunWriter
from tests import oracles
from tests.cases import SEED, Case
from tests.models import ZOO, labels, seeded

SEEDS = 16
METHODS = ("kernels", "products")
EXACT = ("decoder", "decoder_ragged", "decoder_tied", "decoder_swiglu_layernorm", "mlp_regression")


def snapshot_of(case: Case, seed: int = 0) -> Snapshot:
    return Snapshot(
        step=3, objective=case.objective, partition=case.partition, seed=seed,
        parameters=case.partition.vector(case.problem.model), batches=list(case.problem.batches),
        update=0.1 * case.rows(1, seed=9)[0],
    )  # fmt: skip


def probe(case: Case, method: str = "products", **options: Any) -> CrossLayerProbe:
    sequences = sum(len(inputs) for inputs, _ in case.problem.batches)
    # Zoo problems of two sequences are too few for a spread over sequences; the other method does not mind.
    return CrossLayerProbe(
        CrossLayerRecipe(method=method, sequences=max(3, sequences), **{"samples": 2, **options})  # type: ignore[arg-type]
    )


@cache
def sequences() -> Case:
    """Returns a decoder with a tied head on six sequences of one length, in two micro-batches."""
    problem = ZOO["decoder_tied"](seeded(SEED))
    g = seeded(2)
    batches = [(torch.randint(11, (n, 4), generator=g), labels(g, 11, n, 4)) for n in (4, 2)]
    return Case.on(problem._replace(batches=batches), "layer")


@cache
def measured(method: str, quantity: str) -> list[Row]:
    """Returns the case's rows at many seeds."""
    options = {"rounds": 2, "quantity": quantity} if method == "kernels" else {"samples": 12}
    return [probe(sequences(), method, **options).measure(snapshot_of(sequences(), s)) for s in range(SEEDS)]


@cache
def by_sequence() -> Tensor:
    """Returns the Gauss-Newton matrix of every sequence alone, (b, p, p)."""
    case = sequences()
    singles = [(x[None], y[None]) for batch in case.problem.batches for x, y in zip(*batch, strict=True)]
    found = [oracles.dense(case.problem.model, [one], "cross_entropy") for one in singles]
    return torch.stack([truth.in_order(case.partition.names).gauss_newton for truth in found])


def true_fro2(quantity: str) -> Tensor:
    """Returns ||G_ij||_F^2 of the batch, or of the population as pairs of different sequences tell it."""
    case, each = sequences(), by_sequence()
    batch = oracles.block_fro2(case.truth.gauss_newton, case.slices)
    if quantity == "batch":
        return batch
    own = torch.stack([oracles.block_fro2(one, case.slices) for one in each]).sum(0)
    count = len(each)
    return (count**2 * batch - own) / (count * (count - 1))


def along(case: Case, direction: Tensor) -> Tensor:
    """Returns d_i . G_ij d_j for all pairs of blocks, dense."""
    g = case.truth.gauss_newton
    rows = [[direction[i] @ g[i, j] @ direction[j] for j in case.slices] for i in case.slices]
    return torch.stack([torch.stack(row) for row in rows])


def blockwise(case: Case, products: Tensor) -> Tensor:
    return torch.stack([products[where].sum() for where in case.slices])


def z_scores(found: Tensor, wanted: Tensor) -> Tensor:
    """Returns (mean - wanted) / standard error over the first dimension; what never varies has to be equal."""
    error, stderr = found.mean(0) - wanted, found.std(0) / len(found) ** 0.5
    exact = stderr < 1e-12
    assert bool((error[exact].abs() < 1e-9).all())
    return (error / stderr)[~exact]


@pytest.mark.parametrize("name", EXACT)
def test_curvature_and_slope_along_both_directions_are_exact(name, zoo_case):
    case = zoo_case(name)
    snapshot = snapshot_of(case)
    row = probe(case).measure(snapshot)
    update, gradient = snapshot.update, case.truth.gradient
    assert update is not None
    for i, direction in enumerate((update, -gradient)):
        assert oracles.relative_error(row["step_curvature"][i], along(case, direction)) < 1e-9
        slope = blockwise(case, gradient * direction)
        assert oracles.relative_error(row["step_slope"][i], slope) < 1e-9
        # The blocks make up the whole: d.Gd and g.d.
        whole = direction @ case.truth.gauss_newton @ direction
        assert float(row["step_curvature"][i].sum()) == pytest.approx(float(whole), rel=1e-9)
    assert oracles.relative_error(row["gradient_norm2"], blockwise(case, gradient.square())) < 1e-9
    assert float(row["loss"]) == pytest.approx(float(case.truth.loss), rel=1e-12)
    assert row["tokens"] == case.truth.tokens
    assert row["symmetry_gap"] < 1e-12
    assert DIRECTIONS == ("update", "negative_gradient")


@pytest.mark.parametrize(
    ("method", "quantity"), [("products", "batch"), ("kernels", "population"), ("kernels", "batch")]
)
def test_block_norms_are_unbiased(method, quantity):
    found = torch.stack([row["fro2"] for row in measured(method, quantity)])
    assert float(z_scores(found, true_fro2(quantity)).abs().max()) < 3.5


def test_intervals_of_block_norms_are_students_on_the_logarithm():
    """Those of products; kernels' intervals, and how often they hold the truth: tests/kernels."""
    for row in measured("products", "batch"):
        low, high = row["fro2_low"], row["fro2_high"]
        torch.testing.assert_close((low * high).sqrt(), row["fro2"])
        half = stats.t.ppf(0.975, 11) * row["fro2_stderr"] / row["fro2"]
        torch.testing.assert_close((high / low).log(), 2 * half)
    for row in measured("kernels", "batch"):
        assert bool((row["fro2_low"] < row["fro2"]).all() and (row["fro2"] < row["fro2_high"]).all())


@pytest.mark.parametrize("matrix", ["hessian", "residual"])
def test_block_norms_of_the_hessian_and_of_the_residual_are_unbiased_too(matrix, zoo_case):
    case = zoo_case("mlp_regression")
    instrument = probe(
        case, "kernels", matrix=matrix, samples=8
    )  # no kernels of these: products all the same
    found = torch.stack([instrument.measure(snapshot_of(case, seed))["fro2"] for seed in range(SEEDS)])
    wanted = oracles.block_fro2(getattr(case.truth, matrix), case.slices)
    assert float(z_scores(found, wanted).abs().max()) < 3.5


@pytest.mark.parametrize(("matrix", "kind"), [("gauss_newton", GaussNewton), ("hessian", Hessian)])
def test_the_symmetry_gap_is_that_of_the_matrix_measured(matrix, kind, zoo_case, monkeypatch):
    checked = []
    monkeypatch.setattr(cross_layer, "symmetry_gap", lambda operator, generator: checked.append(operator))
    case = zoo_case("mlp_regression")
    probe(case, matrix=matrix).measure(snapshot_of(case))
    assert [type(operator) for operator in checked] == [kind]


@pytest.mark.parametrize("name", ["coupling", "off_block_energy"])
def test_ratios_of_block_norms_are_unbiased(name):
    fro2 = true_fro2("batch")
    diagonal = fro2.diagonal()
    wanted = {
        "coupling": oracles.coupling(sequences().truth.gauss_newton, sequences().slices),
        "off_block_energy": 1 - diagonal.sum() / fro2.sum(),
    }
    found = torch.stack([row[name] for row in measured("products", "batch")])
    assert float(z_scores(found, wanted[name]).abs().max()) < 3.5


@pytest.mark.parametrize("name", ["fro2", "coupling", "off_block_energy"])
def test_standard_errors_are_the_spread_over_seeds(name):
    rows = measured("products", "batch")
    spread = torch.stack([row[name] for row in rows]).std(0)
    claimed = torch.stack([row[f"{name}_stderr"] for row in rows]).square().mean(0).sqrt()
    varies = spread > 1e-12
    ratio = (claimed / spread)[varies]
    # A spread over 16 seeds is itself known to 18 %; kurtosis widens that.
    assert float(ratio.min()) > 0.6 and float(ratio.max()) < 1.7
    assert bool((claimed[~varies] < 1e-12).all())


def test_kernels_hold_the_trace_and_alignments_the_curvature_along_directions():
    case, rows = sequences(), measured("kernels", "population")
    traces = [case.truth.gauss_newton[where, where].trace() for where in case.slices]
    found = torch.stack([torch.diagonal(row["kernel"], dim1=1, dim2=2).mean(1) for row in rows])
    assert float(z_scores(found, torch.stack(traces)).abs().max()) < 3.5
    update = snapshot_of(case).update
    assert update is not None
    for i, direction in enumerate((update, -case.truth.gradient)):
        curvature = along(case, direction).diagonal()
        squares = torch.stack([row["alignment"][i].square().mean(1) for row in rows])
        assert float(z_scores(squares, curvature).abs().max()) < 3.5


@pytest.mark.parametrize("method", METHODS)
def test_a_block_couples_with_itself_fully_and_pairs_are_symmetric(method):
    for row in measured(method, "population" if method == "kernels" else "batch")[:5]:
        torch.testing.assert_close(row["fro2"], row["fro2"].mT)
        torch.testing.assert_close(row["coupling"].diagonal(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "products"},
        {"method": "kernels", "rounds": 2},
        {"method": "kernels", "coupling_error": 1e-9},
    ],
    ids=str,
)
def test_the_row_is_what_the_table_declares(options):
    case, instrument = sequences(), probe(sequences(), **options)
    table, row = instrument.table(case.partition), instrument.measure(snapshot_of(case))
    # The recorder alone knows these two.
    assert {v.name for v in table.variables} == set(row) | {"seconds", "peak_memory"}
    for variable in table.variables:
        if variable.name in row:
            assert np.shape(row[variable.name]) == table.row_shape(variable), variable.name
    assert tuple(table.coordinates["block"]) == case.partition.blocks
    assert table.name == instrument.name == "cross_layer"
    assert table.attributes["method"] == options["method"]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_depends_on_seed_and_step_alone(method):
    case = sequences()
    snapshot, instrument = snapshot_of(case), probe(case, method)
    row, again = instrument.measure(snapshot), probe(case, method).measure(snapshot)
    other = [instrument.measure(replace(snapshot, seed=1)), instrument.measure(replace(snapshot, step=4))]
    assert torch.equal(row["fro2"], again["fro2"])
    assert not any(torch.equal(row["fro2"], different["fro2"]) for different in other)


@pytest.mark.parametrize("method", METHODS)
def test_it_measures_at_the_snapshots_parameters_though_the_model_has_moved_on(method):
    case = copy.deepcopy(sequences())
    snapshot = snapshot_of(case)
    before = probe(case, method).measure(snapshot)
    case.partition.assign(case.problem.model, snapshot.parameters + 1)
    after = probe(case, method).measure(snapshot)
    for name in ("fro2", "step_curvature", "step_slope", "gradient_norm2", "loss"):
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_without_an_update_that_direction_is_not_a_number_and_the_other_is(method):
    case = sequences()
    row = probe(case, method).measure(replace(snapshot_of(case), update=None))
    for name in ("step_curvature", "step_slope", *(["alignment"] if method == "kernels" else [])):
        assert torch.isnan(row[name][0]).all()
        assert torch.isfinite(row[name][1]).all()


# -- sketches in the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("laid_out", [6, 8])
@pytest.mark.parametrize("error", [None, 1e-9], ids=["fixed rounds", "rounds until an error"])
def test_each_sketch_stands_where_the_table_says_however_the_batch_is_divided(laid_out, error):
    """Two micro-batches of 4 and 2: sequence and round of a sketch are the table's attributes, or it is empty."""
    case = sequences()
    instrument = CrossLayerProbe(
        CrossLayerRecipe(sequences=laid_out, rounds=2, max_rounds=4, coupling_error=error, cotangent="sign")
    )
    attributes = instrument.table(case.partition).attributes
    row = instrument.measure(snapshot_of(case))
    generator = snapshot_of(case).generator("cross_layer")
    options: dict[str, Any] = {"cotangent": "sign", "generator": generator}
    found = layer_kernels(case.objective, list(case.problem.batches), case.partition, rounds=2, **options)
    if error is not None:
        found = layer_kernels(case.objective, list(case.problem.batches), case.partition, rounds=4, **options)
    sequence, of_round = torch.tensor(attributes["sketch_sequence"]), torch.tensor(attributes["sketch_round"])
    there = (sequence < 6) & (of_round < found.rounds)
    assert torch.equal(row["sequence_tokens"].isfinite(), there)
    assert torch.equal(row["sequence_tokens"][there], found.tokens[sequence[there]].double())
    where = [
        int(torch.nonzero((found.sequence == b) & (found.round == r)))
        for b, r in zip(sequence[there].tolist(), of_round[there].tolist(), strict=True)
    ]
    torch.testing.assert_close(row["kernel"][:, there][:, :, there], found.kernel[:, where][:, :, where])
    assert row["kernel"][:, ~there].isnan().all() and row["kernel"][:, :, ~there].isnan().all()
    assert row["alignment"][1][:, there].isfinite().all() and row["alignment"][:, :, ~there].isnan().all()
    assert row["sequences"] == 6


def test_the_table_can_be_read_back_as_sketches():
    """What the analysis takes for a sequence is one: its kernels give the row's own block norms again."""
    case = sequences()
    instrument = CrossLayerProbe(CrossLayerRecipe(sequences=7, rounds=2, quantity="batch"))
    row, table = instrument.measure(snapshot_of(case)), instrument.table(case.partition)
    dims = {v.name: v.dims[1:] for v in table.variables}
    names = ("kernel", "alignment", "sequence_tokens", "gradient_norm2")
    stored = xr.Dataset(
        {name: (dims[name], row[name].numpy()) for name in names}, attrs=dict(table.attributes)
    )
    stored = stored.assign_coords({name: table.coordinates[name] for name in ("block", "direction")})
    read = sketches_of(stored)
    again = LayerKernels(
        blocks=read.blocks,
        kernel=torch.from_numpy(read.kernel),
        sequence=torch.from_numpy(read.sequence),
        round=torch.from_numpy(read.round),
        tokens=torch.from_numpy(read.tokens),
    )
    torch.testing.assert_close(again.block_norms("batch").mean, row["fro2"], rtol=1e-10, atol=0)
    torch.testing.assert_close(again.coupling("batch").stderr, row["coupling_stderr"], rtol=1e-8, atol=1e-12)


def test_more_sequences_than_the_table_holds_are_refused():
    case = sequences()
    with pytest.raises(
        UserError, match=r"6 sequences in this batch, .* laid out for 5; .* cross_layer.sequences=6"
    ):
        CrossLayerProbe(CrossLayerRecipe(sequences=5)).measure(snapshot_of(case))


# -- what a row costs --------------------------------------------------------------------------------------


def test_a_row_counts_the_rounds_it_really_took():
    case = sequences()
    options: dict[str, Any] = {"sequences": 6, "rounds": 1, "max_rounds": 4}
    once, until = CrossLayerRecipe(**options), CrossLayerRecipe(**options, coupling_error=1e-9)
    one, four = (CrossLayerProbe(recipe).measure(snapshot_of(case)) for recipe in (once, until))
    # 1, then 2, then 4 rounds, each with a forward pass; the tied embedding goes sequence by sequence beside.
    extra = sum(2 * (1 + 2 * rounds) / 3 for rounds in (2, 4))
    assert four["rounds"] == 4 and one["rounds"] == 1
    assert four["gradient_equivalents"] - one["gradient_equivalents"] == pytest.approx(extra)
    assert "rounds_again" not in four


def test_an_attempt_that_fits_costs_what_was_foreseen():
    """Every parameter of this decoder has a fast path."""
    problem = ZOO["decoder"](seeded(SEED))
    x = torch.randint(4, (5, 3), generator=seeded(1))
    case = Case.on(problem._replace(batches=[(x, x)]), "layer")
    instrument = probe(case, "kernels", rounds=3)
    row = instrument.measure(snapshot_of(case))
    assert row["gradient_equivalents"] == pytest.approx(instrument.cost(case.partition))


def test_pairs_are_summed_once_a_row(monkeypatch):
    calls: list[str] = []
    real = layer_kernels_module.pair_norms
    monkeypatch.setattr(
        layer_kernels_module,
        "pair_norms",
        lambda quantity, *rest: calls.append(quantity) or real(quantity, *rest),
    )
    probe(sequences(), "kernels", rounds=2, quantity="batch").measure(snapshot_of(sequences()))
    assert calls == ["batch"]


# -- rows that fail ----------------------------------------------------------------------------------------


class Scarce:
    """A model that runs out of memory in passes with a graph and more than so many sequences."""

    def __init__(self, model: torch.nn.Module, most: int) -> None:
        self.most, self.sizes = most, []
        self.handle = model.register_forward_hook(self)

    def __call__(self, module: object, inputs: tuple[Tensor, ...], output: object) -> None:
        if torch.is_grad_enabled():
            self.sizes.append(len(inputs[0]))
        if torch.is_grad_enabled() and self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.")


def test_a_row_that_runs_out_of_memory_is_the_same_row_and_the_next_starts_small(monkeypatch):
    case = copy.deepcopy(sequences())
    wanted = probe(case, "kernels", rounds=2).measure(snapshot_of(case))
    instrument = probe(case, "kernels", rounds=2)
    real = cross_layer.layer_kernels

    def scarce(*arguments: Any, **options: Any) -> LayerKernels:
        memory = Scarce(case.problem.model, 2)
        try:
            return real(*arguments, **options)
        finally:
            memory.handle.remove()
            sizes.append(max(memory.sizes))

    sizes: list[int] = []
    monkeypatch.setattr(cross_layer, "layer_kernels", scarce)
    for _ in range(2):
        row = instrument.measure(snapshot_of(case))
        torch.testing.assert_close(row["fro2"], wanted["fro2"], rtol=1e-10, atol=0)
        torch.testing.assert_close(row["kernel"], wanted["kernel"], rtol=1e-10, atol=1e-14, equal_nan=True)
    assert sizes == [4, 2]


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("memory", "out of memory: 12 sketches of .* measure fewer sequences or rounds"),
        ("NaN", "Decoder returned NaN for micro-batch 0: there is no curvature to measure"),
        ("one sequence", "1 sequence: the population quantity .* a batch of more sequences"),
    ],
)
def test_a_row_that_cannot_be_measured_says_why_and_the_next_one_is_measured(
    tmp_path, monkeypatch, failure, reason
):
    case = copy.deepcopy(sequences())
    instrument, good = probe(case, "kernels", rounds=2), snapshot_of(case)
    bad = replace(good, step=instrument.every)
    with RunWriter.create(tmp_path, {}) as writer:
        held = ProbeRecorder(writer, [instrument], case.partition, steps=3 * instrument.every)
        assert held.record(instrument, replace(good, step=0)).failure == ""
        if failure == "memory":
            real = cross_layer.layer_kernels

            def scarce(*arguments: Any, **options: Any) -> LayerKernels:
                memory = Scarce(case.problem.model, 0)
                try:
                    return real(*arguments, **options)
                finally:
                    memory.handle.remove()

            with monkeypatch.context() as patch:
                patch.setattr(cross_layer, "layer_kernels", scarce)
                found = held.record(instrument, bad)
        elif failure == "NaN":
            found = held.record(
                instrument, replace(bad, parameters=torch.full_like(bad.parameters, torch.nan))
            )
        else:
            found = held.record(instrument, replace(bad, batches=[tuple(x[:1] for x in bad.batches[0])]))
        assert found.row is None and re.search(reason, found.failure), found.failure
        assert held.record(instrument, replace(good, step=2 * instrument.every)).failure == ""


def test_the_recipes_memory_bound_reaches_kernels_and_products(monkeypatch):
    case, given = sequences(), []
    real = cross_layer.layer_kernels

    def noted(*arguments: Any, **options: Any) -> LayerKernels:
        given.append(options["memory"])
        return real(*arguments, **options)

    monkeypatch.setattr(cross_layer, "layer_kernels", noted)
    instrument = probe(case, "kernels", memory_mib=3)
    instrument.measure(snapshot_of(case))
    operator = instrument._matrix(snapshot_of(case))
    assert given == [3 * 2**20] and operator.memory == 3 * 2**20
