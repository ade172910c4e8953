"""What an objective has found out of how its model's outputs and its batches' targets meet, at the first batches it met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.batches import Batch
from hessprobe.problem.class_dimension import LAST, check_known, classes_last, found_place, possible
from hessprobe.problem.losses import Loss
from hessprobe.problem.own_loss import (
    Auxiliary,
    OwnLoss,
    Reading,
    found_feed,
    less_auxiliary,
    own_loss,
    read,
)

TRIES = 3  # batches that may be asked before what they have not told stays unknown


class Readings:
    """Whether labels are shifted, what else the model makes of them, which loss that is, and where the classes are.

    Args:
        loss: the objective's.
        auxiliary: as of an objective.
        default: nothing was said of how to take a batch apart (forward=, targets=).
        own_counts: nor of the loss: the model's own, where it has one, is what is trained.
        batch_first: whether sequences come first.

    Attributes:
        met: whether any batch was met.
        looked: whether outputs have been shown to the loss (`check_outputs`).
        presumes: whether it is still open that the model's outputs without its labels are those with them.
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
        if isinstance(auxiliary, str) and auxiliary != "ignore":
            raise UserError(
                f"auxiliary={auxiliary!r}: wanted 'ignore', or a function (model, batch) -> the auxiliary loss that is added"
            )
        self.model, self.auxiliary = model, auxiliary
        self.default, self.own_counts = default, own_counts
        self._given, self._reading = loss, Reading()
        # Those who write forward= put classes last; and who puts positions first does.
        self._place: str | None = None if default and batch_first else LAST
        self._probabilities_second = False
        self.batch_first = batch_first
        self._labels_tried, self._places_tried = 0, 0
        self.met = self.presumes = self.looked = False

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
        if self._asks(batch):
            positions = labels.shape[1] if labels.dim() > 1 else 1
            self._read(some(max(1, min(labels.shape[0], 8192 // max(1, positions)))))
        self._learn(labels, some, forward)

    def look(
        self,
        batch: Batch,
        labels: Tensor,
        some: Callable[[int], Batch],
        forward: Callable[[nn.Module, Batch], Tensor],
    ) -> Tensor:
        """Returns what the model returns for a batch, and finds out by the same pass what `meet` asks several for.

        The one pass is with the labels where the model's own loss is not known yet; that it gives the same outputs without
        them is presumed (`presumes`) until `agreed` or `settle` is called. Where as many classes as positions leave open
        which dimension is theirs, or two readings of the labels have one loss, further passes follow. Arguments and
        errors: see `meet`.
        """
        self.met, z = True, None
        if self.default and self._asks(batch):
            own = self._read(batch, presume=True)
            z = None if own is None else own.logits
            self.presumes = z is not None
        if z is None:
            z = forward(self.model, batch)
        elif not self.batch_first and z.dim() > 1:
            z = z.transpose(0, 1)
        if self.default:
            self._learn(labels, some, forward, z)
        return z

    def _learn(
        self,
        labels: Tensor,
        some: Callable[[int], Batch],
        forward: Callable[[nn.Module, Batch], Tensor],
        outputs: Tensor | None = None,
    ) -> None:
        """Finds out where probabilities and classes stand: from outputs where they tell, else by passes."""
        if labels.is_floating_point() and labels.dim() > 2 and self.loss.family == "softmax":
            self._probabilities_second = _sums_to_one(labels, 1) and not _sums_to_one(labels, -1)
        if labels.is_floating_point() or labels.dim() < 2 or self._place or self._places_tried >= TRIES:
            return
        places = None if outputs is None else possible(outputs, labels)
        if places is None or len(places) == 2:
            self._place = found_place(self.model, forward, some(1), labels[:1])
        elif places:
            self._place = places[0]
        self._places_tried += 1

    def agreed(self) -> None:
        """Says that outputs without labels have been seen to be those with them."""
        self.presumes = False

    def settle(self, batch: Batch) -> bool:
        """Finds out how the model is called for the outputs of its own loss, and tells whether it is another way.

        Cost: 2 to 3 forward passes.
        """
        before, own, self.presumes = self.feed, own_loss(self.model, batch), False
        feed = before if own is None else found_feed(self.model, batch, own)
        self._reading = replace(self._reading, feed=feed)
        return feed != before

    def _asks(self, batch: Batch) -> bool:
        """Tells whether the model is to be asked how it reads labels."""
        return (
            isinstance(batch, Mapping)
            and "labels" in batch
            and not self._reading.settled
            and self._labels_tried < TRIES
        )

    def _read(self, batch: Mapping[str, Any], *, presume: bool = False) -> OwnLoss | None:
        own = own_loss(self.model, batch)
        self._reading = read(
            self.model,
            batch,
            self._given,
            self.auxiliary,
            own,
            own_counts=self.own_counts,
            presume=presume,
        )
        self._labels_tried += 1
        return own

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
