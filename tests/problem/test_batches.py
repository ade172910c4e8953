"""A batch is a tree of tensors that share a dimension of sequences; a list is micro-batches if its entries are batches."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.batches import cut, mapped, tensors_of
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import real, redraw, seeded

VOCABULARY, SEQUENCES, POSITIONS = 11, 6, 5
Pair = namedtuple("Pair", "inputs targets")


@dataclass(frozen=True)
class Sample:
    """A batch of somebody's own."""

    inputs: Any
    targets: Tensor
    name: str = "sample"


class Masked(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids) * mask[..., None]))


def three() -> tuple[Tensor, Tensor, Tensor]:
    g = seeded(1)
    ids, y = (torch.randint(VOCABULARY, (SEQUENCES, POSITIONS), generator=g) for _ in range(2))
    return ids, torch.rand(SEQUENCES, POSITIONS, generator=g, dtype=torch.float64).round(), y


def masked() -> nn.Module:
    return redraw(Masked(), seeded(0))


TREES = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named": Pair,
    "mapping": lambda x, y: {"x": x, "y": y},
    "user mapping": lambda x, y: UserDict({"x": x, "y": y}),
    "dataclass": Sample,
    "nested": lambda x, y: ({"x": (x, [x])}, Sample(x, y)),
    "bare": lambda x, y: x,
}


@pytest.mark.parametrize("kind", TREES)
def test_every_tree_is_cut_into_one_of_its_kind(kind):
    x, y = torch.arange(12).view(6, 2), torch.arange(6)
    part = cut(TREES[kind](x, y), 1, 4, 6)
    assert type(part) is type(TREES[kind](x, y))
    for got, whole in zip(tensors_of(part), tensors_of(TREES[kind](x, y)), strict=True):
        assert torch.equal(got, whole[1:4])


def test_what_counts_no_sequences_stays_whole():
    x, mask, positions = torch.zeros(6, 4), torch.zeros(4, 4), torch.arange(4)
    part = cut(({"x": x, "mask": mask, "scale": torch.tensor(2.0)}, positions, "name", 3), 0, 2, 6)
    assert part[0]["x"].shape == (2, 4) and part[0]["mask"] is mask and part[1] is positions
    assert part[0]["scale"].dim() == 0 and part[2:] == ("name", 3)


def test_sequences_in_the_second_dimension_are_cut_there():
    x, lengths, y = torch.arange(12).view(2, 6), torch.arange(6), torch.zeros(2, 6)
    part = cut((x, lengths, y), 1, 3, 6, batch_first=False)
    assert torch.equal(part[0], x[:, 1:3]) and torch.equal(part[1], lengths[1:3]) and part[2].shape == (2, 2)


def test_an_object_that_is_no_tree_cannot_be_cut():
    with pytest.raises(UserError, match="cannot take single sequences from a batch of type object"):
        cut(object(), 0, 1, 2)
    assert mapped("text", lambda x: x) == "text"


def test_a_loaders_list_of_three_tensors_is_one_batch():
    ids, mask, y = three()
    model = masked()
    objective = Objective(model, forward=lambda m, b: m(b[0], b[1]), targets=lambda b: b[2])
    wanted = F.cross_entropy(model(ids, mask).flatten(0, 1), y.flatten())
    torch.testing.assert_close(objective.loss([ids, mask, y]), wanted)
    torch.testing.assert_close(objective.loss([[ids, mask, y], [ids, mask, y]]), wanted)
    assert objective.tokens([ids, mask, y]) == SEQUENCES * POSITIONS
    assert objective.tokens([(ids, mask, y)] * 2) == 2 * SEQUENCES * POSITIONS


def test_a_list_of_three_without_a_word_on_it_is_refused():
    with pytest.raises(UserError, match="got tuple of 3; pass forward= and targets="):
        Objective(masked()).loss(list(three()))


def test_bare_tensors_and_lists_of_them():
    ids, _, _ = three()
    model = redraw(nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)), seeded(0))
    objective = Objective(model, forward=lambda m, b: m(b[:, :-1]), targets=lambda b: b[:, 1:])
    wanted = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(objective.loss(ids), wanted)
    torch.testing.assert_close(objective.loss([ids[:2], ids[2:]]), wanted)


def test_nested_inputs_are_handed_on_as_the_model_takes_them():
    ids, mask, y = three()
    model = masked()
    wanted = F.cross_entropy(model(ids, mask).flatten(0, 1), y.flatten())
    for inputs in ((ids, mask), [ids, mask], {"ids": ids, "mask": mask}):
        torch.testing.assert_close(Objective(model).loss((inputs, y)), wanted)
        torch.testing.assert_close(Objective(model).loss([(inputs, y), (inputs, y)]), wanted)
        assert [len(b[1]) for b in Objective(model).split((inputs, y), 2)] == [3, 3]


def test_a_list_that_can_be_read_both_ways_is_refused():
    square = torch.zeros(4, 4, dtype=torch.long)
    objective = Objective(nn.Embedding(4, 4), forward=lambda m, b: m(b[0]), targets=lambda b: b[0] + 0)
    with pytest.raises(UserError, match=r"both as one batch and as micro-batches.*tuple\(batch\)"):
        objective.loss([square, square])


def test_micro_batches_without_a_sequence_are_left_out():
    ids, _, y = three()
    model = redraw(nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)), seeded(0))
    objective = Objective(model)
    none = (ids[:0], y[:0])
    assert len(objective.micro_batches([none, (ids, y), none])) == 1
    torch.testing.assert_close(objective.loss([none, (ids, y)]), objective.loss((ids, y)))
    with pytest.raises(UserError, match="no token carries a target"):
        objective.loss([none, none])


class Recurrent(nn.Module):
    """A sequence-second model, as torch's recurrent ones are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(VOCABULARY, 4), nn.RNN(4, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0])


def test_sequences_second_are_the_batch_s_sequences():
    ids, _, y = three()
    model = redraw(Recurrent(), seeded(0))
    objective, partition = Objective(model, batch_first=False), Partition.of(model, "parameter")
    batch = (ids.T.contiguous(), y.T.contiguous())
    assert objective.sequence_shape(batch) == (SEQUENCES, POSITIONS)
    loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    wanted = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [model.get_parameter(n) for n in partition.names])]
    )
    torch.testing.assert_close(objective.gradient(batch, partition)[1], wanted)
    assert [b[0].shape for b in objective.split(batch, 2)] == [(POSITIONS, 3)] * 2
    torch.testing.assert_close(objective.loss(objective.split(batch, 3)), loss)


class TestClassDimension:
    """Classes second are found by shapes, or by the model where there are as many of them as positions."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(Objective(model).loss((x, y)), wanted)

    @pytest.mark.parametrize("positions", [7, 4])
    def test_a_convolution_has_them_second(self, positions):
        model = redraw(nn.Conv1d(2, 4, 1), seeded(0))
        x, y = real(seeded(1), 3, 2, positions), torch.randint(4, (3, positions), generator=seeded(2))
        self.loss(model, x, y, F.cross_entropy(model(x), y))

    def test_images_have_them_second(self):
        model = redraw(nn.Conv2d(2, 4, 1), seeded(0))
        x, y = real(seeded(1), 3, 2, 4, 4), torch.randint(4, (3, 4, 4), generator=seeded(2))
        self.loss(model, x, y, F.cross_entropy(model(x), y))

    @pytest.mark.parametrize("moved", [False, True])
    @pytest.mark.parametrize("positions", [5, 11])
    def test_a_language_model_has_them_where_its_outputs_say(self, moved, positions):
        class Model(nn.Sequential):
            def forward(self, ids: Tensor) -> Tensor:
                z = 2 * super().forward(ids)  # not the last module's own outputs
                return z.movedim(-1, 1) if moved else z

        model = redraw(Model(nn.Embedding(11, 4), nn.Linear(4, 11)), seeded(0))
        ids, y = torch.randint(11, (2, 3, positions), generator=seeded(2))
        z = model(ids)
        self.loss(model, ids, y, F.cross_entropy(z if moved else z.movedim(-1, 1), y))

    def test_what_nothing_tells_is_refused_with_both_ways_out(self):
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(real(seeded(0), 4, 4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return torch.einsum("bi,ijk->bjk", x, self.weight)

        x, y = real(seeded(1), 3, 4), torch.randint(4, (3, 4), generator=seeded(2))
        with pytest.raises(UserError, match=r"as many classes as positions.*forward=.*movedim\(1, -1\)"):
            Objective(Fixed()).loss((x, y))
        model = Fixed()
        found = Objective(model, forward=lambda m, b: m(b[0]).movedim(1, -1), targets=lambda b: b[1]).loss(
            (x, y)
        )
        torch.testing.assert_close(found, F.cross_entropy(model(x), y))

    def test_probabilities_second_are_known_by_their_sums(self):
        model = redraw(nn.Conv1d(2, 4, 1), seeded(0))
        x, y = real(seeded(1), 3, 2, 5), real(seeded(2), 3, 4, 5).softmax(1)
        self.loss(model, x, y, F.cross_entropy(model(x), y))
