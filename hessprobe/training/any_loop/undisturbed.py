"""A measurement in the middle of somebody's training that leaves no trace: everything it could change is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back, when left: the random states of torch, numpy and Python, gradients, buffers, train and eval modes.

    Inside, no gradient is set (a backward pass then adds to none of the user's), gradients can be taken although the
    caller may have switched them off, and compiled parts run eagerly, so that they are not compiled anew for shapes or
    parameters that only a measurement has. Cost: a copy of the buffers.
    """
    modes = {module: module.training for module in model.modules()}
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    python, numpy = random.getstate(), np.random.get_state()
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
        np.random.set_state(numpy)
        for p, gradient in gradients:
            p.grad = gradient
        for module, mode in modes.items():
            module.training = mode
        for module, name, buffer, was in buffers:
            _put_back(module, name, buffer, was)


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


@torch.no_grad()
def _put_back(module: nn.Module, name: str, buffer: Tensor, was: Tensor) -> None:
    """Restores a buffer that was replaced or written to; one that was not is left alone, its version counter too."""
    module._buffers[name] = buffer
    if not torch.equal(buffer, was):
        buffer.copy_(was)
