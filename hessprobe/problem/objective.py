"""The model and its loss as functions of the parameters: L(theta) = (1/N) sum_n loss(f(theta, x)_n, y_n).

Sums over data are weighted by tokens with a target, never by batches: N counts them over all micro-batches. Of several
processes each runs the model on its share of the sequences, and the sums are added up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.problem.batches import (
    Batch,
    count_of,
    cut,
    default_forward,
    default_targets,
    listed,
    pieces_of,
    rearranged,
    said,
)
from hessprobe.problem.losses import Loss, loss_named
from hessprobe.problem.measuring import measuring, with_parameters
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.parameter_kinds import present
from hessprobe.problem.partition import Partition, unwrapped
from hessprobe.problem.readings import Readings
from hessprobe.problem.shares import Share, share_of
from hessprobe.problem.splitting import agree, do_not_fit
from hessprobe.problem.swapping import common_dtype

# Positions (tokens) that go through the model at once. They fill any device, and a longer batch is done in pieces, since
# memory grows with them: a decoder's logits alone take 1 GiB in float32 at a vocabulary of 32,000.
POSITIONS_AT_ONCE = 8192


@dataclass
class Trust:
    """What was found, once for a model, of the ways to differentiate it; None where not tried yet.

    Attributes:
        forward_mode: whether tangents are the transpose of backward passes.
        second: whether second derivatives by forward mode are symmetric.
    """

    forward_mode: bool | None = None
    second: bool | None = None


class Objective:
    """A model and its loss as functions of a flat parameter vector.

    Args:
        model: any nn.Module; a compiled or DDP-wrapped one is unwrapped.
        loss: "cross_entropy" (nats per token), "squared_error" (half the squared distance), "mean_squared_error",
            "binary_cross_entropy" (means over tokens and outputs), one of torch's losses as a module, a function or a
            partial (its mean is torch's: by class weights, too), or a function (outputs (n, c), targets (n, ...)) ->
            losses per token (n,), convex in the outputs.
        forward: (model, batch) -> outputs, class dimension last; default: `model(inputs)`, `.logits` of the output.
        targets: batch -> targets; default: the batch's second entry, or its "labels" (shifted where the model shifts them).
        ignore_index: class targets of this value carry no loss.
        processes: who shares the work; every one of them is given the same batches and makes the same calls.
        batch_first: whether sequences are the first dimension of a batch's tensors, targets and outputs; else the second.
        auxiliary: what the model's own loss has beside the main one, which alone is measured (a mixture of experts' router
            loss): "ignore", or a function (model, batch) -> the addition (0-d), by which the two are compared.

    A batch is a tuple `(inputs, targets)` (or a DataLoader's list of tensors), or a mapping with "labels", or any tree of
    tensors that `forward` and `targets` take apart. A list of batches stands for their union: micro-batches, weighted by
    their tokens; those without a sequence are left out.

    A mapping's labels are read as the model's own loss reads them: at the first one the model is called with its labels
    once, and shifting, decoder inputs and the loss (of real labels) are those that give the same value. Where none does,
    a UserError names both values.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Callable[[Tensor, Tensor], Tensor] | Loss = "cross_entropy",
        *,
        forward: Callable[[nn.Module, Batch], Tensor] | None = None,
        targets: Callable[[Batch], Tensor] | None = None,
        ignore_index: int = -100,
        processes: Processes = ALONE,
        batch_first: bool = True,
        auxiliary: str | Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> None:
        if isinstance(auxiliary, str) and auxiliary != "ignore":
            raise UserError(
                f"auxiliary={auxiliary!r}: wanted 'ignore', or a function (model, batch) -> the auxiliary loss that is added"
            )
        self.model = unwrapped(model)
        self.processes = processes
        self.batch_first = batch_first
        self.auxiliary = auxiliary
        self._splits: bool | None = None
        self._forward = forward or self._default_forward
        self.trust = Trust()
        self._targets = targets or default_targets
        self._readings = Readings(
            self.model,
            loss_named(loss, ignore_index),
            auxiliary,
            default=forward is None and targets is None,
            own_counts=isinstance(loss, str) and loss == "cross_entropy",
            batch_first=batch_first,
        )

    @property
    def loss_function(self) -> Loss:
        """The loss that is measured."""
        return self._readings.loss

    @property
    def alone(self) -> Objective:
        """The same objective with all of the work done in this process."""
        found = copy.copy(self)
        found.processes = ALONE
        return found

    @property
    def splits(self) -> bool | None:
        """Whether a batch is measured in pieces of its sequences (see `split`); None as long as nobody has looked."""
        return self._splits

    @splits.setter
    def splits(self, found: bool) -> None:
        self._splits = found

    def listed(self, batches: Batch | list[Batch]) -> list[Batch]:
        """Returns micro-batches as a list, one batch as a list of one, as they are; [] for none.

        Raises:
            UserError: a list that can be read both as a batch and as micro-batches.
        """
        return listed(batches, self._targets, batch_first=self.batch_first)

    def micro_batches(self, batches: Batch | list[Batch]) -> list[Batch]:
        """Returns the batches as a list, without those of no sequence; raises where none of them has a target.

        Cost: nothing, but for the first ones: forward passes that tell how labels and outputs meet (see Objective).
        """
        found = self.held(batches)
        for batch in found:
            self._meet(batch)
        self.check_targets(found)
        return found

    def held(self, batches: Batch | list[Batch]) -> list[Batch]:
        """Returns the batches as a list, without those of no sequence, as they are: nothing is found out of them."""
        found = self.listed(batches)
        if not found:
            raise UserError("no batch given: wanted a batch or a non-empty list of batches")
        return [batch for batch in found if self.sequences(batch)]

    def check_targets(self, batches: list[Batch]) -> None:
        """Raises a UserError for targets that the loss cannot be meant for, and where none of them is there."""
        for batch in batches:
            self.loss_function.check(self.targets(batch))
        if self.weight(batches) == 0:
            raise UserError(
                "no token carries a target: every one is ignored, so loss and curvature are 0/0; pass batches "
                "with at least one target that is not ignore_index"
            )

    def holds_targets(self, batches: Batch | list[Batch]) -> bool:
        """Tells whether any label is one, shifted or not; nothing is found out of the batches."""
        labels = [self.labels(batch) for batch in self.listed(batches)]
        return any(
            bool(self.loss_function.valid(y.reshape(-1)).any())
            if not y.is_floating_point()
            else y.numel() > 0
            for y in labels
        )

    def tokens(self, batches: Batch | list[Batch]) -> int:
        """Returns the number of tokens with a target in a batch or a list of micro-batches."""
        return sum(int(self.loss_function.valid(self.targets(batch)).sum()) for batch in self.listed(batches))

    def weight(self, batches: Batch | list[Batch]) -> float:
        """Returns what the mean divides by: the number of tokens with a target, but for weighted classes the sum of the
        weights of the targets' classes, and for means over outputs the number of outputs.
        """
        weights = [self.loss_function.weights(self.targets(batch)) for batch in self.listed(batches)]
        return sum(float(w.double().sum()) if w.is_floating_point() else int(w.sum()) for w in weights)

    def targets(self, batch: Batch) -> Tensor:
        """Returns the batch's targets flattened over its tokens: (n,), or (n, c) for real ones."""
        if not self._readings.met:
            self._meet(batch)
        y = self.labels(batch)
        with without_rules():
            y = self._readings.targets(y)
            if self._shifts(batch):
                y = y[:, 1:]
            if y.is_floating_point():
                return y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y.reshape(-1, 1)
            return y.reshape(-1)

    def labels(self, batch: Batch) -> Tensor:
        """Returns the batch's targets as they come, sequences first."""
        y = self._targets(batch)
        if not isinstance(y, Tensor):
            raise UserError(
                f"targets are a {type(y).__name__}: wanted a tensor, one target for every token; pass forward= and targets= "
                "to take the batch apart"
            )
        with without_rules():
            count_of(y)
            return y if self.batch_first or y.dim() < 2 else y.transpose(0, 1)

    def _meet(self, batch: Batch) -> None:
        self._check_labels(batch)
        self._readings.meet(batch, self.labels(batch), *self._asked(batch))
        if self.loss_function.looks_at_outputs and not self._readings.looked:
            self._readings.looked = True
            one = self.cut(batch, 0, 1) if self.splits else batch
            with measuring(self.model, forward_mode=False), torch.no_grad():
                z = self.outputs(one)
            self.loss_function.check_outputs(z, self.targets(one))

    def _check_labels(self, batch: Batch) -> None:
        if not (y := self.labels(batch)).is_floating_point():
            self.loss_function.check(y.reshape(-1))

    def _asked(self, batch: Batch) -> tuple[Callable[[int], Batch], Callable[[nn.Module, Batch], Tensor]]:
        return lambda count: self.cut(batch, 0, count), lambda _, some: with_parameters(
            self.model, {}, lambda: self.raw_outputs(some)
        )

    def look(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns `outputs` of a batch, and finds out by the same pass what `micro_batches` asks more passes for.

        `presumes` tells whether it is then open that the model gives these outputs without its labels too.

        Raises:
            UserError: see `outputs` and `micro_batches`.
        """
        self._check_labels(batch)
        y, asked = self.labels(batch), self._asked(batch)
        raw = with_parameters(self.model, parameters or {}, lambda: self._readings.look(batch, y, *asked))
        z, targets = self._fitted(raw, batch), self.targets(batch)
        self.loss_function.check(targets, z.shape[1])
        if self.loss_function.looks_at_outputs:
            self._readings.looked = True
            self.loss_function.check_outputs(z, targets)
        return z

    @property
    def presumes(self) -> bool:
        """Whether it is open that outputs without labels are those with them, of which `look` returned the second."""
        return self._readings.presumes

    def settle(self, batch: Batch, parameters: Mapping[str, Tensor] | None, *, agreed: bool) -> bool:
        """Settles what `look` presumed, by passes where outputs did not agree; tells whether they are others now."""
        if agreed:
            self._readings.agreed()
            return False
        return with_parameters(self.model, parameters or {}, lambda: self._readings.settle(batch))

    def _shifts(self, batch: Batch) -> bool:
        """Tells whether labels stand one place to the right of their outputs: in a mapping, not a pair."""
        return isinstance(batch, Mapping) and self._readings.shifted

    def own_loss(self, batch: Batch) -> Tensor | None:
        """Returns the model's own loss on a mapping with labels (0-d, detached, in eval mode), less `auxiliary`.

        None where the model gives none, and where another is trained: loss=, forward= or targets= were given, or
        auxiliary="ignore" says that the difference is not known. Cost: a forward pass.
        """
        return self._readings.own_loss(batch)

    def sequences(self, batch: Batch) -> int:
        """Returns how many sequences a batch holds."""
        return self.labels(batch).shape[0]

    def sequence_shape(self, batch: Batch) -> tuple[int, int]:
        """Returns (b, t): the batch's sequences, the first dimension of its targets, and positions of each."""
        count = self.sequences(batch)
        return count, self.targets(batch).shape[0] // max(1, count)

    def cut(self, batch: Batch, start: int, stop: int) -> Batch:
        """Returns sequences start to stop of a batch.

        Raises:
            UserError: a batch that is no tree of tensors.
        """
        return cut(batch, start, stop, self.sequences(batch), batch_first=self.batch_first)

    def rearranged(self, batch: Batch, order: Tensor) -> Batch | None:
        """Returns a batch with sequence order[i] in place i; None where none of its tensors counts sequences."""
        return rearranged(batch, order, self.sequences(batch), batch_first=self.batch_first)

    def split(self, batch: Batch, pieces: int) -> list[Batch]:
        """Returns the batch as that many batches of its sequences (fewer where it holds fewer), or whole.

        It stays whole where it cannot be cut (entries of other lengths, `forward` or `targets` that want all of them) and
        where sequences of one batch see each other: targets and a model's outputs on pieces are compared once with the
        whole's, of as many sequences as go through it at once. Cost: two forward passes, once.
        """
        if pieces < 2 or self._splits is False:
            return [batch]
        found = self._cut_into(batch, pieces)
        if len(found) > 1 and self._splits is None:
            count, positions = self.sequence_shape(batch)
            some = self.cut(batch, 0, min(count, max(2, sequences_at_once(count, positions))))
            seen = agree(self, some, self._cut_into(some, pieces))
            if seen is None:
                return found  # a head that starts at zero: equal, and still undecided
            self._splits = seen
        return found if self._splits or len(found) == 1 else [batch]

    def _cut_into(self, batch: Batch, pieces: int) -> list[Batch]:
        return pieces_of(batch, pieces, self.sequences(batch), batch_first=self.batch_first)

    def pieces(self, batch: Batch) -> list[Batch]:
        """Returns a batch as ones that go through the model at once: of at most POSITIONS_AT_ONCE, or a single sequence.

        It stays whole where it cannot be cut (see `split`). A piece may hold no target.
        """
        count, positions = self.sequence_shape(batch)
        return self.split(batch, -(-count // sequences_at_once(count, positions)))

    def share(self, batches: Batch | list[Batch]) -> list[Share]:
        """Returns what this process runs of micro-batches that all processes know: all of it where it is alone.

        Each has about as many of the union's sequences, in their order, and possibly none. A micro-batch that cannot be
        cut (see `split`) belongs whole to the process of its first sequence. Cost: see `split`, on two sequences, once.
        """
        return share_of(self, self.micro_batches(batches))

    def own_pieces(self, batches: Batch | list[Batch]) -> list[Batch]:
        """Returns this process's `share` of micro-batches in `pieces`; none where it has no share."""
        return [piece for own in self.share(batches) for piece in self.pieces(own.batch)]

    def outputs(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the outputs (n, c) of a batch's tokens at the given parameters (default: the model's own).

        Raises:
            UserError: outputs and targets do not fit together, or the model returns no tensor of outputs.
        """
        if not self._readings.met:
            self._meet(batch)
        z = with_parameters(self.model, parameters or {}, lambda: self.raw_outputs(batch))
        return self._fitted(z, batch)

    def _fitted(self, z: Tensor, batch: Batch) -> Tensor:
        """Returns outputs as the model gave them, sequences first, as (n, c)."""
        expected, y, came = self.targets(batch), self.labels(batch), z.shape
        with without_rules():
            z = self._readings.outputs(z, y)
            if self._shifts(batch):
                z = z[:, :-1]
            z = z.reshape(-1, z.shape[-1]) if z.dim() > 1 else z.reshape(-1, 1)
            if z.shape[0] != expected.shape[0] or (expected.dim() == 2 and expected.shape != z.shape):
                raise UserError(do_not_fit(came, y, batch_first=self.batch_first))
            return z

    def loss(self, batches: Batch | list[Batch], parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the mean loss per token (0-d), differentiable in the parameters but for several processes.

        Cost: a forward pass.
        """
        listed = self.micro_batches(batches)
        values = []
        for piece in self.own_pieces(listed):
            z, y = self.outputs(piece, parameters), self.targets(piece)
            self.loss_function.check(y, z.shape[1])
            values.append(self.loss_function.value(z, y))
        if self.processes.count == 1:
            return torch.stack(values).sum() / self.weight(listed)
        device = next(self.model.parameters()).device
        whole = torch.zeros((), dtype=torch.float64, device=device) + sum(v.detach() for v in values)
        return self.processes.total(whole)[0] / self.weight(listed)

    def gradient(
        self,
        batches: Batch | list[Batch],
        partition: Partition,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss (0-d) and its gradient (p,), both detached. Cost: one gradient."""
        listed = self.micro_batches(batches)
        weight = self.weight(listed)
        with measuring(self.model, forward_mode=False):
            leaves = self.leaves(partition, parameters)
            loss = leaves[partition.names[0]].new_zeros(())
            gradient = None

            def summed(batch: Batch) -> tuple[Tensor, Tensor]:
                z, y = self.outputs(batch, leaves), self.targets(batch)
                fixed = z.detach()
                self.loss_function.check(y, z.shape[1])
                part = self.loss_function.value(fixed, y).detach() / weight
                return part, pull_back(
                    z, leaves, partition.names, self.loss_function.gradient(fixed, y) / weight
                )

            for piece in self.own_pieces(listed):
                part, pulled = with_parameters(self.model, leaves, lambda piece=piece: summed(piece))
                loss = loss + part
                gradient = pulled if gradient is None else gradient.add_(pulled)
            if gradient is None:  # fewer sequences than processes
                gradient = partition.flatten({n: torch.zeros_like(x) for n, x in leaves.items()}).detach()
        loss, gradient = self.processes.total(loss, gradient)
        return loss, gradient

    def raw_outputs(self, batch: Batch) -> Tensor:
        """Returns what the model returns for a batch at its own parameters, sequences first, else as it comes."""
        z = self._forward(self.model, batch)
        if not isinstance(z, Tensor):
            raise UserError(
                f"forward= returned {said(z)}: wanted a tensor of outputs, class dimension last; pick it out, as in "
                "forward=lambda model, batch: model(batch[0])[0] (.logits of an object that has them)"
            )
        return z if self.batch_first or z.dim() < 2 else z.transpose(0, 1)

    def _default_forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return default_forward(model, batch, self._readings.feed)

    def leaves(
        self,
        partition: Partition,
        parameters: Mapping[str, Tensor] | None = None,
        names: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Returns fresh leaves by name that share the parameters' memory; `names` (default: all) want gradients.

        Where the model's own are of several precisions, all leaves have the highest of them.
        """
        source = parameters if parameters is not None else present(self.model, partition.shapes)
        wanted = set(partition.names if names is None else names)
        with without_rules():
            dtype = common_dtype(source.values())
            return {n: source[n].detach().to(dtype).requires_grad_(n in wanted) for n in partition.names}


def sequences_at_once(count: int, positions: int) -> int:
    """Returns how many of `count` sequences of so many positions each go through the model together: even pieces."""
    most = max(1, POSITIONS_AT_ONCE // max(1, positions))
    return -(-count // -(-count // most)) if count else 1


def pull_back(
    outputs: Tensor, leaves: Mapping[str, Tensor], names: Sequence[str], cotangent: Tensor
) -> Tensor:
    """Returns J^T cotangent for the named leaves as one vector; a leaf the outputs do not depend on gives zeros."""
    inputs = [leaves[name] for name in names]
    grads = torch.autograd.grad(outputs, inputs, cotangent, allow_unused=True)
    with without_rules():
        return torch.cat(
            [
                (torch.zeros_like(x) if g is None else g).reshape(-1)
                for x, g in zip(inputs, grads, strict=True)
            ]
        )
