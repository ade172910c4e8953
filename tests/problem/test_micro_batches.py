"""A batch is listed, counted and checked once, and what was checked goes through every door as it is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.errors import UserError
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.problem.losses import CrossEntropy
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition

CLASSES, IGNORED = 5, -100


class Tokens(nn.Module):
    """An embedding and a head: (b, t) -> (b, t, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, CLASSES)
        for p in self.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids).tanh())


def batch(sequences: int, positions: int, ignored: int = 0) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets, the first `ignored` of them without one."""
    draws = torch.Generator().manual_seed(sequences)
    targets = torch.randint(CLASSES, (sequences, positions), generator=draws)
    targets.view(-1)[:ignored] = IGNORED
    return torch.randint(7, (sequences, positions), generator=draws), targets


def ragged() -> list[tuple[Tensor, Tensor]]:
    return [batch(3, 4, ignored=5), batch(0, 4), batch(2, 6, ignored=12), batch(1, 2)]


def test_sequences_positions_and_tokens_of_each_are_known_and_empty_ones_left_out():
    found = Objective(Tokens()).micro_batches(ragged())
    assert len(found) == 3 and found.counts == (3, 2, 1) and found.sequences == 6
    assert found.shapes == ((3, 4), (2, 6), (1, 2))
    assert found.token_counts == (7, 0, 2) and found.tokens == found.weight == 9
    assert [w.tolist() for w in found.sequence_weights] == [[0, 3, 4], [0, 0], [2]]
    assert found.with_targets.counts == (3, 1) and found[1:].counts == (2, 1)


def test_one_batch_is_a_list_of_one_and_its_entries_are_the_callers_own():
    x, y = batch(3, 4)
    (found,) = Objective(Tokens()).micro_batches((x, y))
    assert found[0] is x and found[1] is y


def test_sequences_are_numbered_through_all_micro_batches():
    objective = Objective(Tokens())
    found = objective.micro_batches(ragged())
    assert list(found.spans(2, 6)) == [(0, 2, 3), (1, 0, 2), (2, 0, 1)]
    cut: list[tuple[int, int, int]] = []

    def taken(number: int, low: int, high: int) -> Sequence[Tensor]:
        cut.append((number, low, high))
        return objective.cut(found[number], low, high)

    part = found.between(2, 5, taken)
    assert part.counts == (1, 2) and cut == [(0, 2, 3)] and part[1] is found[1]
    assert torch.equal(part[0][1], found[0][1][2:])


def test_what_is_checked_goes_through_every_door_without_another_look(monkeypatch):
    looks: list[int] = []
    own = CrossEntropy.check
    monkeypatch.setattr(
        CrossEntropy,
        "check",
        lambda self, targets, classes=None: (looks.append(len(targets)), own(self, targets, classes))[1],
    )
    objective = Objective(Tokens())
    partition = Partition.of(objective.model, "module")
    found = objective.micro_batches(ragged())
    assert sorted(looks) == [2, 12, 12]  # tokens of each: once
    looks.clear()
    assert objective.micro_batches(found) is objective.alone.micro_batches(found) is found
    v = torch.ones(2, partition.size)
    for kind in (GaussNewton, Hessian):
        operator = kind(objective, found, partition)
        operator.apply(v), operator.linearised(2**20).apply(v[:1])
    layer_kernels(objective, found, partition, generator=torch.Generator().manual_seed(0))
    layer_kernels(objective, found[:1], partition, generator=torch.Generator().manual_seed(0))
    assert not looks
    for _ in range(3):  # how many classes there are is known with the first outputs: one look more
        objective.gradient(found, partition)
        objective.loss(found)
    assert sorted(looks) == [2, 12, 12]


def test_of_another_objective_it_is_checked_anew():
    found = Objective(Tokens()).micro_batches(batch(3, 4))
    other = Objective(Tokens(), ignore_index=2)
    again = other.micro_batches(found)
    assert again is not found and again.tokens == int((found[0][1] != 2).sum())


def test_a_class_too_high_is_refused_as_soon_as_outputs_are_known_and_a_negative_one_before():
    objective = Objective(Tokens())
    partition = Partition.of(objective.model, "module")
    x, y = batch(3, 4)
    y[2, 3] = CLASSES
    found = objective.micro_batches((x, y))
    for again in (found, found[:1]):
        with pytest.raises(UserError, match="5 classes, 0 to 4"):
            objective.gradient(again, partition)
    y[2, 3] = -1
    with pytest.raises(UserError, match="ignore_index=-1"):
        objective.micro_batches((x, y))


def test_a_slice_without_a_target_is_refused_though_its_whole_was_not():
    objective = Objective(Tokens())
    found = objective.micro_batches(ragged())
    with pytest.raises(UserError, match="no token carries a target"):
        objective.micro_batches(found[1:2])
    assert objective.tokens(found[1:2]) == 0


def test_counting_alone_finds_nothing_out_and_takes_none_too():
    objective = Objective(Tokens())
    assert objective.counted([]).tokens == 0 and objective.counted([batch(0, 4)]).sequences == 0
    assert not objective.counted([batch(2, 4, ignored=8)]).hold_targets
    with pytest.raises(UserError, match="no batch given"):
        objective.micro_batches([])


def test_placing_detaches_and_keeps_what_is_known():
    inputs = torch.ones(2, 3, requires_grad=True)
    objective = Objective(nn.Linear(3, CLASSES))
    found = objective.micro_batches((inputs, torch.tensor([1, IGNORED])))
    there = found.placed(torch.device("cpu"))
    assert isinstance(there, MicroBatches) and not there[0][0].requires_grad and there.tokens == 1
    assert objective.micro_batches(there) is there
