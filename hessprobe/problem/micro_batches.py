"""A batch as everything behind the doors takes it: listed, counted and checked once, whatever form it came in.

Operators, kernels, optimizers and instruments are given a batch or a list of micro-batches by users, and make it
MicroBatches at their door (`Objective.micro_batches`). What is MicroBatches already passes through untouched, so that one
object may go through all of them: no target is looked at again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.problem.batches import Batch, mapped

if TYPE_CHECKING:
    from hessprobe.problem.objective import Objective


class MicroBatches(Sequence[Batch]):
    """Micro-batches of one objective, which weigh by their tokens; each is a batch as forward= and targets= take it.

    Args:
        objective: how they are read.
        batches: as they are; neither listed nor checked here (see `Objective.micro_batches`).

    Slices are MicroBatches too, and know what their whole knows.
    """

    def __init__(self, objective: Objective, batches: Sequence[Batch]) -> None:
        self.objective = objective
        self._batches = tuple(batches)
        self._read, self._classes = False, 0  # whether targets were looked at, and for how many classes

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> MicroBatches: ...
    def __getitem__(self, index: int | slice) -> Batch | MicroBatches:
        if isinstance(index, slice):
            return self.parted(self._batches[index])
        return self._batches[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def parted(self, batches: Sequence[Batch]) -> MicroBatches:
        """Returns other batches made of sequences of these: what was checked of these is not checked of them again."""
        found = MicroBatches(self.objective, batches)
        found._read, found._classes = self._read, self._classes
        return found

    def placed(self, device: torch.device) -> MicroBatches:
        """Returns the same with its tensors on the device, detached."""
        return self.parted([mapped(batch, lambda x: x.detach().to(device)) for batch in self])

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Sequences of each: the first dimension of its targets."""
        return tuple(self.objective.sequences(batch) for batch in self)

    @cached_property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(b, t) of each: its sequences, and positions of a sequence."""
        return tuple(self.objective.sequence_shape(batch) for batch in self)

    @cached_property
    def sequences(self) -> int:
        """Sequences of all."""
        return sum(self.counts)

    @cached_property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens with a target of each."""
        valid = self.objective.loss_function.valid
        return tuple(int(valid(self.objective.targets(batch)).sum()) for batch in self)

    @property
    def tokens(self) -> int:
        """Tokens with a target of all."""
        return sum(self.token_counts)

    @property
    def with_targets(self) -> MicroBatches:
        """Those of them in which some token carries a target."""
        return self.parted([batch for batch, tokens in zip(self, self.token_counts, strict=True) if tokens])

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """What each adds to `weight`."""
        weights = self.objective.loss_function.weights
        each = [weights(self.objective.targets(batch)) for batch in self]
        return tuple(float(w.double().sum()) if w.is_floating_point() else int(w.sum()) for w in each)

    @property
    def weight(self) -> float:
        """What the mean divides by: the number of tokens with a target.

        For weighted classes it is the sum of the weights of the targets' classes, for means over outputs their number.
        """
        return sum(self.weights)

    @cached_property
    def sequence_weights(self) -> tuple[Tensor, ...]:
        """Of each (b,): what its sequences add to `weight`, or their tokens with a target where all weigh alike."""
        weights = self.objective.loss_function.weights
        pairs = zip(self, self.shapes, strict=True)
        return tuple(weights(self.objective.targets(batch)).view(shape).sum(1) for batch, shape in pairs)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yields (number, low, high) of each micro-batch that has some of sequences start to stop, counted through all."""
        first = 0
        for number, count in enumerate(self.counts):
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                yield number, low, high
            first += count

    def between(self, start: int, stop: int, cut: Callable[[int, int, int], Batch]) -> MicroBatches:
        """Returns sequences start to stop, counted through all micro-batches; those wanted whole stay as they are.

        Args:
            cut: (number, low, high) -> these sequences of that micro-batch.
        """
        return self.parted(
            [
                self[number] if high - low == self.counts[number] else cut(number, low, high)
                for number, low, high in self.spans(start, stop)
            ]
        )

    def checked(self) -> MicroBatches:
        """Returns itself, having looked at every target where that was not done.

        Cost: nothing, but for the first ones of an objective: forward passes that tell how labels and outputs meet.

        Raises:
            UserError: a target that the loss cannot be meant for, or none at all.
        """
        if not self._read:
            for batch in self:
                self.objective.meet(batch)
            self._read = True
        if self.weight == 0:
            raise UserError(
                "no token carries a target: every one is ignored, so loss and curvature are 0/0; pass batches "
                "with at least one target that is not ignore_index"
            )
        return self

    def check_classes(self, classes: int) -> None:
        """Raises a UserError for targets that are none of so many classes: known as soon as there are outputs."""
        if self._classes != classes:
            for batch in self:
                self.objective.loss_function.check(self.objective.targets(batch), classes)
            self._read, self._classes = True, classes

    def looked_at(self, classes: int) -> MicroBatches:
        """Returns itself as `checked`, where each target was checked for so many classes already (`Objective.look`)."""
        self._read, self._classes = True, classes
        return self.checked()

    @property
    def hold_targets(self) -> bool:
        """Whether any label is one, shifted or not; nothing is found out of them."""
        valid = self.objective.loss_function.valid
        labels = [self.objective.labels(batch) for batch in self]
        return any(
            y.numel() > 0 if y.is_floating_point() else bool(valid(y.reshape(-1)).any()) for y in labels
        )
