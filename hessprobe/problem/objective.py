"""The model and its loss as functions of the parameters: L(theta) = (1/N) sum_n loss(f(theta, x)_n, y_n).

Sums over data are weighted by tokens with a target, never by batches: N counts them over all micro-batches. Of several
processes each runs the model on its share of the sequences, and the sums are added up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.problem.batches import (
    Batch,
    cut,
    default_forward,
    default_targets,
    listed,
    outputs_first,
    rearranged,
    sequences_first,
)
from hessprobe.problem.class_dimension import do_not_fit
from hessprobe.problem.loss_names import loss_named
from hessprobe.problem.losses import Loss
from hessprobe.problem.mean_loss import mean_gradient, mean_loss
from hessprobe.problem.measuring import measuring, with_parameters
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.operation_rules import without_rules
from hessprobe.problem.parameter_kinds import present
from hessprobe.problem.partition import Partition, unwrapped
from hessprobe.problem.readings import Readings
from hessprobe.problem.shares import Share, share_of
from hessprobe.problem.splitting import sequences_at_once, split
from hessprobe.problem.swapping import fresh_leaves
from hessprobe.problem.trust import Trust

Forward = Callable[[nn.Module, Batch], Tensor]
Batches = Batch | Sequence[Batch]  # one, or micro-batches: as users have them, or MicroBatches


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

    Attributes:
        splits: whether a batch is measured in pieces of its sequences (see `split`); None as long as nobody has looked.

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
        forward: Forward | None = None,
        targets: Callable[[Batch], Tensor] | None = None,
        ignore_index: int = -100,
        processes: Processes = ALONE,
        batch_first: bool = True,
        auxiliary: str | Forward | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self.processes = processes
        self.batch_first = batch_first
        self.auxiliary = auxiliary
        self.splits: bool | None = None
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

    def listed(self, batches: Batches) -> list[Batch]:
        """Returns micro-batches as a list, one batch as a list of one, as they are; [] for none (see batches.listed)."""
        return listed(batches, self._targets, batch_first=self.batch_first)

    def micro_batches(self, batches: Batches) -> MicroBatches:
        """Returns the batches as they are worked on, without those of no sequence; what is MicroBatches is kept.

        Cost: nothing, but for the first ones: forward passes that tell how labels and outputs meet (see Objective).

        Raises:
            UserError: no batch, a target that the loss cannot be meant for, or none at all.
        """
        return self.held(batches).checked()

    def held(self, batches: Batches) -> MicroBatches:
        """Returns the batches without those of no sequence, as they are: nothing is found out of them."""
        found = self.counted(batches)
        if not found:
            raise UserError("no batch given: wanted a batch or a non-empty list of batches")
        return found if all(found.counts) else found.parted([x for x in found if self.sequences(x)])

    def counted(self, batches: Batches) -> MicroBatches:
        """Returns all batches as they are, to be counted: none is looked at, and there may be none."""
        if isinstance(batches, MicroBatches):
            return batches if batches.objective._readings is self._readings else MicroBatches(self, batches)
        return MicroBatches(self, self.listed(batches))

    def tokens(self, batches: Batches) -> int:
        """Returns the number of tokens with a target in a batch or a list of micro-batches."""
        return self.counted(batches).tokens

    def weight(self, batches: Batches) -> float:
        """Returns what the mean divides by (see `MicroBatches.weight`)."""
        return self.counted(batches).weight

    def targets(self, batch: Batch) -> Tensor:
        """Returns the batch's targets flattened over its tokens: (n,), or (n, c) for real ones."""
        if not self._readings.met:
            self.meet(batch)
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
        with without_rules():
            return sequences_first(self._targets(batch), batch_first=self.batch_first)

    def meet(self, batch: Batch) -> None:
        """Checks a batch's targets and finds out what is still open of how they meet the model's outputs.

        Raises:
            UserError: targets that the loss cannot be meant for, or a model whose own loss is not known here.
        """
        asked = self._asked(batch)
        self._readings.meet(*asked)
        if asked[1].is_floating_point():  # where a token's own stand is known now
            self.loss_function.check(self.targets(batch))
        if self.loss_function.looks_at_outputs and not self._readings.looked:
            one = self.cut(batch, 0, 1) if self.splits else batch
            with measuring(self.model, forward_mode=False), torch.no_grad():
                z = self.outputs(one)
            self._show(z, self.targets(one))

    def _show(self, outputs: Tensor, targets: Tensor) -> None:
        if self.loss_function.looks_at_outputs:
            self._readings.looked = True
            self.loss_function.check_outputs(outputs, targets)

    def _asked(self, batch: Batch) -> tuple[Batch, Tensor, Callable[[int], Batch], Forward]:
        """Returns what Readings asks of a batch, its class labels checked: a model may take no others on a GPU."""
        if not (y := self.labels(batch)).is_floating_point():
            self.loss_function.check(y.reshape(-1))

        def forward(_: nn.Module, some: Batch) -> Tensor:
            return with_parameters(self.model, {}, lambda: self.raw_outputs(some))

        return batch, y, lambda count: self.cut(batch, 0, count), forward

    def look(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns `outputs` of a batch, and finds out by the same pass what `micro_batches` asks more passes for.

        `presumes` tells whether it is then open that the model gives these outputs without its labels too.

        Raises:
            UserError: see `outputs` and `micro_batches`.
        """
        asked = self._asked(batch)
        raw = with_parameters(self.model, parameters or {}, lambda: self._readings.look(*asked))
        z, targets = self._fitted(raw, batch), self.targets(batch)
        self.loss_function.check(targets, z.shape[1])
        self._show(z, targets)
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
        return split(self, batch, pieces)

    def pieces(self, batch: Batch) -> list[Batch]:
        """Returns a batch as ones that go through the model at once: of at most POSITIONS_AT_ONCE, or a single sequence.

        It stays whole where it cannot be cut (see `split`). A piece may hold no target.
        """
        count, positions = self.sequence_shape(batch)
        return self.split(batch, -(-count // sequences_at_once(count, positions)))

    def share(self, batches: Batches) -> list[Share]:
        """Returns what this process runs of micro-batches that all processes know: all of it where it is alone.

        Each has about as many of the union's sequences, in their order, and possibly none. A micro-batch that cannot be
        cut (see `split`) belongs whole to the process of its first sequence. Cost: see `split`, on two sequences, once.
        """
        return share_of(self, self.micro_batches(batches))

    def own_pieces(self, batches: Batches) -> list[Batch]:
        """Returns this process's `share` of micro-batches in `pieces`; none where it has no share."""
        return [piece for own in self.share(batches) for piece in self.pieces(own.batch)]

    def outputs(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the outputs (n, c) of a batch's tokens at the given parameters (default: the model's own).

        Raises:
            UserError: outputs and targets do not fit together, or the model returns no tensor of outputs.
        """
        if not self._readings.met:
            self.meet(batch)
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

    def loss(self, batches: Batches, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the mean loss per token (0-d), differentiable in the parameters but for several processes.

        Cost: a forward pass.
        """
        return mean_loss(self, self.micro_batches(batches), parameters)

    def gradient(
        self,
        batches: Batches,
        partition: Partition,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss (0-d) and its gradient (p,), both detached. Cost: one gradient."""
        return mean_gradient(self, self.micro_batches(batches), partition, parameters)

    def raw_outputs(self, batch: Batch) -> Tensor:
        """Returns what the model returns for a batch at its own parameters, sequences first, else as it comes."""
        return outputs_first(self._forward(self.model, batch), batch_first=self.batch_first)

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
        return fresh_leaves(source, partition.names, set(partition.names if names is None else names))
