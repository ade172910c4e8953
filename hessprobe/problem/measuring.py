"""A model while it is measured: deterministic, differentiable as often as needed, with other parameters in its places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.errors import UserError
from hessprobe.problem.module_state import ModuleState
from hessprobe.problem.operation_rules import exact_rules, without_rules
from hessprobe.problem.swapping import swapped

Result = TypeVar("Result")


@contextmanager
def measuring(model: nn.Module, *, forward_mode: bool = True, autocast: bool = False) -> Iterator[None]:
    """Makes the model deterministic and differentiable as often as needed, and puts everything back after.

    Dropout and batch statistics off (eval), autocast off, also where the model switches it on itself (unless `autocast`
    says that it is wanted), embeddings with dense gradients; with `forward_mode`, compiled parts eager, tangents that stop
    where gradients do, gelu and silu with their second derivatives in closed form, and attention and recurrent layers on
    plain paths: the fused kernels have neither forward mode nor second derivatives.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device.type
    tangents, fused = torch._C._is_fwd_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device, enabled=False))
        if forward_mode:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if device == "cuda" and any(isinstance(module, nn.RNNBase) for module in modes):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(exact_rules(device, forward_mode=forward_mode, autocast=autocast))
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch._C._set_fwd_grad_enabled(True)
            # Not model.eval(): a module whose train() is overridden (frozen parts) must keep its own word.
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            torch.backends.mha.set_fastpath_enabled(fused)
            torch._C._set_fwd_grad_enabled(tangents)


def with_parameters(model: nn.Module, leaves: Mapping[str, Tensor], function: Callable[[], Result]) -> Result:
    """Returns function() with the leaves in the parameters' places, in backward too, where checkpoints recompute.

    Afterwards every place holds the very object that it held before, also where function() raises, and so does whatever
    the modules keep between forward passes: each pass begins where the one before it began.

    Args:
        leaves: by the parameters' names; of a tied tensor any of its names stands for all of its places.

    Raises:
        UserError: a parameter of that name and shape is no longer there, or function() changes what cannot be put back.
    """
    with without_rules():
        state = ModuleState(model)
        back = swapped(model, leaves)
    try:
        found = function()
    finally:
        with without_rules():
            back()
            lost = state.restore()
    if lost:
        raise UserError(
            f"{type(model).__name__}: its forward pass changes {', '.join(lost[:5])}, which cannot be put back: keep such "
            "state in buffers, or in tensors, lists and dictionaries of the module, or let it alone in eval mode"
        )
    return found
