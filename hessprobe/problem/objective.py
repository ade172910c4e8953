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
from hessprobe.problem.batches import Batch, cut, default_forward, default_targets, is_tensor_list, pieces_of
from hessprobe.problem.losses import Loss, loss_named
from hessprobe.problem.measuring import measuring, with_parameters
from hessprobe.problem.parameter_kinds import present
from hessprobe.problem.partition import Partition, unwrapped
from hessprobe.problem.processes import ALONE, Processes
from hessprobe.problem.shares import Share, share_of
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
        loss: "cross_entropy" (nats per token), "squared_error" (half the squared distance), or a function
            (outputs (n, c), targets (n, ...)) -> losses per token (n,), convex in the outputs.
        forward: (model, batch) -> outputs, class dimension last; default: `model(inputs)`, `.logits` of the output.
        targets: batch -> targets; default: the batch's second entry, or its "labels" (shifted for causal models).
        ignore_index: class targets of this value carry no loss.
        processes: who shares the work; every one of them is given the same batches and makes the same calls.

    A batch is a tuple `(inputs, targets)` (or a DataLoader's list of two tensors) or a mapping with "labels". A
    list of batches stands for their union: micro-batches, weighted by their tokens.
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
    ) -> None:
        self.model = unwrapped(model)
        self.processes = processes
        self.loss_function = loss_named(loss, ignore_index)
        self._splits: bool | None = None if forward is None and targets is None else False
        self._shift = forward is None and targets is None and _is_causal(self.model)
        self._forward = forward or default_forward
        self.trust = Trust()
        self._targets = targets or default_targets

    @property
    def alone(self) -> Objective:
        """The same objective with all of the work done in this process."""
        found = copy.copy(self)
        found.processes = ALONE
        return found

    def micro_batches(self, batches: Batch | list[Batch]) -> list[Batch]:
        """Returns the batches as a list; raises where none of them has a target."""
        found = batches if isinstance(batches, list) and not is_tensor_list(batches) else [batches]
        if not found:
            raise UserError("no batch given: wanted a batch or a non-empty list of batches")
        if self.tokens(found) == 0:
            raise UserError(
                "no token carries a target: every one is ignored, so loss and curvature are 0/0; pass batches "
                "with at least one target that is not ignore_index"
            )
        return found

    def tokens(self, batches: Batch | list[Batch]) -> int:
        """Returns the number of tokens with a target in a batch or a list of micro-batches."""
        listed = batches if isinstance(batches, list) and not is_tensor_list(batches) else [batches]
        return sum(int(self.loss_function.valid(self.targets(batch)).sum()) for batch in listed)

    def targets(self, batch: Batch) -> Tensor:
        """Returns the batch's targets flattened over its tokens: (n,), or (n, c) for a regression."""
        y = self._targets(batch)
        if self._shifts(batch):
            y = y[:, 1:]
        if y.is_floating_point():
            return y.reshape(-1, y.shape[-1]) if y.dim() > 1 else y.reshape(-1, 1)
        return y.reshape(-1)

    def _shifts(self, batch: Batch) -> bool:
        """Tells whether labels stand one place to the right of their outputs: in a causal model's mapping, not a pair."""
        return self._shift and isinstance(batch, Mapping)

    def sequence_shape(self, batch: Batch) -> tuple[int, int]:
        """Returns (b, t): the batch's sequences, the first dimension of its targets, and positions of each."""
        count = self._targets(batch).shape[0]
        return count, self.targets(batch).shape[0] // max(1, count)

    def split(self, batch: Batch, pieces: int) -> list[Batch]:
        """Returns the batch as that many batches of its sequences (fewer where it holds fewer), or whole.

        It stays whole where nothing says how to cut it (`forward` or `targets` given, entries of other lengths) and
        where sequences of one batch see each other: a model's outputs on pieces are compared once with the whole's, of
        as many sequences as go through it at once. Cost: two forward passes, once.
        """
        found = [batch] if pieces < 2 or self._splits is False else pieces_of(batch, pieces)
        if len(found) > 1 and self._splits is None:
            count, positions = self.sequence_shape(batch)
            some = cut(batch, 0, max(2, sequences_at_once(count, positions)), count)
            parts = pieces_of(some, pieces)
            with measuring(self.model, forward_mode=False), torch.no_grad():
                whole, joined = self.outputs(some), torch.cat([self.outputs(part) for part in parts])
            if not bool(whole.any()) and not bool(joined.any()):
                return found  # a head that starts at zero: equal, and still undecided
            gap = (whole - joined).norm() / whole.norm()
            self._splits = bool(gap <= torch.finfo(whole.dtype).eps ** 0.6)  # rounding's, not another model's
        return found if self._splits or len(found) == 1 else [batch]

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
        z = with_parameters(self.model, parameters or {}, lambda: self._forward(self.model, batch))
        z = z[:, :-1] if self._shifts(batch) else z
        y = self._targets(batch)
        z = z.reshape(-1, z.shape[-1]) if z.dim() > 1 else z.reshape(-1, 1)
        expected = self.targets(batch)
        if z.shape[0] != expected.shape[0] or (expected.dim() == 2 and expected.shape != z.shape):
            raise UserError(
                f"outputs {tuple(z.shape)} (tokens, classes) do not fit targets {tuple(y.shape)}: wanted one target "
                "per token with the class dimension of the outputs last; forward= and targets= say how they come"
            )
        return z

    def loss(self, batches: Batch | list[Batch], parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Returns the mean loss per token (0-d), differentiable in the parameters but for several processes.

        Cost: a forward pass.
        """
        listed = self.micro_batches(batches)
        values = [
            self.loss_function.value(self.outputs(piece, parameters), self.targets(piece))
            for piece in self.own_pieces(listed)
        ]
        if self.processes.count == 1:
            return torch.stack(values).sum() / self.tokens(listed)
        device = next(self.model.parameters()).device
        whole = torch.zeros((), dtype=torch.float64, device=device) + sum(v.detach() for v in values)
        return self.processes.total(whole)[0] / self.tokens(listed)

    def gradient(
        self,
        batches: Batch | list[Batch],
        partition: Partition,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss (0-d) and its gradient (p,), both detached. Cost: one gradient."""
        listed = self.micro_batches(batches)
        tokens = self.tokens(listed)
        with measuring(self.model, forward_mode=False):
            leaves = self.leaves(partition, parameters)
            loss = leaves[partition.names[0]].new_zeros(())
            gradient = None

            def summed(batch: Batch) -> tuple[Tensor, Tensor]:
                z, y = self.outputs(batch, leaves), self.targets(batch)
                fixed = z.detach()
                part = self.loss_function.value(fixed, y).detach() / tokens
                return part, pull_back(
                    z, leaves, partition.names, self.loss_function.gradient(fixed, y) / tokens
                )

            for piece in self.own_pieces(listed):
                part, pulled = with_parameters(self.model, leaves, lambda piece=piece: summed(piece))
                loss = loss + part
                gradient = pulled if gradient is None else gradient.add_(pulled)
            if gradient is None:  # fewer sequences than processes
                gradient = partition.flatten({n: torch.zeros_like(x) for n, x in leaves.items()}).detach()
        loss, gradient = self.processes.total(loss, gradient)
        return loss, gradient

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
        dtype = common_dtype(source.values())
        wanted = set(partition.names if names is None else names)
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
    return torch.cat(
        [(torch.zeros_like(x) if g is None else g).reshape(-1) for x, g in zip(inputs, grads, strict=True)]
    )


def _is_causal(model: nn.Module) -> bool:
    """Tells whether a Hugging Face model shifts labels by one itself, as its causal language models do."""
    name = type(model).__name__
    return hasattr(model, "config") and ("ForCausalLM" in name or "LMHead" in name)
