"""What a loss can be meant for: targets in its range, outputs that are what it takes them for."""

from __future__ import annotations

import torch
from torch import Tensor

from hessprobe.errors import UserError


def check_classes(name: str, targets: Tensor, ignore_index: int, classes: int | None) -> None:
    """Raises a UserError for class labels outside 0 to classes - 1 (None: not known yet) that are not ignored.

    It has to be asked before torch is: on a GPU a label out of range ends the process's use of it.
    """
    if not targets.numel():
        return
    # Neither a shape that depends on the data nor more than one number read: a GPU would be waited for at each.
    labels, ignored, limits = targets.long(), targets == ignore_index, torch.iinfo(torch.long)
    ends = labels.masked_fill(ignored, limits.max).min(), labels.masked_fill(ignored, limits.min).max()
    low, high = torch.stack(ends).tolist()
    if low > high:  # all are ignored
        return
    if low >= 0 and (classes is None or high < classes):
        return
    some = "classes that count from 0" if classes is None else f"{classes} classes, 0 to {classes - 1}"
    mark = low if low < 0 else high
    raise UserError(
        f"{name}: targets from {low} to {high} for {some}: pass ignore_index={mark} if {mark} marks tokens without a "
        f"target (now {ignore_index} does), else targets= that gives class labels"
    )


def check_probabilities(name: str, targets: Tensor) -> None:
    """Raises a UserError for real targets (n, c) that do not sum to 1."""
    sums = targets.detach().double().sum(-1)
    if targets.shape[1] < 2 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise UserError(
            f"{name}: wanted class labels, or probabilities that sum to 1 over the last dimension, got real "
            f"targets {tuple(targets.shape)} that do not: for a regression give loss='mean_squared_error' "
            "(nn.MSELoss()), for several labels at once loss='binary_cross_entropy' (nn.BCEWithLogitsLoss())"
        )


def check_real(name: str, targets: Tensor) -> None:
    """Raises a UserError for class labels where real targets (n, c) are wanted."""
    if targets.dim() != 2:
        raise UserError(
            f"{name}: wanted real targets, as many as outputs, got {targets.dtype} class labels: "
            "convert them (targets.to(outputs), one-hot for classes), or use loss='cross_entropy'"
        )


def off_log_probabilities(outputs: Tensor) -> float:
    """Returns by how much outputs (n, c) miss being logarithms of probabilities: the largest |log sum exp|; 0 for none."""
    sums = outputs.detach().float().logsumexp(-1).abs() if outputs.shape[-1] > 1 else outputs[:0, 0]
    return float(sums.max()) if sums.numel() else 0.0


def are_log_probabilities(outputs: Tensor) -> bool:
    """Tells whether outputs (n, c) are logarithms of probabilities, up to the rounding of their precision."""
    allowed = max(1e-3, 30 * torch.finfo(outputs.dtype).eps)
    return outputs.shape[-1] > 1 and not off_log_probabilities(outputs) > allowed


def check_log_probabilities(name: str, outputs: Tensor) -> None:
    """Raises a UserError for outputs (n, c) that are no logarithms of probabilities; those that are not finite pass."""
    if not are_log_probabilities(outputs):
        raise UserError(
            f"loss {name}: wanted logarithms of probabilities (F.log_softmax at the model's end), got outputs whose "
            f"log sum exp is up to {off_log_probabilities(outputs):.3g} from 0: for a model that returns logits give "
            "loss='cross_entropy' (nn.CrossEntropyLoss())"
        )


def linear_in_logarithms(name: str) -> str:
    """Returns the sentence on a function that is linear in logarithms of probabilities."""
    return (
        f"loss {name}: linear in the model's outputs, which are logarithms of probabilities, so that it has no curvature of "
        "its own and the Gauss-Newton matrix would be 0. What is meant has softmax inside the loss: give loss=nn.NLLLoss() "
        "(or loss='cross_entropy', the same value and curvature)"
    )
