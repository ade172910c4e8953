"""Whether a batch's sequences are apart: its middle ones alone give what they give among the others, model and loss.

Outputs that differ mean that sequences see each other, or that something changes from pass to pass; which of the two is
told by one pass more. A batch that cannot be cut is compared among copies of its own sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.batches import Batch
from hessprobe.problem.measuring import measuring
from hessprobe.problem.objective import Objective
from hessprobe.problem.splitting import gap_of, same_outputs


@dataclass(frozen=True, kw_only=True)
class Apart:
    """What was seen of a batch's sequences.

    Attributes:
        cuts: whether sequences cut out agree with themselves among the others; None where that was not to be seen.
        notes: what a reader should know of it, a sentence each.
    """

    cuts: bool | None
    notes: tuple[str, ...] = ()


def check_apart(
    objective: Objective,
    batch: Batch,
    whole: Tensor,
    leaves: Mapping[str, Tensor] | None,
    *,
    halved: bool,
) -> Apart:
    """Compares the batch's middle sequences with themselves alone: one pass over a part of it.

    Where they cannot be cut out, or differ alone, with themselves among copies of themselves: one more.

    Args:
        whole: the batch's outputs (n, c) at the leaves.
        halved: whether activations are in half precision.

    Raises:
        UserError: outputs change from pass to pass, or sequences see each other in the model or in the loss.
    """
    count, positions = objective.sequence_shape(batch)
    start, stop = (max(1, count // 3), max(2, 2 * count // 3)) if count > 1 else (0, 1)
    middle = slice(start * positions, stop * positions)
    expected = whole[middle]

    def tried(made: Callable[[], Batch | None], expected: Tensor) -> Tensor | None:
        return _tried(objective, leaves, made, expected)

    def alone() -> Tensor | None:
        return tried(lambda: objective.cut(batch, start, stop) if count > 1 else batch, expected)

    came = alone()
    agrees = came is not None and same_outputs(expected, came, halved=halved)
    if objective.presumes and objective.settle(batch, leaves, agreed=agrees):
        came = alone()
        agrees = came is not None and same_outputs(expected, came, halved=halved)
    if agrees:
        _check_loss_apart(objective, batch, whole, count, positions)
        return Apart(cuts=None if count < 2 or not bool(expected.any()) else True)
    # Perhaps fewer sequences are another thing to the model, as where it keeps a hidden state of each: the same ones
    # among copies of themselves must then stay as they are, and the others change, or nothing has been tried.
    order = torch.arange(count).clamp(start, stop - 1)
    mixed = tried(lambda: objective.rearranged(batch, order), whole) if count > 1 else None
    stayed = mixed is not None and same_outputs(expected, mixed[middle], halved=halved)
    changed = mixed is not None and not same_outputs(whole, mixed, halved=halved)
    if stayed and changed:
        _check_loss_apart(objective, batch, whole, count, positions)
        return Apart(cuts=False)
    if came is None and (mixed is None or not bool(whole.any())):
        return Apart(cuts=False, notes=(_UNVERIFIED,))
    if came is None and stayed:
        raise UserError(_UNMOVED.format(start=start, stop=stop - 1, count=count))
    if came is None:
        assert mixed is not None
        gap = gap_of(expected, mixed[middle])
    else:
        gap, again = gap_of(expected, came), alone()
        if count < 2 or again is None or not same_outputs(came, again, halved=halved):
            raise UserError(_CHANGING.format(gap=_percent(gap)))
    square = _SQUARE.format(count=count) if count == positions else ""
    raise UserError(_TOGETHER.format(gap=_percent(gap), start=start, stop=stop - 1, count=count) + square)


def _tried(
    objective: Objective,
    leaves: Mapping[str, Tensor] | None,
    made: Callable[[], Batch | None],
    expected: Tensor,
) -> Tensor | None:
    """Returns the outputs of a batch, None where it cannot be made or run, or has others than are expected."""
    with measuring(objective.model, forward_mode=False), torch.no_grad():
        try:
            batch = made()
            found = None if batch is None else objective.outputs(batch, leaves)
        except (
            Exception
        ) as error:  # whatever forward=, targets= or the model say of a batch not made for them
            if is_out_of_memory(error):
                raise
            return None
    return found if found is not None and found.shape == expected.shape else None


def _check_loss_apart(objective: Objective, batch: Batch, z: Tensor, count: int, positions: int) -> None:
    """Compares the loss of all outputs with those of two halves' added up: no pass at all."""
    loss, y, half = objective.loss_function, objective.targets(batch), count // 2 * positions
    if not half:
        return
    whole = float(loss.value(z, y))
    parts = float(loss.value(z[:half], y[:half])) + float(loss.value(z[half:], y[half:]))
    eps = torch.finfo(z.dtype).eps
    if abs(parts - whole) > eps**0.58 * abs(whole) + 30 * eps * float(z.abs().max()) * len(z):
        raise UserError(_PAIRED.format(whole=whole / len(z), parts=parts / len(z)))


def _percent(gap: float) -> str:
    """Returns a share of a norm with a digit other than 0 at least: what rounds to none here is more than rounding."""
    return f"{gap:.1%}" if gap >= 0.0005 else f"{100 * gap:.1g}%"


_CHANGING = (
    "two forward passes of the same batch differ by {gap} of their norm although the model is measured in eval mode: "
    "something random is left on, or something moves from call to call, and every product would be of another function. "
    "Write F.dropout(x, p, training=self.training), scaled_dot_product_attention(..., dropout_p=p if self.training else "
    "0.0), sampling and noise only `if self.training`, and leave no state in the model from one forward pass to the next"
)
_TOGETHER = (
    "sequences see each other: the outputs of sequences {start} to {stop} of {count} alone differ by {gap} of their "
    "norm from the same ones among the others, so that no row can be made of single sequences. Where inputs come "
    "positions first, (positions, sequences, ...): pass batch_first=False, or forward= and targets= that put sequences "
    "first. Statistics over the batch and attention between its examples have no curvature by sequence: leave them out "
    "in forward="
)
_UNMOVED = (
    "what is taken for sequences is none: the outputs of the batch stay what they are where sequences {start} to {stop} of "
    "{count} stand in the places of the others. Where inputs come positions first, (positions, sequences, ...): pass "
    "batch_first=False, or forward= and targets= that put sequences first"
)
_SQUARE = (
    ". This batch has as many sequences as positions ({count}): an entry of positions alone, as position ids (t,) or a mask "
    "(t, t), is then taken for one of sequences: make it inside forward=, or measure a batch of another number of "
    "sequences"
)
_UNVERIFIED = (
    "sequences unverified: this batch cannot be cut into sequences, so whether they are apart, and are what is taken for "
    "them, could not be seen. Where inputs come positions first, (positions, sequences, ...): pass batch_first=False; else "
    "forward= and targets= that take a batch of tensors, each with a dimension of sequences"
)
_PAIRED = (
    "the loss sees sequences together: of all it is {whole:.6g} per token and of two halves {parts:.6g}, as for contrastive "
    "losses, and no row can be made of single sequences. Wanted: loss=function(outputs (n, c), targets (n, ...)) -> losses "
    "(n,), each of its own token alone"
)
