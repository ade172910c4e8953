"""One micro-batch forward once and backward for each round, with every tap's input and output gradients handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.kernels.plan import NotOneCall, Tap
from hessprobe.kernels.sequence_gradients import outputs_of
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.operation_rules import without_rules


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a tap's module was given in the forward pass, and the bytes of its outputs."""

    inputs: Tensor
    output_bytes: int


def forward_and_backward(
    objective: Objective,
    batch: Batch,
    number: int,
    taps: Sequence[Tap],
    cotangents: Sequence[Callable[[Tensor, Tensor], Tensor]],
    *,
    dtype: torch.dtype,
    forwarded: Callable[[Mapping[int, Seen]], None],
    arrived: Callable[[Tap, Tensor], None],
    autocast: torch.dtype | None = None,
    anchors: Callable[[], Sequence[Tensor]] = tuple,
) -> list[Tensor]:
    """Returns the cotangents (n, c) of each round, after pulling them back through the taps.

    Args:
        number: of the micro-batch, for messages.
        cotangents: for each round (outputs (n, c) in `dtype`, targets) -> cotangents (n, c).
        forwarded: called once, between forward and backward, with what each tap has seen, by the tap's id.
        arrived: called with a tap and its outputs' gradient, once a round.
        anchors: what else the forward pass has read that wants gradients; taps may lie between these and the outputs.

    Raises:
        NotOneCall: a tap's module was not called exactly once with the sequences first, or reaches no output.
        UserError: the outputs are not numbers.
    """
    count, _ = objective.sequence_shape(batch)
    roots: list[tuple[Tap, Tensor]] = []
    seen: dict[int, Seen] = {}
    arrivals = {id(tap): 0 for tap in taps}
    recomputing = False

    def noted(tap: Tap, gradient: Tensor) -> None:
        arrivals[id(tap)] += 1
        with without_rules():
            arrived(tap, gradient.detach())

    def tapped(tap: Tap) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            with without_rules():
                return looked_at(inputs, output)

        def looked_at(inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            # The graph, below this module; under no_grad it ends here, and so do gradients: they are zero.
            goes_on = inputs[0].requires_grad and output.requires_grad
            if recomputing:  # a checkpointed part, in backward: the same graph again, and nothing to note
                return None if goes_on else output.detach().requires_grad_().clone()
            if id(tap) in seen or [x.shape[:1] for x in (*inputs, output)] != 2 * [(count,)]:
                raise NotOneCall(tap)
            seen[id(tap)] = Seen(inputs=inputs[0].detach(), output_bytes=output.nbytes)
            if goes_on:
                output.register_hook(lambda g: noted(tap, g))
                return None
            # No gradients of parameters are wanted, so a graph must start where nothing came before.
            root = output.detach().requires_grad_()
            roots.append((tap, root))
            return root.clone()  # a leaf would refuse to be changed in place by what comes after

        return hook

    handles = [tap.module.register_forward_hook(tapped(tap)) for tap in taps]
    try:
        z = outputs_of(objective, batch, autocast)
        for tap in taps:
            if id(tap) not in seen:
                raise NotOneCall(tap)
        recomputing = True
        if z.isnan().any():
            raise UserError(
                f"{type(objective.model).__name__} returned NaN for micro-batch {number}: there is no curvature to "
                "measure; look at the parameters and at the batch"
            )
        with without_rules():
            forwarded(seen)
        seen.clear()
        fixed, targets = z.detach().to(dtype), objective.targets(batch)
        drawn: list[Tensor] = []
        for r, cotangent in enumerate(cotangents):
            with without_rules():
                drawn.append(cotangent(fixed, targets).to(z.dtype))
            tensors, keep = [*(root for _, root in roots), *anchors()], r < len(cotangents) - 1
            if tensors:
                grads = torch.autograd.grad(z, tensors, drawn[r], retain_graph=keep, allow_unused=True)
                for (tap, root), g in zip(roots, grads, strict=False):
                    noted(tap, torch.zeros_like(root) if g is None else g)
    finally:
        for handle in handles:
            handle.remove()
    for tap in taps:
        if arrivals[id(tap)] != len(cotangents):  # what it computes does not reach the outputs
            raise NotOneCall(tap)
    return drawn
