"""What an objective has found out of how its model's outputs and its batches' targets meet, at the first batches it met."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hessprobe.problem.batches import Batch
from hessprobe.problem.class_dimension import LAST, check_known, classes_last, found_place
from hessprobe.problem.losses import Loss
from hessprobe.problem.own_loss import Auxiliary, Reading, less_auxiliary, own_loss, read

TRIES = 3  # batches that may be asked before what they have not told stays unknown


class Readings:
    """Whether labels are shifted, what else the model makes of them, which loss that is, and where the classes are.

    Args:
        loss: the objective's.
        auxiliary: as of an objective.
        default: nothing was said of how to take a batch apart (forward=, targets=).
        own_counts: nor of the loss: the model's own, where it has one, is what is trained.
        batch_first: whether sequences come first.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        auxiliary: Auxiliary,
        *,
        default: bool,
        own_counts: bool,
        batch_first: bool,
    ) -> None:
        self.model, self.auxiliary = model, auxiliary
        self.default, self.own_counts = default, own_counts
        self._given, self._reading = loss, Reading()
        # Those who write forward= put classes last; and who puts positions first does.
        self._place: str | None = None if default and batch_first else LAST
        self._probabilities_second = False
        self._labels_tried, self._places_tried, self.met = 0, 0, False

    @property
    def loss(self) -> Loss:
        """The loss that is measured: the one given, or the model's own of real labels."""
        return self._reading.loss or self._given

    @property
    def shifted(self) -> bool:
        """Whether a mapping's labels stand one place to the right of their outputs."""
        return self._reading.shifted

    @property
    def feed(self) -> str:
        """How the model is called with a mapping."""
        return self._reading.feed

    def meet(
        self,
        batch: Batch,
        labels: Tensor,
        some: Callable[[int], Batch],
        forward: Callable[[nn.Module, Batch], Tensor],
    ) -> None:
        """Finds out what this batch tells and others have not. Cost: nothing, or 2 to 6 forward passes of some sequences.

        Args:
            labels: the batch's, sequences first.
            some: how many sequences -> the batch's first ones.
            forward: (model, batch) -> outputs, sequences first.

        Raises:
            UserError: the model's own loss is not known here.
        """
        self.met = True
        if not self.default:
            return
        positions = labels.shape[1] if labels.dim() > 1 else 1
        if isinstance(batch, Mapping) and not self._reading.settled and self._labels_tried < TRIES:
            count = max(1, min(labels.shape[0], 8192 // max(1, positions)))
            self._reading = read(
                self.model, some(count), self._given, self.auxiliary, own_counts=self.own_counts
            )
            self._labels_tried += 1
        if labels.is_floating_point():
            if labels.dim() > 2 and self.loss.family == "softmax":
                self._probabilities_second = _sums_to_one(labels, 1) and not _sums_to_one(labels, -1)
        elif labels.dim() > 1 and self._place is None and self._places_tried < TRIES:
            self._place = found_place(self.model, forward, some(1), labels[:1])
            self._places_tried += 1

    def targets(self, labels: Tensor) -> Tensor:
        """Returns targets (sequences first) with probabilities last."""
        second = self._probabilities_second and labels.is_floating_point() and labels.dim() > 2
        return labels.movedim(1, -1) if second else labels

    def outputs(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Returns outputs (sequences first) with their classes last.

        Raises:
            UserError: nothing tells which dimension they are in.
        """
        if labels.is_floating_point():
            if outputs.shape == (*labels.shape, 1):
                return outputs.squeeze(-1)
            return self.targets(outputs) if outputs.shape == labels.shape else outputs
        check_known(outputs, labels, self._place, self.model)
        return classes_last(outputs, labels, self._place)

    def own_loss(self, batch: Batch) -> Tensor | None:
        """Returns the model's own loss on a batch, less what is auxiliary; see `Objective.own_loss`."""
        asked = self.default and self.own_counts and self.auxiliary != "ignore"
        if not asked or not isinstance(batch, Mapping) or "labels" not in batch:
            return None
        found = own_loss(self.model, batch)
        return None if found is None else less_auxiliary(self.model, batch, found.loss, self.auxiliary)


def _sums_to_one(x: Tensor, dim: int) -> bool:
    sums = x.detach().double().sum(dim)
    return x.shape[dim] > 1 and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
