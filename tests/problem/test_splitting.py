"""Whether a batch can be cut is asked in one place, remembered, and asked of less where memory runs out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hessprobe.problem.objective import Objective
from hessprobe.problem.splitting import can_be_cut, same_outputs


class Centred(nn.Module):
    """Takes the batch's mean from its inputs, where it is told to: sequences then see each other."""

    def __init__(self, *, centred: bool, most: int = 99) -> None:
        super().__init__()
        self.linear, self.centred, self.most = nn.Linear(3, 2), centred, most
        # Not a list of the module's own: measuring puts a model's state back, this too.
        ran: list[int] = []
        self.note, self.noted = ran.append, lambda: ran

    def forward(self, x: Tensor) -> Tensor:
        self.note(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.linear(x - x.mean(0) if self.centred else x)


def batch(sequences: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(sequences, 3, generator=draws), torch.zeros(sequences, dtype=torch.long)


def test_the_answer_is_seen_once_and_serves_all_who_ask():
    for centred in (False, True):
        model = Centred(centred=centred)
        objective = Objective(model)
        assert can_be_cut(objective, batch(8)) is objective.splits is not centred
        ran = len(model.noted())
        assert can_be_cut(objective, batch(4)) is not centred
        assert len(objective.split(batch(8), 4)) == (1 if centred else 4) and len(model.noted()) == ran > 1
    assert not can_be_cut(Objective(Centred(centred=False)), batch(1))  # one has nothing to be cut from


def test_no_more_is_looked_at_than_is_asked_for_or_fits():
    model = Centred(centred=False)
    assert can_be_cut(Objective(model), batch(9), most=2) and set(model.noted()) == {1, 2}
    model = Centred(centred=True, most=3)
    assert not can_be_cut(Objective(model), batch(12)) and model.noted()[:3] == [12, 6, 3]


def test_a_batch_that_is_no_tree_of_tensors_cannot_be_cut():
    class Held:
        x = torch.ones(4, 3)

    objective = Objective(
        nn.Linear(3, 2),
        forward=lambda model, held: model(held.x),
        targets=lambda held: torch.zeros(len(held.x), dtype=torch.long),
    )
    assert not can_be_cut(objective, Held())


def test_rounding_is_told_from_another_function_by_the_outputs_precision():
    whole = torch.ones(100, dtype=torch.float64)
    assert same_outputs(whole, whole + 1e-12) and not same_outputs(whole, whole + 1e-6)
    assert same_outputs(whole.float(), whole.float() + 1e-6) and same_outputs(
        whole, whole + 1e-3, halved=True
    )
    assert same_outputs(torch.zeros(3), torch.zeros(3)) and not same_outputs(torch.zeros(3), torch.ones(3))
