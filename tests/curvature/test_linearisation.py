"""Products from one linearisation, kept or not, whole or of several groups, equal the oracle's and cost what is said."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.linearisation import Linearisation
from hessprobe.errors import UserError
from hessprobe.problem.measuring import measuring
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case, masked
from tests.curvature.awkward_models import AWKWARD, STUBBORN, Kernel, awkward

EXACT = 1e-10
KEEP = 2**30
SOME = ("repeated_module", "custom_loss", "decoder_swiglu_layernorm", "decoder_tied", "fused_attention")
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]


def halves(case: Case) -> list[tuple[str, ...]]:
    """Returns every other block, and the rest but the last: a group with a gap, and a block in no group."""
    blocks = case.partition.blocks
    return [group for group in (blocks[::2], blocks[1:-1:2]) if group]


def within(case: Case, matrix: Tensor, groups: list[tuple[str, ...]]) -> Tensor:
    """Returns the matrix with everything but each group's own part set to zero."""
    kept = torch.zeros_like(matrix)
    for group in groups:
        rows = masked(case, torch.ones(1, len(matrix), dtype=matrix.dtype), group)[0]
        kept += rows[:, None] * matrix * rows
    return kept


@pytest.mark.parametrize("name", SOME)
def test_kept_products_equal_the_oracle_whole_and_restricted(zoo_case: Zoo, name: str) -> None:
    case = zoo_case(name)
    kept, v = case.gauss_newton().linearised(KEEP), case.rows(2)
    first, last = case.partition.blocks[0], case.partition.blocks[-1]
    for k in (1, 2, 1):
        assert oracles.relative_error(kept.apply(v[:k]), v[:k] @ case.truth.gauss_newton) < EXACT
    only = masked(case, v, [first])
    got = kept.apply(v, columns=[first], rows=[last])
    assert oracles.relative_error(got, masked(case, only @ case.truth.gauss_newton, [last])) < EXACT
    assert not got.requires_grad


@pytest.mark.parametrize("keep", [0, KEEP])
@pytest.mark.parametrize("name", SOME)
def test_products_of_groups_equal_the_oracle(zoo_case: Zoo, name: str, keep: int) -> None:
    case = zoo_case(name)
    operator, v = case.gauss_newton().linearised(keep), case.rows(2)
    for groups in ([(block,) for block in case.partition.blocks], halves(case), [case.partition.blocks]):
        wanted = v @ within(case, case.truth.gauss_newton, groups)
        assert oracles.relative_error(operator.group_diagonal(groups).apply(v), wanted) < EXACT


@pytest.mark.parametrize("keep", [0, KEEP])
@pytest.mark.parametrize("kind", [*AWKWARD.values(), *STUBBORN.values()], ids=[*AWKWARD, *STUBBORN])
def test_awkward_models_are_measured_all_the_same(
    generator: Seeded, kind: type[nn.Module], keep: int
) -> None:
    case = awkward(kind, generator)
    operator, v = case.gauss_newton().linearised(keep), case.rows(2)
    blocks = [(block,) for block in case.partition.blocks]
    for _ in range(2):  # the second time from what was kept
        assert oracles.relative_error(operator.apply(v), v @ case.truth.gauss_newton) < EXACT
        wanted = v @ within(case, case.truth.gauss_newton, blocks)
        assert oracles.relative_error(operator.block_diagonal().apply(v), wanted) < EXACT


@pytest.mark.parametrize("keep", [0, KEEP])
def test_a_model_without_second_derivatives_raises_instead_of_answering(generator: Seeded, keep: int) -> None:
    draws = generator(14)
    batch = (models.real(draws, 5, 4), models.labels(draws, 4, 5))
    model = models.redraw(Kernel(), draws)
    partition = Partition.of(model, "module")
    operator = GaussNewton(Objective(model), [batch], partition, engine="exact").linearised(keep)
    ones, blocks = torch.ones(1, partition.size, dtype=torch.float64), [(b,) for b in partition.blocks]
    for ask in (
        lambda: operator.apply(ones),
        lambda: operator.block_diagonal().apply(ones),
        lambda: operator.tangents(batch, ones, blocks),
    ):
        with pytest.raises((UserError, RuntimeError), match="(?i)differentia|symmetr|derivative|forward"):
            ask()


def test_it_stays_at_its_theta_though_the_model_moves_on(generator: Seeded) -> None:
    case = Case.on(models.mlp_classifier(generator(9)))
    operator, v = case.gauss_newton().linearised(KEEP), case.rows(1)
    case.partition.assign(case.problem.model, case.partition.vector(case.problem.model) + 0.1)
    for _ in range(2):
        assert oracles.relative_error(operator.apply(v), v @ case.truth.gauss_newton) < EXACT


def test_single_precision_agrees_with_the_truth_to_single_precision(zoo_case: Zoo) -> None:
    case = zoo_case("decoder_tied")
    model = copy.deepcopy(case.problem.model).float()
    operator = GaussNewton(Objective(model), case.problem.batches, case.partition).linearised(KEEP)
    v = case.rows(2).float()
    wanted = v.double() @ case.truth.gauss_newton
    assert oracles.relative_error(operator.apply(v).double(), wanted) < 1e-5


# -- what is kept, and what it costs -----------------------------------------------------------------------


class Chain:
    """Equal matrices in a row; `calls` counts forward passes."""

    def __init__(self, layers: int = 5, n: int = 6, d: int = 8) -> None:
        g = models.seeded(1)
        model = models.redraw(nn.Sequential(*[nn.Linear(d, d, bias=False) for _ in range(layers)]), g)
        self.batch = (models.real(g, n, d), models.real(g, n, d))
        self.partition = Partition.of(model, "parameter")
        objective = Objective(model, loss="squared_error")
        self.operator = GaussNewton(objective, self.batch, self.partition)
        self.blocks = [(block,) for block in self.partition.blocks]
        self.v = torch.ones(1, self.partition.size, dtype=torch.float64)
        self.unit, self.layers, self.calls = 2 * n * d * d, layers, 0
        model.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))


def operations(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_operations_are_those_that_the_docstrings_say() -> None:
    """With u the operations of one product with a matrix; a gradient takes 3 u a layer, but u less in the first."""
    chain = Chain()
    u, n, v = chain.unit, chain.layers, chain.v
    chain.operator.block_diagonal().apply(v)  # the check, once
    # A group's tangent: its own matrix and one product for each above; its pull-back the same.
    groups = sum(2 * (n - k) for k in range(n))
    assert operations(lambda: chain.operator.block_diagonal().apply(v)) == u * (n + 2 * n - 1 + groups)
    kept = chain.operator.linearised(KEEP)
    kept.apply(v)
    assert operations(lambda: kept.block_diagonal().apply(v)) == u * groups
    assert operations(lambda: kept.apply(v)) == u * 2 * (2 * n - 1)
    assert operations(lambda: kept.tangents(kept.pieces[0], v, [chain.partition.blocks])) == u * (2 * n - 1)
    assert operations(lambda: kept.tangents(kept.pieces[0], v, chain.blocks)) == u * groups // 2


@pytest.mark.parametrize(("keep", "passes"), [(0, 6), (1, 6), (KEEP, 1)])
def test_a_linearisation_is_made_once_where_it_may_be_kept(keep: int, passes: int) -> None:
    chain = Chain()
    operator = chain.operator.linearised(keep)
    for _ in range(6):
        operator.block_diagonal().apply(chain.v)
    assert chain.calls == passes


def test_what_is_beyond_the_memory_bound_is_made_anew_and_the_rest_kept(zoo_case: Zoo) -> None:
    case, calls = zoo_case("decoder_ragged"), []
    everything = case.gauss_newton().linearised(KEEP)
    everything.apply(case.rows(1))
    sizes = [graph.bytes for _, graph in everything._kept.values()]
    assert len(sizes) == 3 and min(sizes) > 0
    some = case.gauss_newton().linearised(sizes[0] + sizes[1])
    handle = case.problem.model.register_forward_hook(lambda *_: calls.append(0))
    v = case.rows(1)
    for _ in range(2):
        assert oracles.relative_error(some.apply(v), v @ case.truth.gauss_newton) < EXACT
    handle.remove()
    assert len(calls) == 3 + 1


class Mark:
    """Something that can be seen to be gone."""


class Marked(torch.autograd.Function):
    """The identity; its node holds a mark for as long as the graph lives."""

    alive: weakref.WeakSet[object] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark = Mark()
        Marked.alive.add(ctx.mark)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0]


class Exponential(nn.Module):
    """exp's node keeps its own output, through which it could hold itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Marked.apply(self.body(x)).exp()  # type: ignore[union-attr]


def test_graphs_go_with_the_operator(generator: Seeded) -> None:
    case = awkward(Exponential, generator)
    kept = case.gauss_newton().linearised(KEEP)
    Marked.alive.clear()
    gc.disable()
    try:
        kept.apply(case.rows(1))
        assert len(Marked.alive) == len(kept.pieces) == len(kept._kept)
        del kept
        assert len(Marked.alive) == 0  # no circle that would wait for the garbage collector, or for ever
    finally:
        gc.enable()


@pytest.mark.parametrize("keep", [0, KEEP])
def test_out_of_memory_lets_go_of_what_is_kept_then_cuts_finer(
    zoo_case: Zoo, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    case, sizes = zoo_case("decoder_tied"), []
    operator, v = case.gauss_newton().linearised(keep), case.rows(1)
    whole = GaussNewton._linearisation

    def small_machine(self: GaussNewton, batch: tuple[Tensor, Tensor]) -> object:
        sizes.append(len(batch[0]))
        if len(batch[0]) > 1:
            raise torch.OutOfMemoryError("no room")
        return whole(self, batch)

    monkeypatch.setattr(GaussNewton, "_linearisation", small_machine)
    wanted = v @ within(case, case.truth.gauss_newton, [(b,) for b in case.partition.blocks])
    assert oracles.relative_error(operator.block_diagonal().apply(v), wanted) < EXACT
    assert sizes == [2, 1, 1]


def test_out_of_memory_everywhere_leaves_the_products_that_need_less(
    zoo_case: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = zoo_case("decoder_tied")
    operator, v = case.gauss_newton().linearised(KEEP), case.rows(1)

    def no_machine(self: GaussNewton, batch: object) -> object:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(GaussNewton, "_linearisation", no_machine)
    assert oracles.relative_error(operator.apply(v), v @ case.truth.gauss_newton) < EXACT
    z, _ = operator.tangents(operator.pieces[0], v, [case.partition.blocks])
    assert z.shape[0] > 0


def test_groups_that_share_a_block_or_name_none_are_refused(zoo_case: Zoo) -> None:
    operator = zoo_case("decoder_tied").gauss_newton()
    with pytest.raises(UserError, match="block.0 named more than once"):
        operator.group_diagonal([("block.0",), ("block.0", "embedding+head")])
    with pytest.raises(UserError, match="'block.7'"):
        operator.group_diagonal([("block.7",)])


# -- layers without second derivatives ---------------------------------------------------------------------


class Layers(nn.Module):
    """Every layer that a linearisation takes in a form of its own, each of its options, and one it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)
        self.plain, self.pair = nn.LayerNorm(6, elementwise_affine=False), nn.LayerNorm([3, 6], eps=0.1)
        self.unbiased = nn.LayerNorm(6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.unbiased(self.first(x)))
        x = x + nn.functional.gelu(self.plain(x), approximate="tanh")
        x = self.pair(x.reshape(-1, 3, 6)).reshape(-1, 6)
        x = nn.functional.silu(x.T).T + nn.functional.silu(x.clone(), inplace=True)
        return self.last(x)


def test_layers_taken_to_first_order_have_the_right_jacobian() -> None:
    g = models.seeded(4)
    model = models.redraw(Layers(), g)
    case = Case.on(models.Problem(model, [(models.real(g, 6, 4), models.labels(g, 4, 6))], "cross_entropy"))
    operator, v = case.gauss_newton().linearised(KEEP), case.rows(2)
    assert oracles.relative_error(operator.apply(v), v @ case.truth.gauss_newton) < EXACT
    assert operator._kept  # it was not another engine that gave it


class Recomputed(nn.Module):
    """Runs layers again in the reverse pass, in torch's own form."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.SiLU()), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        body = checkpoint(self.body, x, use_reentrant=False)
        assert isinstance(body, Tensor)
        return self.head(body)


def test_layers_that_are_run_again_stay_as_they_are(generator: Seeded) -> None:
    case = awkward(Recomputed, generator)
    operator, v = case.gauss_newton().linearised(KEEP), case.rows(1)
    for _ in range(2):
        assert oracles.relative_error(operator.apply(v), v @ case.truth.gauss_newton) < EXACT
    assert operator._kept and operator._usual_layers  # linearised all the same


def test_a_layer_run_again_in_another_form_than_recorded_is_noticed(generator: Seeded) -> None:
    """Else torch would take what it recomputes for what was saved: x for f'(x), of the same shape."""
    case = awkward(Recomputed, generator)
    objective = case.objective
    with measuring(objective.model), pytest.raises(CheckpointError):
        found = Linearisation(objective, case.problem.batches[0], objective.leaves(case.partition))
        found.pull_back(torch.ones_like(found.outputs), case.partition.names)
