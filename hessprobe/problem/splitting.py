"""Whether a batch may be measured in pieces of its sequences, asked here alone; and how many go through a model at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hessprobe.machine.devices import uses_tf32
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.batches import Batch, pieces_of, tensors_of
from hessprobe.problem.measuring import measuring

if TYPE_CHECKING:
    from hessprobe.problem.objective import Objective

# Positions (tokens) that go through the model at once. They fill any device, and a longer batch is done in pieces, since
# memory grows with them: a decoder's logits alone take 1 GiB in float32 at a vocabulary of 32,000.
POSITIONS_AT_ONCE = 8192


def sequences_at_once(count: int, positions: int) -> int:
    """Returns how many of `count` sequences of so many positions each go through the model together: even pieces."""
    most = max(1, POSITIONS_AT_ONCE // max(1, positions))
    return -(-count // -(-count // most)) if count else 1


def split(objective: Objective, batch: Batch, pieces: int) -> list[Batch]:
    """Returns the batch as that many batches of its sequences, or whole; see `Objective.split`."""
    if pieces < 2 or objective.splits is False:
        return [batch]
    found = _cut_into(objective, batch, pieces)
    return found if len(found) == 1 or _are_apart(objective, batch, pieces) else [batch]


def can_be_cut(objective: Objective, batch: Batch, *, most: int | None = None) -> bool:
    """Tells whether a batch's sequences give the same outputs without each other's company; a single one has none.

    Args:
        most: sequences to look at; default: as many as go through the model at once.

    Cost: two forward passes, once for an objective; of half as many sequences, and so on, where memory runs out.
    """
    if next(tensors_of(batch), None) is None:
        return False
    count = objective.sequences(batch)
    if most is not None and count > most:
        batch, count = objective.cut(batch, 0, most), most
    while True:
        try:
            return len(split(objective, batch, 2)) == 2
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if count < 4:
            return True  # not even two run together: alone they do, or not at all
        count //= 2  # half of the sequences tell the same
        batch = objective.cut(batch, 0, count)


def _cut_into(objective: Objective, batch: Batch, pieces: int) -> list[Batch]:
    return pieces_of(batch, pieces, objective.sequences(batch), batch_first=objective.batch_first)


def _are_apart(objective: Objective, batch: Batch, pieces: int) -> bool:
    """Tells whether sequences do not see each other, once: from as many as go through the model at once."""
    if objective.splits is None:
        count, positions = objective.sequence_shape(batch)
        some = objective.cut(batch, 0, min(count, max(2, sequences_at_once(count, positions))))
        seen = agree(objective, some, _cut_into(objective, some, pieces))
        if seen is None:
            return True  # a head that starts at zero: equal, and still undecided
        objective.splits = seen
    return bool(objective.splits)


def agree(objective: Objective, batch: Batch, pieces: Sequence[Batch]) -> bool | None:
    """Tells whether pieces have the targets and outputs of the batch they make up; None where outputs are all zero.

    Pieces that cannot be run do not. Cost: two forward passes of the batch.
    """
    with measuring(objective.model, forward_mode=False), torch.no_grad():
        whole = objective.outputs(batch)
        try:
            parts = [objective.targets(piece) for piece in pieces]
            if not torch.equal(torch.cat(parts), objective.targets(batch)):
                return False
            joined = torch.cat([objective.outputs(piece) for piece in pieces])
        except (
            Exception
        ) as error:  # whatever forward=, targets= or the model say of a batch they are not made for
            if is_out_of_memory(error):
                raise
            return False
    if joined.shape != whole.shape:
        return False
    if not bool(whole.any()) and not bool(joined.any()):
        return None
    return same_outputs(whole, joined)


def same_outputs(expected: Tensor, came: Tensor, *, halved: bool = False) -> bool:
    """Tells rounding from another function: outputs of zeros agree, a head that starts there has nothing to show.

    Args:
        halved: whether activations are in half precision, whatever outputs are in.
    """
    if torch.equal(expected, came):
        return True
    eps = torch.finfo(torch.bfloat16 if halved else expected.dtype).eps
    if uses_tf32(expected.device):
        eps = max(eps, 2.0**-11)
    return gap_of(expected, came) <= eps**0.6


def gap_of(expected: Tensor, came: Tensor) -> float:
    """Returns how far outputs are from those expected, in the norm of these."""
    return float((expected - came).norm() / expected.norm())
