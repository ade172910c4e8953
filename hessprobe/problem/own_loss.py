"""How a model's own loss reads a mapping's labels: shifted or not, by which loss, with decoder inputs made of them or not.

Names of classes do not tell. The model is called once with its labels, and the reading is the one whose loss of the
model's own outputs equals the model's own loss; where two do (outputs near uniform), labels of the first position alone
tell: a model that shifts has no target there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.batches import DECODER_INPUTS, INPUTS, LABELS, Batch, called, logits_of
from hessprobe.problem.class_dimension import classes_last
from hessprobe.problem.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from hessprobe.problem.measuring import measuring, with_parameters

IGNORED = -100  # what every Hugging Face model ignores
Auxiliary = str | Callable[[nn.Module, Batch], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a mapping's labels are to a model.

    Attributes:
        shifted: each stands one place to the right of its outputs.
        feed: how the model is called (see `batches.default_forward`).
        loss: the model's own where it is not the objective's cross-entropy.
        settled: found by comparison with the model's own loss; else another batch may tell more.
    """

    shifted: bool = False
    feed: str = INPUTS
    loss: Loss | None = None
    settled: bool = False


@dataclass(frozen=True, kw_only=True)
class OwnLoss:
    """What a model returned for a mapping with its labels: its loss (0-d), outputs, and what it says of auxiliary losses."""

    loss: Tensor
    logits: Tensor | None
    auxiliary: dict[str, float]


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> OwnLoss | None:
    """Returns what the model makes of a mapping with labels, in eval mode; None where it gives no loss of its own.

    Cost: a forward pass.
    """
    parameters = inspect.signature(model.forward).parameters
    if "labels" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    try:
        with measuring(model, forward_mode=False), torch.no_grad():
            found = with_parameters(model, {}, lambda: called(model, batch, LABELS))
    except Exception as error:  # whatever a model says of labels that are not meant for it
        if is_out_of_memory(error):
            raise
        return None
    loss = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
    if loss is None and isinstance(found, tuple):
        loss = next((x for x in found if isinstance(x, Tensor) and x.numel() == 1 and x.dim() < 2), None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    items = (
        found.items()
        if isinstance(found, Mapping)
        else vars(found).items()
        if hasattr(found, "__dict__")
        else ()
    )
    named = {
        str(name): float(value)
        for name, value in items
        if isinstance(value, Tensor) and value.numel() == 1 and name != "loss" and "loss" in str(name)
    }
    return OwnLoss(loss=loss.detach().reshape(()), logits=logits_of(found), auxiliary=named)


def read(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: Loss,
    auxiliary: Auxiliary,
    own: OwnLoss | None,
    *,
    own_counts: bool,
    presume: bool = False,
) -> Reading:
    """Returns how the model reads the labels of a mapping.

    Args:
        loss: the objective's.
        own: what the model made of the mapping (`own_loss`).
        own_counts: whether the model's own loss is what is trained: none was given in its place.
        presume: that the model can be called in the first of its `ways`: the caller finds out.

    Cost: a forward pass, none where it presumes; one more where the loss alone does not tell, and what `auxiliary` costs.

    Raises:
        UserError: the model's own loss is none that is known here, with both values.
    """
    if own is None:
        return Reading(shifted=_named_causal(model), feed=ways(model)[0])
    feed = ways(model)[0] if presume else found_feed(model, batch, own)
    if own.logits is None:
        return Reading(shifted=_named_causal(model), feed=feed)
    labels = batch["labels"]
    candidates = _candidates(own.logits, labels, loss) if isinstance(labels, Tensor) else []
    if not candidates:  # outputs and targets do not fit: said where they meet
        return Reading(shifted=_named_causal(model), feed=feed, settled=True)
    if not own_counts or auxiliary == "ignore" or not bool(torch.isfinite(own.loss)):
        return Reading(shifted=_shifts(model, batch, own, candidates), feed=feed, settled=True)
    wanted = float(less_auxiliary(model, batch, own.loss, auxiliary))
    fits = _fitting(candidates, wanted, own, model)
    if not fits:
        raise UserError(_disagreement(wanted, candidates, own, auxiliary))
    shifts = {one.shifted for one in fits}
    if len(shifts) == 1:
        nearest = min(fits, key=lambda one: abs(one.value - wanted))
        return Reading(shifted=nearest.shifted, feed=feed, loss=nearest.loss, settled=True)
    return Reading(shifted=_probed(model, batch, candidates), feed=feed, settled=True)


def less_auxiliary(model: nn.Module, batch: Batch, loss: Tensor, auxiliary: Auxiliary) -> Tensor:
    """Returns the model's own loss less what a function says that it adds to the main one."""
    if not callable(auxiliary):
        return loss
    with measuring(model, forward_mode=False), torch.no_grad():
        return loss - with_parameters(model, {}, lambda: auxiliary(model, batch))


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A reading's loss on the model's own outputs; `loss` None: the objective's."""

    said: str
    shifted: bool
    loss: Loss | None
    value: float


def _candidates(z: Tensor, labels: Tensor, loss: Loss) -> list[_Candidate]:
    """Returns the readings whose outputs and targets fit together, with their values."""
    found: list[_Candidate] = []

    def add(said: str, shifted: bool, own: Loss | None, z: Tensor, y: Tensor) -> None:
        if z.shape[0] != y.shape[0] or (y.dim() == 2 and y.shape != z.shape):
            return
        by = loss if own is None else own
        weight = float(by.weights(y).double().sum())
        if weight:
            value = float(by.value(z.detach().float() if z.element_size() < 4 else z.detach(), y)) / weight
            found.append(_Candidate(said=said, shifted=shifted, loss=own, value=value))

    if labels.is_floating_point():
        y = labels.reshape(-1, labels.shape[-1]) if labels.dim() > 1 else labels.reshape(-1, 1)
        flat = z.reshape(-1, z.shape[-1]) if z.dim() > 1 else z.reshape(-1, 1)
        add("mean squared error", False, SquaredError(mean_over_outputs=True), flat, y.to(flat))
        add("binary cross-entropy", False, BinaryCrossEntropy(), flat, y.to(flat))
        if y.shape[1] > 1:
            add("cross-entropy of probabilities", False, None, flat, y.to(flat))
        return found
    z = classes_last(z, labels)
    if labels.numel() * z.shape[-1] != z.numel():
        return found
    add("labels as they stand", False, None, z.reshape(-1, z.shape[-1]), labels.reshape(-1))
    if labels.dim() > 1 and labels.shape[1] > 1 and z.shape[:2] == labels.shape[:2]:
        add("labels shifted by one", True, None, z[:, :-1].flatten(0, -2), labels[:, 1:].reshape(-1))
    return found


def _fitting(candidates: list[_Candidate], wanted: float, own: OwnLoss, model: nn.Module) -> list[_Candidate]:
    allowed = _rounding(own, model) * max(abs(wanted), 1e-4)
    return [one for one in candidates if abs(one.value - wanted) <= allowed]


def _shifts(model: nn.Module, batch: Mapping[str, Any], own: OwnLoss, candidates: list[_Candidate]) -> bool:
    """Tells whether the model shifts labels where another loss than its own is trained: its own still is cross-entropy.

    Cost: a forward pass, where that does not tell.
    """
    if len(candidates) > 1 and own.logits is not None and not batch["labels"].is_floating_point():
        plain = _candidates(own.logits, batch["labels"], CrossEntropy(IGNORED))
        shifts = {one.shifted for one in _fitting(plain, float(own.loss), own, model)}
        if len(shifts) == 1:
            return shifts.pop()
    return _probed(model, batch, candidates)


def ways(model: nn.Module) -> list[str]:
    """Returns how a model may be called for its outputs alone, the likelier first."""
    made = hasattr(model, "prepare_decoder_input_ids_from_labels")
    return [DECODER_INPUTS, INPUTS] if made else [INPUTS]


def found_feed(model: nn.Module, batch: Mapping[str, Any], own: OwnLoss) -> str:
    """Returns how the model is called so that its outputs are those behind its own loss, without the loss if possible."""
    if own.logits is None:
        return ways(model)[0]
    for way in ways(model):
        try:
            with measuring(model, forward_mode=False), torch.no_grad():
                z = logits_of(with_parameters(model, {}, partial(called, model, batch, way)))
        except Exception as error:  # no outputs without labels: an encoder-decoder that wants decoder inputs
            if is_out_of_memory(error):
                raise
            continue
        if z is not None and z.shape == own.logits.shape:
            gap, size = (z - own.logits).float().norm(), own.logits.float().norm()
            if bool(gap <= torch.finfo(z.dtype).eps ** 0.6 * size):
                return way
    return LABELS


def _probed(model: nn.Module, batch: Mapping[str, Any], candidates: list[_Candidate]) -> bool:
    """Tells whether the model shifts labels: one that does has no target where only the first position has a label.

    Cost: a forward pass, where both are possible.
    """
    possible = {one.shifted for one in candidates}
    if len(possible) == 1:
        return possible.pop()
    labels = batch["labels"]
    first = torch.full_like(labels, IGNORED)
    first[:, 0] = torch.where(labels[:, 0] == IGNORED, 0, labels[:, 0])
    found = own_loss(model, {**batch, "labels": first})
    if found is None:
        return _named_causal(model)
    # The mean of nothing is not a number, or 0 where the model takes care of it.
    return not bool(torch.isfinite(found.loss)) or float(found.loss) == 0.0


def _named_causal(model: nn.Module) -> bool:
    """Tells what a Hugging Face model's name says of shifting: where nothing else is known."""
    name = type(model).__name__
    return hasattr(model, "config") and ("ForCausalLM" in name or "LMHead" in name)


def _rounding(own: OwnLoss, model: nn.Module) -> float:
    """Returns how far apart, relatively, two ways to one mean may be in the model's precision."""
    dtypes = {x.dtype for x in (own.loss, own.logits, next(model.parameters())) if x is not None}
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point) ** 0.8


def _disagreement(wanted: float, candidates: list[_Candidate], own: OwnLoss, auxiliary: Auxiliary) -> str:
    values = ", ".join(f"{one.value:.6g} ({one.said})" for one in candidates)
    nearest = min((one.value for one in candidates), key=lambda value: abs(value - wanted))
    more = " less auxiliary=" if callable(auxiliary) else ""
    added = ", ".join(f"{name} {value:.4g}" for name, value in own.auxiliary.items() if math.isfinite(value))
    reason = (
        f"it returns {added}, and what it adds to cross-entropy is probably that: auxiliary='ignore' measures the main loss "
        "alone, auxiliary=a function (model, batch) -> what is added is checked"
        if added and auxiliary is None
        else "likely an auxiliary loss (auxiliary='ignore', or a function (model, batch) -> what is added), class weights "
        "or label smoothing inside the model (loss=torch.nn.CrossEntropyLoss(weight=..., label_smoothing=...)), another "
        "ignored label (ignore_index=), or other targets than the labels (targets=, forward=)"
    )
    return (
        f"the model's own loss{more} on this batch is {wanted:.6g}, and what would be measured is {values}, off by "
        f"{abs(nearest - wanted):.2g}: {reason}"
    )
