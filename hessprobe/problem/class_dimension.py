"""Which dimension of the outputs holds the classes: the last (language models) or the second (torch's cross-entropy).

Shapes tell unless there are as many classes as positions. Then the model tells: on shorter sequences the dimension that
stays is that of the classes; or its last module, where its outputs are the model's own (a convolution has its channels
second, a linear layer its features last). What neither tells is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.machine.memory import is_out_of_memory
from hessprobe.problem.batches import Batch, mapped
from hessprobe.problem.measuring import measuring, with_parameters

LAST, SECOND = "last", "second"
_CONVOLUTIONS = nn.modules.conv._ConvNd


def possible(outputs: Tensor, targets: Tensor) -> tuple[str, ...]:
    """Returns where the classes of outputs (n, ...) can stand beside class labels (n, ...), by their shapes."""
    if targets.is_floating_point() or targets.dim() < 2 or outputs.dim() != targets.dim() + 1:
        return ()
    last = outputs.shape[:-1] == targets.shape
    second = (outputs.shape[0], *outputs.shape[2:]) == tuple(targets.shape)
    return (LAST,) * last + (SECOND,) * second


def classes_last(outputs: Tensor, targets: Tensor, known: str | None = None) -> Tensor:
    """Returns the outputs with their classes last; `known` counts where shapes do not tell (default: last)."""
    places = possible(outputs, targets)
    place = places[0] if len(places) == 1 else known
    return outputs.movedim(1, -1) if place == SECOND and SECOND in places else outputs


def check_known(outputs: Tensor, targets: Tensor, known: str | None, model: nn.Module) -> None:
    """Raises a UserError where neither shapes nor the model tell where the classes are."""
    if known is None and len(possible(outputs, targets)) == 2:
        raise UserError(
            f"{type(model).__name__} returned {tuple(outputs.shape)} for targets {tuple(targets.shape)}: as many classes as "
            "positions, so either dimension may be that of the classes; say it: forward=lambda model, batch: "
            "model(batch[0]) where classes are last, forward=lambda model, batch: model(batch[0]).movedim(1, -1) where "
            "they are second"
        )


def found_place(
    model: nn.Module, forward: Callable[[nn.Module, Batch], Tensor], batch: Batch, targets: Tensor
) -> str | None:
    """Returns where the model's classes stand, None where nothing tells. Cost: a forward pass, 2 where shapes do not tell.

    Args:
        batch: some sequences.
        targets: their class labels (n, positions, ...).
    """
    seen: list[tuple[nn.Module, Tensor]] = []

    def noted(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            seen[:] = [(module, output)]

    own = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(noted) for module in own]
    try:
        z = _run(model, forward, batch)
    finally:
        for handle in handles:
            handle.remove()
    if z is None:
        return None
    places = possible(z, targets)
    if len(places) < 2:
        return places[0] if places else None
    return _by_length(model, forward, batch, z, targets) or (_by_module(*seen[0], z) if seen else None)


def _run(model: nn.Module, forward: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor | None:
    """Returns the model's outputs, None where it cannot take the batch."""
    try:
        with measuring(model, forward_mode=False), torch.no_grad():
            found = with_parameters(model, {}, lambda: forward(model, batch))
    except Exception as error:  # whatever a model says of sequences it is not made for
        if is_out_of_memory(error):
            raise
        return None
    return found if isinstance(found, Tensor) else None


def _by_length(
    model: nn.Module, forward: Callable[[nn.Module, Batch], Tensor], batch: Batch, z: Tensor, targets: Tensor
) -> str | None:
    """Returns the dimension that does not change with the number of positions, where the model takes fewer of them."""
    n, t = targets.shape[:2]
    if targets.dim() != 2 or t < 2:
        return None
    shorter = mapped(batch, lambda x: x[:, : t - 1] if x.dim() >= 2 and x.shape[:2] == (n, t) else x)
    found = _run(model, forward, shorter)
    shapes = {LAST: (n, t - 1, z.shape[-1]), SECOND: (n, z.shape[1], t - 1)}
    return next(
        (place for place, shape in shapes.items() if found is not None and found.shape == shape), None
    )


def _by_module(module: nn.Module, output: Tensor, z: Tensor) -> str | None:
    """Returns where the last module with parameters put the classes, if its output is the model's, moved or not."""
    if not isinstance(module, (nn.Linear, _CONVOLUTIONS)) or output.numel() != z.numel():
        return None
    made = SECOND if isinstance(module, _CONVOLUTIONS) else LAST
    if output.shape == z.shape and torch.equal(output, z):
        return made
    moved, place = (output.movedim(1, -1), LAST) if made == SECOND else (output.movedim(-1, 1), SECOND)
    return place if moved.shape == z.shape and torch.equal(moved, z) else None


def do_not_fit(outputs: Sequence[int], targets: Tensor, *, batch_first: bool) -> str:
    """Returns the sentence on outputs and targets (shapes with sequences first) that are not of the same tokens."""
    z, y = tuple(outputs), tuple(targets.shape)
    if batch_first:
        return (
            f"outputs {z} do not fit targets {y}: wanted one target per token with the class dimension of the outputs "
            "last, outputs (sequences, positions, classes) and targets (sequences, positions), or (sequences, classes) and "
            "(sequences,); forward= and targets= say how they come"
        )
    z, y = (*z[1::-1], *z[2:]), (*y[1::-1], *y[2:])  # as they came
    return (
        f"outputs {z} do not fit targets {y}: with batch_first=False outputs must be (positions, sequences, classes) and "
        "targets (positions, sequences): where they come flat, give them their shape back in forward= and targets=, as in "
        "forward=lambda model, batch: model(batch[0]).view(*batch[0].shape, -1), targets=lambda batch: "
        "batch[1].view_as(batch[0])"
    )
