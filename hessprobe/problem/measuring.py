"""A model while it is measured: deterministic, differentiable as often as needed, with other parameters in its places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.errors import UserError
from hessprobe.problem.activations import closed_form_activations
from hessprobe.problem.module_state import ModuleState
from hessprobe.problem.swapping import swapped

Result = TypeVar("Result")


@contextmanager
def measuring(model: nn.Module, *, forward_mode: bool = True) -> Iterator[None]:
    """Makes the model deterministic and differentiable as often as needed, and puts everything back after.

    Dropout and batch statistics off (eval), autocast off, compiled parts eager; with `forward_mode`, attention on
    its math path, since the fused kernels have neither forward mode nor second derivatives, and gelu and silu with
    their second derivatives in closed form.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device.type
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        if forward_mode:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(closed_form_activations())
        try:
            # Not model.eval(): a module whose train() is overridden (frozen parts) must keep its own word.
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def with_parameters(model: nn.Module, leaves: Mapping[str, Tensor], function: Callable[[], Result]) -> Result:
    """Returns function() with the leaves in the parameters' places, in backward too, where checkpoints recompute.

    Afterwards every place holds the very object that it held before, also where function() raises, and so does whatever
    the modules keep between forward passes: each pass begins where the one before it began.

    Args:
        leaves: by the parameters' names; of a tied tensor any of its names stands for all of its places.

    Raises:
        UserError: a parameter of that name and shape is no longer there, or function() changes what cannot be put back.
    """
    state = ModuleState(model)
    back = swapped(model, leaves)
    try:
        found = function()
    finally:
        back()
        lost = state.restore()
    if lost:
        raise UserError(
            f"{type(model).__name__}: its forward pass changes {', '.join(lost[:5])}, which cannot be put back: keep such "
            "state in buffers, or in tensors, lists and dictionaries of the module, or let it alone in eval mode"
        )
    return found
