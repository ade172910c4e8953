"""diag(G) from sampled labels: unbiased, whatever the batches; nothing but the generator decides the draw."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hessprobe.curvature.diagonal import sampled_diagonal
from hessprobe.errors import UserError
from hessprobe.problem import splitting
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.models import labels, real, redraw, seeded

# The zoo's perceptrons have no layers whose names mean anything.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")


def setting(name: str) -> tuple[Objective, list, Partition]:
    problem = models.ZOO[name](seeded(3))
    objective = Objective(problem.model, loss=problem.loss)
    return objective, list(problem.batches), Partition.of(problem.model)


@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classifier", "decoder_ragged", "decoder_tied"])
def test_its_mean_is_gauss_newtons_diagonal(name):
    objective, batches, partition = setting(name)
    truth = oracles.dense(*models.ZOO[name](seeded(3))).in_order(partition.names).gauss_newton.diagonal()
    g = seeded(11)
    draws = torch.stack([sampled_diagonal(objective, batches, partition, generator=g) for _ in range(200)])
    assert bool((draws >= 0).all())
    still = truth < 1e-12 * truth.max()
    assert float(draws[:, still].abs().max() if still.any() else 0) < 1e-12 * float(truth.max())
    z = (draws.mean(0) - truth)[~still] / (draws.std(0)[~still] / len(draws) ** 0.5)
    # Of p skewed estimates; their sum, which is better behaved, has to agree too.
    assert float(z.square().mean()) < 2.5 and float(z.abs().max()) < 8
    total = draws.sum(1)
    assert abs(float(total.mean() - truth.sum())) < 3 * float(total.std()) / len(draws) ** 0.5


def test_a_draw_is_a_function_of_generator_and_parameters():
    objective, batches, partition = setting("decoder_ragged")
    state = torch.get_rng_state()
    one, same, other = (
        sampled_diagonal(objective, batches, partition, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    theta = partition.vector(objective.model)
    moved = sampled_diagonal(
        objective, batches, partition, generator=seeded(1), parameters=partition.unflatten(theta + 0.1)
    )
    partition.assign(objective.model, theta + 0.1)
    assert torch.equal(moved, sampled_diagonal(objective, batches, partition, generator=seeded(1)))


def test_a_long_batch_is_worked_on_in_pieces_that_make_up_one_draw(monkeypatch):
    objective, _, partition = setting("decoder_ragged")
    g = seeded(2)
    batches = [(torch.randint(7, (n, 4), generator=g), labels(g, 7, n, 4, ignore=0.3)) for n in (5, 2)]
    whole = sampled_diagonal(objective, batches, partition, generator=seeded(1))
    monkeypatch.setattr(splitting, "POSITIONS_AT_ONCE", 8)
    assert len(objective.pieces(batches[0])) == 3
    pieces = sampled_diagonal(objective, batches, partition, generator=seeded(1))
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-16)


def test_a_loss_with_no_known_law_of_labels_is_named():
    objective, batches, partition = setting("custom_loss")
    with pytest.raises(UserError, match="got logcosh: use one of them"):
        sampled_diagonal(objective, batches, partition, generator=seeded(0))


def test_its_mean_is_backpacks_exact_diagonal():
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    g = seeded(3)
    model = redraw(nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)), g)
    x, y = real(g, 40, 3), labels(g, 3, 40)
    objective, partition = Objective(model), Partition.of(model)
    pieces = [(x[:20], y[:20]), (x[20:], y[20:])]
    draws = torch.stack([sampled_diagonal(objective, pieces, partition, generator=g) for _ in range(200)])
    twin, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss(twin(x.requires_grad_()), y).backward()  # its hooks warn where the input wants no gradient
    named = twin.named_parameters()
    theirs = partition.flatten({name: p.diag_ggn_exact for name, p in named})  # type: ignore[attr-defined]
    z = (draws.mean(0) - theirs) / (draws.std(0) / len(draws) ** 0.5)
    assert float(z.square().mean()) < 1.6 and float(z.abs().max()) < 4.5
