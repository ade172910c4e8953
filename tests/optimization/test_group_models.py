"""Many groups share one linearisation: their gradients are those they have alone, for fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hessprobe.errors import UserError
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.optimization.group_models import LocalModels
from hessprobe.optimization.inner_problem import groups_of
from hessprobe.optimization.local_model import MODELS, LocalGradient, predicted_decrease
from hessprobe.problem import splitting
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.cases import Case
from tests.curvature.awkward_models import AWKWARD, Kernel, awkward
from tests.models import IGNORED, Problem, labels, real, redraw
from tests.optimization.linearised import displacement, local_models, named, vector
from tests.oracles import relative_error


def test_blocks_1_and_10_stay_apart(generator):
    config = DecoderConfig(
        layers=12, width=4, feedforward=4, heads=2, vocabulary=5, context=4, query_key_norm=False
    )
    model = redraw(Decoder(config, generator=generator(1)), generator(2))
    batch = (torch.randint(5, (2, 4), generator=generator(3)), labels(generator(4), 5, 2, 4))
    objective, partition = Objective(model), Partition.of(model)
    assert len(partition) == 14
    theta = partition.unflatten(partition.vector(model))
    delta = partition.unflatten(0.3 * real(generator(5), partition.size))
    groups = [partition.parameters_of(block) for block in partition.blocks]
    assert all(name.startswith("blocks.1.") for name in groups[2])  # not those of blocks.10 and blocks.11
    assert len(groups[2]) == len(groups[11])
    together = local_models(objective, groups, "shared").gradients(batch, theta, delta)
    for k in (2, 11, 12):  # block.1, block.10, block.11
        names, one = groups[k], together[k]
        (alone,) = local_models(objective, [names], "forward-mode").gradients(batch, theta, delta)
        assert set(one.gradient) == set(names)
        assert all(relative_error(one.gradient[n], alone.gradient[n]) < 1e-10 for n in names)
        assert one.value == pytest.approx(alone.value, rel=1e-12)


@pytest.mark.parametrize("engine", ["forward-mode", "shared"])
@pytest.mark.parametrize("structure", ["full", "layerwise"])
@pytest.mark.parametrize("model", MODELS)
def test_a_long_minibatch_is_worked_on_in_pieces(monkeypatch, generator, zoo_case, model, structure, engine):
    """Ragged ones, one of them without a target: values, gradients and the predicted decrease stay the minibatch's."""
    case = zoo_case("decoder")
    batch = (torch.randint(7, (5, 4), generator=generator(1)), labels(generator(2), 7, 5, 4, ignore=0.3))
    batch[1][4] = IGNORED
    groups = [
        tuple(n for block in group for n in case.partition.parameters_of(block))
        for group in groups_of(structure, case.partition)
    ]
    theta, delta = named(case, case.partition.vector(case.problem.model)), named(case, displacement(case))

    def found() -> tuple[list[LocalGradient], float]:
        local = local_models(case.objective, groups, engine, model=model, damping=0.3)
        decrease = predicted_decrease(case.objective, [batch, batch], theta, delta, model=model)
        return local.gradients(batch, theta, delta), decrease

    whole, promised = found()
    monkeypatch.setattr(splitting, "POSITIONS_AT_ONCE", 8)
    seen, outputs = [], case.objective.outputs

    def noted(batch, *given):
        seen.append(len(batch[0]))
        return outputs(batch, *given)

    monkeypatch.setattr(case.objective, "outputs", noted)
    pieces, decrease = found()
    assert max(seen) == 2 and sum(seen) > 5
    for one, other in zip(pieces, whole, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-12)
        assert set(one.gradient) == set(other.gradient)
        assert all(relative_error(one.gradient[n], other.gradient[n]) < 1e-11 for n in other.gradient)
    assert decrease == pytest.approx(promised, rel=1e-10)


# -- operations --------------------------------------------------------------------------------------------


def operations(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_a_block_computes_no_tangent_below_itself_and_no_gradient_outside(generator):
    """Of equal matrices in a row, with u the operations of one product with a matrix."""
    g, layers, n, d = generator(1), 5, 6, 8
    model = redraw(nn.Sequential(*[nn.Linear(d, d, bias=False) for _ in range(layers)]), g)
    objective, batch = Objective(model, loss="squared_error"), (real(g, n, d), real(g, n, d))
    partition = Partition.of(model, "parameter")
    theta = partition.unflatten(partition.vector(model))
    groups, u = [(name,) for name in partition.names], 2 * n * d * d

    def taken(engine: str, groups: list[tuple[str, ...]]) -> int:
        local = local_models(objective, groups, engine)
        local.gradients(batch, theta, theta)  # the first time it is checked
        return operations(lambda: local.gradients(batch, theta, theta))

    for k, names in enumerate(groups):
        above = layers - 1 - k
        # The forward pass; the block's own tangent and those above, two products a layer, since torch multiplies by
        # the zero tangents of their matrices too; the gradients above and the block's own.
        assert taken("forward-mode", [names]) <= u * (layers + 2 * (1 + above) + (above + 1))
    # One forward pass and one linear map w -> J^T w for all, and no more than that for each.
    assert taken("shared", groups) == u * (
        layers + (2 * layers - 1) + sum(2 * (layers - k) for k in range(layers))
    )


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


@pytest.mark.filterwarnings("ignore:layer partition")
@pytest.mark.parametrize("blocks", [6, 14])
def test_layerwise_takes_at_most_six_tenths_of_the_operations_of_a_full_step_a_block(generator, blocks):
    g = generator(1)
    model = redraw(nn.ModuleDict({"h": nn.Sequential(*[Residual(8) for _ in range(blocks)])}), g)
    objective = Objective(model, loss="squared_error", forward=lambda model, batch: model["h"](batch[0]))
    partition, batch = Partition.of(model), (real(g, 5, 8), real(g, 5, 8))
    assert len(partition) == blocks
    theta = partition.unflatten(partition.vector(model))

    def step(groups: list[tuple[str, ...]]) -> int:
        local = LocalModels(objective, groups)
        local.gradients(batch, theta, theta)
        return operations(lambda: local.gradients(batch, theta, theta))

    full = step([partition.names])
    assert step([partition.parameters_of(block) for block in partition.blocks]) <= 0.6 * blocks * full
    assert full <= 2.0 * operations(lambda: objective.gradient(batch, partition))


# -- networks that one engine cannot take ------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "layerwise"])
@pytest.mark.parametrize("kind", AWKWARD.values(), ids=AWKWARD)
def test_a_network_without_forward_mode_is_differentiated_twice_by_reverse(generator, kind, structure):
    case = awkward(kind, generator)
    case = Case.on(case.problem._replace(batches=case.problem.batches[:1]))
    groups = [
        tuple(n for block in group for n in case.partition.parameters_of(block))
        for group in groups_of(structure, case.partition)
    ]
    local, delta = LocalModels(case.objective, groups), displacement(case)
    theta = named(case, case.partition.vector(case.problem.model))
    for names, one in zip(
        groups, local.gradients(case.problem.batches[0], theta, named(case, delta)), strict=True
    ):
        own = {n: x if n in names else torch.zeros_like(x) for n, x in named(case, delta).items()}
        wanted = case.truth.gradient + case.truth.gauss_newton @ case.partition.flatten(own)
        for name in names:
            assert relative_error(one.gradient[name], named(case, wanted)[name]) < 1e-10
    assert local.engine == "shared"
    promised = predicted_decrease(
        case.objective, case.problem.batches, theta, named(case, delta), model="quadratic"
    )
    model = -(case.truth.gradient @ delta + 0.5 * delta @ case.truth.gauss_newton @ delta)
    assert promised == pytest.approx(float(model), rel=1e-10)


class ForwardOnce(torch.autograd.Function):
    """tanh with forward mode, and a backward pass whose own derivative is missing, without a word."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.slope = (1 - output**2).detach()

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return ctx.slope * tangent

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> Tensor:
        return (ctx.slope * cotangent) if not cotangent.requires_grad else (ctx.slope * cotangent.detach())


class OneWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x + ForwardOnce.apply(x))  # type: ignore[arg-type]


def test_a_network_whose_second_derivatives_are_missing_goes_by_forward_mode(generator):
    g = generator(6)
    model = redraw(OneWay(), g)
    case = Case.on(Problem(model, [(real(g, 5, 4), labels(g, 4, 5))], "cross_entropy"))
    theta, delta = named(case, case.partition.vector(model)), displacement(case)
    groups = [case.partition.parameters_of(block) for block in case.partition.blocks]
    local, batch = LocalModels(case.objective, groups), case.problem.batches[0]
    zero = named(case, torch.zeros_like(delta))
    local.gradients(batch, theta, zero)  # at a displacement that says nothing about the derivatives
    assert local.engine == "forward-mode"
    one, _ = local.gradients(batch, theta, named(case, delta))
    resumed = LocalModels(case.objective, groups)
    for name in ("forward-mode", "shared", local.engine):  # a state loaded over another
        resumed.engine = name
    local.gradients(batch, theta, zero)
    resumed.gradients(batch, theta, zero)
    assert resumed.engine == local.engine == "forward-mode"  # for good
    where = case.partition.slices["body"]
    # The dense truth takes two reverse passes for H alone; G is from first derivatives.
    wanted = case.truth.gradient[where] + case.truth.gauss_newton[where, where] @ delta[where]
    assert relative_error(vector(case, one)[where], wanted) < 1e-10


@pytest.mark.parametrize("structure", ["full", "layerwise"])
def test_a_network_that_no_engine_takes_is_refused(generator, structure):
    g = generator(14)
    model = redraw(Kernel(), g)
    objective, partition = Objective(model), Partition.of(model, "module")
    groups = [
        tuple(n for block in group for n in partition.parameters_of(block))
        for group in groups_of(structure, partition)
    ]
    theta = partition.unflatten(partition.vector(model))
    with pytest.raises(UserError, match="no second derivatives.*plain implementation"):
        LocalModels(objective, groups).gradients((real(g, 5, 4), labels(g, 4, 5)), theta, theta)
