"""Whether a row may be trusted: the model repeats itself, its sequences are apart, and the loss measured is the one trained.

A step's whole batch goes through the model once as it is measured (eval mode, float32), its middle sequences once more
alone: the same outputs mean that nothing random is left on, nothing moves from call to call, and no sequence sees
another. One pass more, as a rule, compares the loss with the loop's, or train mode with eval mode. A model's own loss is
compared where its labels are met first (problem.own_loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem.batches import Batch, tensors_of
from hessprobe.problem.losses import AutogradLoss
from hessprobe.problem.measuring import measuring
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.modes import (
    activation_types,
    batch_statistics,
    random_states,
    reseed,
    talks_in_training,
    training_modes,
)
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.sequences_apart import check_apart
from hessprobe.problem.trained_loss import (
    Losses,
    Trained,
    another_function,
    another_loss,
    compare,
)

GROUPS = 32  # of tokens, whose losses tell how far chance moves their mean
HALF = (torch.float16, torch.bfloat16)
Kept = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the checks of a row have found; losses in nats per token, NaN for what was not compared in this row.

    Attributes:
        loss_trained: of the step's whole batch, as the loop passed it.
        loss_whole_batch: of the same as it is measured: in eval mode, at theta before the step.
        loss_train_mode: of the same in train mode.
        activation_bits: of the least precise activation while the model is measured: 64, 32 or 16.
        notes: what a reader should know of it, a sentence each.
    """

    loss_trained: float = nan
    loss_whole_batch: float = nan
    loss_train_mode: float = nan
    activation_bits: float = nan
    notes: tuple[str, ...] = ()

    @property
    def row(self) -> dict[str, float]:
        """The variables of a row."""
        names = ("loss_trained", "loss_whole_batch", "loss_train_mode", "activation_bits")
        return {name: getattr(self, name) for name in names}


UNCHECKED = Checked()


class RowChecks:
    """Checks a step's batch once for every shape it comes in.

    Args:
        objective: the model and its loss. Its other processes are not asked: each checks its own batches.
        partition: of the parameters that are measured.
        kept: model -> a context that puts back what passes change: buffers, random states, modes.
    """

    def __init__(self, objective: Objective, partition: Partition, kept: Kept) -> None:
        self.objective, self.partition, self._kept = objective, partition, kept
        self._passed: dict[object, tuple[set[str], float]] = {}

    def check(
        self,
        batches: Batch | Sequence[Batch],
        theta: Tensor | None = None,
        trained: Any = None,
        *,
        before: bool = True,
    ) -> Checked:
        """Returns what was found of a step's micro-batches; nothing runs for what was checked in their shapes before.

        Args:
            batches: the micro-batches with a sequence, on the model's device.
            theta: the parameters (p,) to check at; None: the model's own.
            trained: the loss that the loop computed on the batch, or the list of its micro-batches' losses.
            before: whether that loss was computed at theta.

        Raises:
            UserError: outputs change from pass to pass, sequences see each other, or another loss is trained.

        Cost: at most 3 forward passes, with which the objective finds out all it asks of a first batch (`Objective.look`);
        none for a shape that has passed. Up to two more, once, where chance is shared by all tokens or batch statistics are
        trained; where a batch cannot be cut; where as many classes as positions leave their dimension open; where two
        readings of labels have one loss; where a model's outputs without labels are others; and what `auxiliary` costs.
        """
        said = Trained.of(trained)
        mean = nan if said is None else said.mean
        compared = said is not None and before and isfinite(mean)
        batches = self.objective.held(batches)
        key = _shapes(list(batches))
        passed, bits = self._passed.get(key, (set(), nan))
        if passed and (not compared or "trained" in passed):
            return Checked(loss_trained=mean, activation_bits=bits)
        with self._kept(self.objective.model), torch.no_grad():
            leaves = None if theta is None else self.partition.unflatten(theta)
            row = _Row(self.objective.alone, batches, leaves, self._kept)
            found = row.found(said if compared else None, apart="apart" not in passed)
        if self.objective.processes.count == 1 and row.cuts is not None and self.objective.splits is None:
            self.objective.splits = row.cuts
        self._passed[key] = ({"apart", "trained"} if compared else {"apart"}, found.activation_bits)
        return replace(found, loss_trained=mean)


class _Row:
    """One step's batch being checked, at one theta."""

    def __init__(
        self, objective: Objective, batches: MicroBatches, leaves: Mapping[str, Tensor] | None, kept: Kept
    ) -> None:
        self.objective, self.model, self.batches = objective, objective.model, batches
        self.leaves, self.kept = leaves, kept
        self.device = next(self.model.parameters()).device
        self.half = any(p.dtype in HALF for p in self.model.parameters())
        self.cuts: bool | None = None  # see problem.sequences_apart.Apart
        self._largest = batches.counts.index(max(batches.counts))
        self._outputs = torch.empty(0)  # the largest micro-batch's
        self._linear = self._with_labels = (
            False  # whether the loss has no curvature; whether labels went with the outputs
        )

    def found(self, said: Trained | None, *, apart: bool) -> Checked:
        with measuring(self.model, forward_mode=False), activation_types(self.model) as seen:
            measured = self._losses(self.leaves, keep=True)
        bits = float(min((torch.finfo(dtype).bits for dtype in seen), default=nan))
        notes = (_HALVED,) * (bits < 32) + (_LINEAR,) * self._linear
        if apart:
            batch = self.batches[self._largest]
            seen = check_apart(self.objective, batch, self._outputs, self.leaves, halved=bits < 32)
            self.cuts, notes = seen.cuts, notes + seen.notes
        self._outputs = torch.empty(0)
        if said is not None and measured.weighs_micro_batches(said):
            notes += (_MEAN_OF_MEANS,)
        found = Checked(loss_whole_batch=measured.whole, activation_bits=bits, notes=notes)
        if not isfinite(measured.whole):  # the row itself will say so
            return found
        if said is not None:
            return replace(found, loss_train_mode=self._compared(said, measured))
        return self._in_train_mode(found, measured)

    @property
    def _half_slack(self) -> float:
        return 1e-2 if self.half else 0.0

    def _losses(self, leaves: Mapping[str, Tensor] | None, *, keep: bool = False) -> Losses:
        sums, groups, classes, largest, eps = [], [], 0, 0.0, 0.0
        before = random_states(self.device)
        for i, batch in enumerate(self.batches):
            with torch.no_grad():  # `measuring` asks for gradients
                z = (self.objective.look if keep else self.objective.outputs)(batch, leaves)
                y = self.objective.targets(batch)
            if keep and self.objective.presumes and not self._with_labels:
                self._largest, self._with_labels = i, True  # to be compared with what there is without them
            if keep and i == self._largest:
                self._outputs = z
                loss = self.objective.loss_function
                self._linear = isinstance(loss, AutogradLoss) and loss.is_linear(z, y)
            sums.append(self.objective.loss_function.value(z, y).double())
            groups, classes = groups + self._grouped(batch, z, y), z.shape[1]
            largest, eps = max(largest, float(z.abs().max())), max(eps, torch.finfo(z.dtype).eps)
        if keep:
            self.batches.looked_at(classes)
        parts, counts = zip(*groups, strict=True)
        return Losses(
            sums=torch.stack(sums),
            tokens=torch.tensor(self.batches.weights, dtype=torch.float64, device=sums[0].device),
            group_sums=torch.stack(parts).double(),
            group_tokens=torch.stack(counts).double(),
            largest=largest,
            eps=eps,
            drew=random_states(self.device) != before,
        )

    def _grouped(self, batch: Batch, z: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns (sum of losses, tokens with a target) of groups of tokens, which make up the micro-batch."""
        loss, (count, positions) = self.objective.loss_function, self.objective.sequence_shape(batch)
        # Masks may be shared by a sequence's tokens, and a function of the caller's may know positions: whole sequences.
        known = isinstance(loss, AutogradLoss) or count >= 8
        unit = positions if known and count * positions == len(z) else 1
        wanted = -(-GROUPS // len(self.batches))
        size = unit * max(1, -(-len(z) // unit // wanted))
        parts = [slice(start, start + size) for start in range(0, len(z), size)]
        return [(loss.value(z[part], y[part]), loss.weights(y[part]).sum()) for part in parts]

    def _run(self, *, statistics: bool = False, autocast: bool = False, seed: int = 0) -> Losses:
        """Runs the batch as training does: in the modules' own modes and the parameters' own precision.

        Where the model cannot (its loop enters autocast, or casts what goes in), it runs as it is measured but for modes.

        Args:
            statistics: batch statistics alone, and else as in eval mode.
            autocast: in bfloat16.
            seed: of what is drawn; what training draws is not known.
        """
        if self.half or autocast:
            try:
                return self._once(self._own_precision(), statistics=statistics, autocast=autocast, seed=seed)
            except (RuntimeError, TypeError, ValueError):  # of types that do not fit
                pass
        return self._once(self.leaves, statistics=statistics, autocast=False, seed=seed)

    def _once(
        self, leaves: Mapping[str, Tensor] | None, *, statistics: bool, autocast: bool, seed: int
    ) -> Losses:
        only = batch_statistics(self.model) if statistics else None
        with (
            self.kept(self.model),
            torch.no_grad(),
            training_modes(self.model, only),
            torch.autocast(self.device.type, torch.bfloat16, enabled=True) if autocast else nullcontext(),
        ):
            reseed(seed)
            return replace(self._losses(leaves), halved=autocast or self.half)

    def _own_precision(self) -> Mapping[str, Tensor] | None:
        if self.leaves is None or not self.half:
            return self.leaves
        types = {name: p.dtype for name, p in self.model.named_parameters()}
        return {name: x.to(types.get(name, x.dtype)) for name, x in self.leaves.items()}

    def _compared(self, said: Trained, measured: Losses) -> float:
        statistics = batch_statistics(self.model)
        if not talks_in_training(self.model):
            try:
                return compare(said, measured, self._run, statistics=statistics, half=self.half)
            except UserError:
                raise
            except Exception as error:  # nothing is known of how it trains, only that it is not this
                raise UserError(another_loss(said, measured)) from error
        if measured.gap(said) <= measured.rounding + said.precision * abs(said.mean):
            return nan
        # A pass in train mode would wait for the other processes, which may have no cause to make one.
        if statistics:
            raise UserError(another_function(measured.whole, said.mean, statistics, said))
        raise UserError(another_loss(said, measured))

    def _in_train_mode(self, found: Checked, measured: Losses) -> Checked:
        """Adds the loss in train mode, and a note where it is another function's."""
        if talks_in_training(self.model) or not any(module.training for module in self.model.modules()):
            return found
        statistics = batch_statistics(self.model)
        try:
            trained = self._run(statistics=bool(statistics))
        except Exception:  # only its loop knows how it trains
            return found
        found = replace(found, loss_train_mode=trained.whole)
        allowed = measured.rounding + self._half_slack * abs(measured.whole)
        if trained.drew or abs(trained.whole - measured.whole) <= allowed:
            return found
        note = another_function(measured.whole, trained.whole, statistics, None)
        return replace(found, notes=(*found.notes, note))


_HALVED = (
    "activations are in half precision while the model is measured (autocast inside its forward, or .half() and "
    ".bfloat16() of activations): curvature is that of the rounded function, and its errors are those of 8 to 11 bits. "
    "Enter autocast around the training step instead of inside forward"
)
_LINEAR = (
    "the loss is linear in the model's outputs: it has no curvature of its own, so the Gauss-Newton matrix is 0, gn_gap is "
    "not a number, and what curvature there is is the model's own"
)
_MEAN_OF_MEANS = (
    "micro-batches of unequal numbers of tokens with a target, and the loss passed is the mean of their means (as of "
    "loss / steps): there a token of a short micro-batch weighs more, while rows weigh all tokens alike; loss_trained "
    "stands beside loss_whole_batch. To train what is measured, divide each micro-batch's sum by the tokens of all"
)


def _shapes(thing: Any) -> object:
    """Returns what makes a batch another one to be checked: its structure, and its tensors' shapes and types."""
    if isinstance(thing, Tensor):
        return tuple(thing.shape), thing.dtype
    if isinstance(thing, Mapping):
        return tuple((key, _shapes(value)) for key, value in thing.items())
    if isinstance(thing, (list, tuple)):
        return type(thing).__name__, tuple(_shapes(value) for value in thing)
    return type(thing).__name__, tuple((tuple(x.shape), x.dtype) for x in tensors_of(thing))
