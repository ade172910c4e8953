"""Whether the loss measured is the loss trained: what a loop says it trained on, against ours on the same batch.

Beyond rounding they may differ by dropout's chance, which train-mode losses of groups of tokens bound (a Student interval
on the mean of their differences from eval mode), and by half precision, which a pass under autocast shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.machine.devices import uses_tf32

NEAR = 0.02  # of the loss: what half precision may make of it at most
SURE = 1 - 5e-5  # quantile of the interval that chance is given
LIKELY = (
    "labels shifted by one place, or not; class weights or label smoothing (loss=nn.CrossEntropyLoss(weight=..., "
    "label_smoothing=...)); an auxiliary loss (auxiliary=); another batch than the step's, as the next one; a loss "
    "scaled or divided before it was passed; a sum instead of a mean over tokens"
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The losses that a loop says it computed on a step's batch: one, or one for each of its micro-batches."""

    losses: tuple[float, ...]
    precision: float

    @classmethod
    def of(cls, given: Any) -> Trained | None:
        """Reads what a caller passes: a number, a tensor, or a list of them.

        Raises:
            UserError: anything else.
        """
        if given is None:
            return None
        losses, precision = [], 0.0
        for one in given if isinstance(given, (list, tuple)) else [given]:
            try:
                value = torch.as_tensor(one).detach()
                # DataParallel returns a loss for every device.
                losses.append(float(value.double().mean()))
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"loss=: wanted the loss of the step's batch, a number or a tensor, or a list with that of every "
                    f"micro-batch; got {type(one).__name__}"
                ) from error
            if value.is_floating_point():
                precision = max(precision, torch.finfo(value.dtype).eps)
        finite = tuple(loss for loss in losses if isfinite(loss))  # of an empty micro-batch it is 0/0
        return cls(losses=finite, precision=precision)

    @property
    def mean(self) -> float:
        """The mean over micro-batches; NaN where none was finite."""
        return sum(self.losses) / len(self.losses) if self.losses else nan


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of one pass over a step's micro-batches.

    Attributes:
        sums, tokens: of every micro-batch (k,), in float64; of weighted losses tokens are the weights they divide by.
        group_sums, group_tokens: of groups of tokens that make up all of them (g,).
        largest: the largest output's size, which rounding goes by.
        eps: of the type that outputs came in.
        drew: whether random numbers were drawn.
        halved: whether it ran in half precision.
    """

    sums: Tensor
    tokens: Tensor
    group_sums: Tensor
    group_tokens: Tensor
    largest: float
    eps: float
    drew: bool = False
    halved: bool = False

    @property
    def whole(self) -> float:
        """The mean over all tokens."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def rounding(self) -> float:
        """By how much two ways to compute this loss may differ: the mean's rounding, and the outputs'."""
        relative = 2e-3 if uses_tf32(self.sums.device) else max(self.eps**0.58, 1e-6)  # 1e-4 in float32
        return relative * abs(self.whole) + 30 * self.eps * self.largest

    def nearest(self, said: Trained) -> tuple[float, float]:
        """Returns what was said, and which of our means is nearest to it: over tokens, or over micro-batches.

        A list may hold losses divided for accumulation already: then their sum is meant.
        """
        means = {self.whole, float((self.sums / self.tokens).mean())}
        given = {said.mean, sum(said.losses)} if len(said.losses) == len(self.sums) else {said.mean}
        return min(((g, m) for g in given for m in means), key=lambda pair: abs(pair[0] - pair[1]))

    def weighs_micro_batches(self, said: Trained) -> bool:
        """Tells whether what was said is rather the mean over micro-batches than over tokens, where the two differ."""
        over_micro_batches = float((self.sums / self.tokens).mean())
        differ = abs(over_micro_batches - self.whole) > self.rounding
        return differ and self.nearest(said)[1] == over_micro_batches

    def gap(self, said: Trained) -> float:
        """By how much what was said differs from the nearest of our means."""
        given, ours = self.nearest(said)
        return abs(given - ours)


def chance(measured: Losses, drawn: Losses) -> float:
    """Returns how far two train-mode losses may lie apart by chance: from one's differences to eval mode, by group.

    Groups of tokens that see other masks stand for other draws; that some lose more by dropout than others makes the
    interval rather too wide. Infinite for a single group.
    """
    weight = measured.group_tokens / measured.tokens.sum()
    count = int((weight > 0).sum())
    if count < 2:
        return float("inf")
    difference = (
        drawn.group_sums - measured.group_sums
    ) / measured.tokens.sum()  # a group's part of the mean
    spread = (difference - weight * difference.sum()).square().sum() * count / (count - 1)
    return float(stdtrit(count - 1, SURE)) * sqrt(2 * float(spread))


def compare(
    said: Trained,
    measured: Losses,
    run: Callable[..., Losses],
    *,
    statistics: Sequence[object] = (),
    half: bool = False,
) -> float:
    """Returns the loss in train mode where it had to be asked for, else NaN.

    Args:
        said: by the loop.
        measured: in eval mode, at the same parameters.
        run: runs the batch in train mode, with `statistics=True` in batch statistics alone, with `autocast=True` in
            bfloat16, and with another `seed` with other masks.
        statistics: the modules that normalise by batch statistics.
        half: whether parameters are in half precision, so that training is too.

    Raises:
        UserError: another loss, or another function, was trained than is measured.

    Cost: up to two forward passes; none where the losses agree.
    """
    rounding = measured.rounding + said.precision * abs(said.mean)
    if measured.gap(said) <= rounding:
        return nan
    if statistics:
        alone = run(statistics=True)
        if abs(alone.whole - measured.whole) > measured.rounding:
            raise UserError(another_function(measured.whole, alone.whole, statistics, said))
    near = measured.gap(said) <= NEAR * abs(measured.whole)
    drawn = run(autocast=near and not half)
    off = abs(drawn.whole - measured.whole)
    if not drawn.drew:
        allowed = rounding
        if drawn.halved:  # bfloat16 differs from itself where it is summed up otherwise
            allowed += min(off, NEAR / 2 * abs(measured.whole)) + 1e-3 * abs(measured.whole)
        if drawn.gap(said) <= allowed:
            if off > (NEAR / 2 * abs(measured.whole) if drawn.halved else measured.rounding):
                raise UserError(another_function(measured.whole, drawn.whole, statistics, said))
            return drawn.whole
        raise UserError(another_loss(said, measured))
    allowed = rounding + chance(measured, drawn) + 2e-3 * abs(measured.whole)
    if drawn.gap(said) <= allowed:
        return drawn.whole
    # Chance that all tokens share, as where whole layers are left out, shows between passes only; and where two are alike
    # though random numbers were drawn, it was left out of both, and nothing is known of how far it goes.
    again = run(autocast=near and not half, seed=1)
    if torch.equal(again.group_sums, drawn.group_sums):
        return drawn.whole
    shared = 4 * abs(again.whole - drawn.whole)
    if min(drawn.gap(said), again.gap(said)) <= max(allowed, rounding + shared):
        return drawn.whole
    raise UserError(another_loss(said, measured, drawn, allowed))


def another_function(
    measured: float, trained: float, statistics: Sequence[object], said: Trained | None
) -> str:
    """Returns the sentence on a model that train mode makes another function of, not by chance."""
    kinds = sorted({type(module).__name__ for module in statistics})
    what = f"{', '.join(kinds)}: batch statistics in training" if kinds else "modules that follow train()"
    passed = "" if said is None else f" (passed as loss=: {said.mean:.6g})"
    way = "; or leave out loss= and read rows as" if said is not None else ". Rows are"
    return (
        f"what is trained is another function than what is measured ({what}, running averages or else in eval mode, in "
        f"which rows are measured): the loss of this step's whole batch is {trained:.6g} as it is trained{passed} and "
        f"{measured:.6g} as it is measured. Keep these modules in eval mode while training"
        f"{way} of the eval-mode function, with loss_train_mode beside them"
    )


def another_loss(said: Trained, measured: Losses, drawn: Losses | None = None, allowed: float = 0.0) -> str:
    """Returns the sentence on a loss passed that is not ours, by more than is allowed in train mode."""
    given, ours = measured.nearest(said)
    in_training = f", {drawn.whole:.6g} in train mode" if drawn is not None else ""
    found, sure = recognised(said, measured if drawn is None else drawn, allowed)
    reasons = (
        found
        if found and sure
        else f"{found}; other likely reasons: {LIKELY}"
        if found
        else f"Likely reasons: {LIKELY}"
    )
    return (
        f"the loss measured is not the loss trained: of this step's whole batch it is {ours:.6g} as measured{in_training}, "
        f"and {given:.6g} was passed as loss=. {reasons}. Say how training computes it with loss=, forward=, targets= or "
        "auxiliary= when making the recorder, or pass the batch's mean loss per token"
    )


def recognised(said: Trained, ours: Losses, allowed: float) -> tuple[str, bool]:
    """Returns what a passed loss is, where it can be told from its value, else ""; and whether chance leaves it sure."""
    means, count = ours.sums / ours.tokens, len(ours.sums)
    last, near = float(means[-1]), max(ours.rounding, 1e-3 * abs(ours.whole), allowed)
    sure = near <= 1e-3 * abs(ours.whole)
    if count > 1 and len(said.losses) == 1:
        for divided, words in ((1, ""), (count, f", divided by {count}")):
            if abs(said.mean * divided - last) <= near:
                only = f"It is the loss of the last of {count} micro-batches alone{words}: pass the list of their losses"
                return only, sure
    names = {int(ours.tokens.sum()): "a sum over tokens"}
    return scaled(said.mean, ours.whole, names, near / abs(ours.whole)), sure


def scaled(given: float, ours: float, names: dict[int, str], near: float = 1e-3) -> str:
    """Returns which multiple or part of ours a loss is, up to a relative difference, where it is a whole one; else ""."""
    if not (ours and given) or given / ours < 0:
        return ""
    ratio = max(given / ours, ours / given)
    known = [*names, *(2**n for n in range(7, 33)), *range(2, 65)]  # sums, scalers of gradients, accumulation
    whole = next(
        (n for n in known if abs(ratio / n - 1) <= min(near, 0.5 / n if n <= 64 and n not in names else 1)), 0
    )
    if not whole:
        return ""
    about = "" if near <= 1e-3 else "about "
    if given < ours:
        return f"It is {about}ours divided by {whole}, as for gradient accumulation: pass it before it is divided"
    return f"It is {about}{whole:,} times ours, {names.get(whole, 'a sum or a scaled loss')}: pass the mean per token"
