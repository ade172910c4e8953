"""In loops of the shape of well-known public codes: at most four lines added, training the same bit for bit, and rows
that tell the curvature of the loss which that loop trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.any_loop.loops import Loop, footprint
from tests.any_loop.public_shapes import (
    fabric_gpt,
    mini_gpt,
    nano_gpt,
    recurrent,
    selective_scan,
    sequence_first,
    wrapped_decoder,
)
from tests.any_loop.public_shapes.watching import (
    Pass,
    Trained,
    Watch,
    in_order,
    truth,
    without_added,
)
from tests.oracles import Dense, block_fro2
from tests.training.runs import tables

# The LSTM's layers share a module, and the partition says so.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")
DECODER = ("embedding", "block.0", "block.1", "head")
TIED = ("embedding+head", "block.0", "block.1")
PROBES = {
    "cross_layer": {"sequences": 12, "quantity": "batch", "rounds": 16},
    "gn_hessian": {
        "sequences": 12, "samples": 12, "block_samples": 2, "lanczos_steps": 2, "lanczos_probes": 1,
        "alphas": [1.0], "cg_iterations": 2,
    },
}  # fmt: skip
CANDIDATES = ("gradient", "update", "layerwise_gn", "full_gn")


def candidates(curvature: int, held_out: int) -> dict[str, Any]:
    """Returns the preconditioner probe's options for so many sequences."""
    sequences = {"curvature_sequences": [curvature], "held_out_sequences": held_out, "folds": 2}
    solves = {"dampings": [0.1], "cg_iterations": 60, "cg_tolerance": 1e-8}
    return {"preconditioner": {**sequences, **solves, "candidates": CANDIDATES}}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A loop and how the oracle reads its model and batches, with no code of hessprobe."""

    module: ModuleType
    logits: Callable[[nn.Module, Any], Tensor]
    targets: Callable[[Any], Tensor] = lambda batch: batch[1]
    ignore_index: int = -100
    options: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = DECODER
    passes: int = 1  # a step
    step: int = 2  # measured with all probes
    rounding: float = 1e-9  # of exact quantities, over their largest
    seed: int = (
        3  # of a run without single sequences that make the curvature: errors of estimates can be believed
    )
    trained: float = (
        1e-12  # between the loop's loss and the oracle's, over it; what dropout and half precision make
    )


_NANO = Shape(
    module=nano_gpt,
    logits=lambda model, batch: model(*batch)[0],
    ignore_index=-1,
    blocks=TIED,
    seed=8,
)
_MINI = Shape(
    module=mini_gpt,
    logits=lambda model, batch: model(*batch)[0],
    ignore_index=-1,
)
_FABRIC = Shape(
    module=fabric_gpt,
    logits=lambda model, ids: model(ids[:, :-1]),
    targets=lambda ids: ids[:, 1:],
    passes=2,
)
_RECURRENT = Shape(
    module=recurrent,
    logits=lambda model, batch: model(batch[0], tuple(h.double() for h in batch[2]))[0],
    blocks=("embedding", "rnn", "decoder"),  # torch keeps all its layers in one module
)
SINGLE = {"rounding": 2e-4, "trained": 1e-5}  # of float32


def like(shape: Shape, **changes: Any) -> Shape:
    """Returns the shape with fields of it changed."""
    return Shape(**{**vars(shape), **changes})


SHAPES = {
    "nanoGPT": like(_NANO, options=candidates(8, 4), passes=3),
    "nanoGPT, compiled, no accumulation": like(
        _NANO, options={"loop": {"gradient_accumulation_steps": 1, "compiled": True}}
    ),
    "minGPT": _MINI,
    "minGPT, dropout": like(_MINI, options={"loop": {"dropout": 0.2}}, trained=0.5),
    "litgpt, 64-true": like(
        _FABRIC, options={"loop": {"precision": "64-true"}, **candidates(4, 4)}, trained=1e-6
    ),
    "litgpt, 32-true": like(_FABRIC, **SINGLE),
    "litgpt, bf16-mixed": like(
        _FABRIC, options={"loop": {"precision": "bf16-mixed"}}, rounding=2e-4, trained=1e-2
    ),
    "x-transformers": Shape(
        module=wrapped_decoder,
        logits=lambda model, ids: model.net(ids[:, :-1]),
        targets=lambda ids: ids[:, 1:],
        blocks=("embedding", "block.0", "block.1", "block.2", "block.3", "head"),
    ),
    "word_language_model, LSTM": _RECURRENT,
    "word_language_model, LSTM, float32, dropout": like(
        _RECURRENT, options={"loop": {"dropout": 0.2, "dtype": torch.float32}}, rounding=2e-4, trained=0.5
    ),
    "word_language_model, Transformer": Shape(
        module=sequence_first, logits=lambda model, batch: model(batch[0]), step=3
    ),
    "mamba-minimal": Shape(module=selective_scan, logits=lambda model, batch: model(batch[0]), blocks=TIED),
}


class Run:
    """One training with a recorder, beside the same without."""

    def __init__(self, shape: Shape, folder: Any) -> None:
        self.shape, self.folder = shape, folder
        probes = {**PROBES, **{k: v for k, v in shape.options.items() if k != "loop"}}
        self.watch, self.bare_watch = Watch(), Watch()
        self.trained, self.left = self._train(
            shape.module.train, self.watch, probes=probes, every=[shape.step]
        )
        self.without = without_added(shape.module)
        _, self.bare_left = self._train(self.without.train, self.bare_watch)

    def _train(self, train: Callable[..., Trained], watch: Watch, **probes: Any) -> tuple[Trained, dict]:
        with torch.random.fork_rng([]):
            torch.manual_seed(self.shape.seed)
            trained = train(self.folder, watch, **self.shape.options.get("loop", {}), **probes)
            plain = {
                f"{where}.{name}": x
                for where, module in trained.model.named_modules()
                for name, x in vars(module).items()
                if isinstance(x, Tensor)
            }
            return trained, {
                **footprint(Loop(trained.model, trained.optimizers, lambda batches: None)),
                "attributes": plain,
                "losses": watch.losses,
            }

    def passes(self, step: int) -> list[Pass]:
        return self.watch.passes[step * self.shape.passes : (step + 1) * self.shape.passes]

    @cached_property
    def tables(self) -> dict[str, xr.Dataset]:
        return tables(self.folder)

    def row(self, table: str) -> xr.Dataset:
        found = self.tables[table]
        failures = found.failure.values.tolist()
        assert failures == [""] * len(failures)
        return found.sel(step=self.shape.step)

    @cached_property
    def measured(self) -> nn.Module:
        return Objective(self.trained.model).model

    @cached_property
    def partition(self) -> Partition:
        return Partition.of(self.measured, "layer")

    @cached_property
    def truth(self) -> Dense:
        """The dense truth of the measured step, in the partition's order."""
        return self.truth_of(self.passes(self.shape.step))

    def truth_of(self, passes: list[Pass]) -> Dense:
        shape, model = self.shape, self.trained.model
        found = truth(model, passes, shape.logits, shape.targets, ignore_index=shape.ignore_index)
        return in_order(found, model, self.measured, self.partition.names)

    @cached_property
    def update(self) -> Tensor:
        """What the loop added to theta in the measured step, in the partition's order."""
        before = self.passes(self.shape.step)[0].theta
        later = self.passes(self.shape.step + 1)
        after = later[0].theta if later else dict(self.trained.model.named_parameters())
        own = {id(p): name for name, p in self.trained.model.named_parameters()}
        theirs = dict(self.measured.named_parameters(remove_duplicate=False))
        names = [own[id(theirs[name])] for name in self.partition.names]
        return torch.cat([(after[n].detach().double() - before[n].double()).reshape(-1) for n in names])


@pytest.fixture(scope="module")
def run_of(tmp_path_factory) -> Callable[[str], Run]:
    return cache(lambda name: Run(SHAPES[name], tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(params=SHAPES)
def run(request, run_of) -> Run:
    return run_of(request.param)


def assert_near(found: Any, wanted: Tensor, rounding: float) -> None:
    error = np.abs(np.asarray(found) - wanted.numpy()).max() / wanted.abs().max().item()
    assert error < rounding, f"got {np.asarray(found)}, wanted {wanted.numpy()}"


def z_scores(found: Any, stderr: Any, wanted: Tensor) -> np.ndarray:
    return np.abs(np.asarray(found) - wanted.numpy()) / np.asarray(stderr)


def test_at_most_four_statements_are_added(run):
    assert 3 <= run.without.added <= 4


def test_training_is_the_same_bit_for_bit_with_and_without(run):
    torch.testing.assert_close(run.left, run.bare_left, rtol=0, atol=0, equal_nan=True)
    for found in run.watch.identities:
        assert found == run.watch.identities[0]  # the same tensors all along


def test_the_oracle_is_of_the_loss_that_the_loop_trains(run):
    trained = torch.stack([one.loss for one in run.passes(run.shape.step)]).double().mean()
    assert abs(float(trained / run.truth.loss) - 1) < run.shape.trained


def test_blocks_are_the_layers_that_the_code_has(run):
    table = run.row("cross_layer")
    assert tuple(table.block.values.tolist()) == run.shape.blocks == run.partition.blocks


def test_exact_quantities_are_those_of_the_dense_truth(run):
    row, dense, slices = run.row("cross_layer"), run.truth, list(run.partition.slices.values())
    assert_near(row.loss, dense.loss, run.shape.rounding)
    assert int(row.tokens) == dense.tokens
    squares = torch.stack([dense.gradient[where].square().sum() for where in slices])
    assert_near(row.gradient_norm2, squares, run.shape.rounding)
    for name, d in (("update", run.update), ("negative_gradient", -dense.gradient)):
        along = [[d[i] @ dense.gauss_newton[i, j] @ d[j] for j in slices] for i in slices]
        slopes = torch.stack([dense.gradient[where] @ d[where] for where in slices])
        found = row.sel(direction=name)
        assert_near(found.step_curvature, torch.tensor(along, dtype=torch.float64), run.shape.rounding)
        assert_near(found.step_slope, slopes, run.shape.rounding)


def test_curvature_of_the_hessian_is_that_of_the_dense_truth(run):
    row, dense = run.row("gn_hessian"), run.truth
    assert_near(row.loss, dense.loss, run.shape.rounding)
    for name, d in (("update", run.update), ("negative_gradient", -dense.gradient)):
        unit = d / d.norm()
        wanted = torch.stack([unit @ dense.gauss_newton @ unit, unit @ dense.hessian @ unit])
        found = row.direction_curvature.sel(direction=name, matrix=["gauss_newton", "hessian"])
        assert_near(found, wanted, run.shape.rounding)


def test_estimates_are_within_their_errors_of_the_dense_truth(run):
    row, dense, slices = run.row("cross_layer"), run.truth, list(run.partition.slices.values())
    upper = np.triu_indices(len(slices))
    norms = z_scores(row.fro2, row.fro2_stderr, block_fro2(dense.gauss_newton, slices))
    assert norms[upper].max() < 5
    assert (np.diagonal(row.fro2_stderr) < 0.7 * np.diagonal(row.fro2)).all()  # errors that say something

    row = run.row("gn_hessian").sel(matrix=["gauss_newton", "hessian"])
    traces = torch.stack([dense.gauss_newton.trace(), dense.hessian.trace()])
    assert z_scores(row.trace, row.trace_stderr, traces).max() < 5
    gap = dense.residual.norm() / dense.gauss_newton.norm()
    assert z_scores(row.gn_gap, row.gn_gap_stderr, gap).max() < 5


@pytest.mark.parametrize(
    "name", [name for name, shape in SHAPES.items() if "preconditioner" in shape.options]
)
def test_candidates_are_judged_as_the_dense_truth_judges_them(run_of, name):
    run = run_of(name)
    row = run.row("preconditioner").isel(draw=0, curvature_sequences=0, damping=0)
    assert row.candidate_failure.values.tolist() == [""] * len(CANDIDATES)
    count = run.shape.options["preconditioner"]["curvature_sequences"][0]
    passes = run.passes(run.shape.step)
    dense = run.truth_of(passes[: count // 4])  # micro-batches of four sequences
    g = dense.gradient
    damped = dense.gauss_newton + 0.1 * torch.eye(len(g), dtype=torch.float64)
    best = g @ torch.linalg.solve(damped, g)
    wanted = torch.stack([(g @ d) ** 2 / (d @ damped @ d) / best for d in (g, run.update)])
    assert_near(row.efficiency.sel(candidate=["gradient", "update"]), wanted, 1e-6)
    assert float(row.efficiency.sel(candidate="full_gn")) == pytest.approx(1, abs=1e-6)
