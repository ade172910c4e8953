"""A measurement in the middle of somebody's training that leaves no trace: everything it could change is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hessprobe.problem.module_state import ModuleState


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back, when left, everything that a measurement could change.

    That is the random states of torch, numpy and Python, gradients, train and eval modes, and what the modules keep between
    forward passes, in buffers and plain attributes.

    Inside, no gradient is set (a backward pass then adds to none of the user's), gradients can be taken although the
    caller may have switched them off, and compiled parts run eagerly, so that they are not compiled anew for shapes or
    parameters that only a measurement has. Cost: a copy of the buffers and
    of tensors in plain attributes.
    """
    modes = {module: module.training for module in model.modules()}
    gradients = [(p, p.grad) for p in model.parameters()]
    state = ModuleState(model, copied=None)
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    for p, _ in gradients:
        p.grad = None
    try:
        with (
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
            torch.inference_mode(False),
            _deterministic_where_possible(),
            torch.enable_grad(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for p, gradient in gradients:
            p.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        state.restore()


@contextmanager
def _deterministic_where_possible() -> Iterator[None]:
    """Where the caller wants deterministic algorithms, lets what has none warn, not raise: cumulative sums on CUDA."""
    wanted = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)
