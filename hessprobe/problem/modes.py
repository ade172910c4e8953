"""What training mode makes of a model that eval mode does not: batch statistics, chance, another precision."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


def batch_statistics(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that normalise by the batch's own statistics now, and by running averages in eval mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and module.training
        and (module.track_running_stats or not isinstance(module, _InstanceNorm))
    ]


def talks_in_training(model: nn.Module) -> bool:
    """Tells whether a forward pass in train mode waits for other processes: batch statistics over all of them."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return several and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


@contextmanager
def training_modes(model: nn.Module, only: list[nn.Module] | None = None) -> Iterator[None]:
    """Puts modules into the modes they train in, or `only` these of all; the caller puts modes and buffers back.

    A loop that has validated before it came here left everything in eval mode: then all modules train.
    """
    modules = list(model.modules())
    if only is not None:
        for module in modules:
            module.training = False
        for module in only:
            module.training = True
    elif not any(module.training for module in modules):
        for module in modules:
            module.training = True
    yield


def random_states(device: torch.device) -> tuple[object, ...]:
    """Returns the states of the generators that a forward pass may draw from, to be compared."""
    numpy: tuple[Any, ...] = np.random.get_state(legacy=True)  # noqa: NPY002  # pyright: ignore[reportAssignmentType]
    on_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    drawn = torch.get_rng_state().numpy().tobytes()
    return drawn, on_device, random.getstate(), numpy[1].tobytes(), numpy[2]


def reseed(seed: int) -> None:
    """Sets all generators that a forward pass may draw from; the caller puts them back."""
    torch.manual_seed(seed)  # noqa: TID251
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


@contextmanager
def activation_types(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Collects the floating types of what the model's modules return inside."""
    found: set[torch.dtype] = set()

    def look(module: nn.Module, inputs: object, outputs: object) -> None:
        listed = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        found.update(x.dtype for x in listed if isinstance(x, Tensor) and x.is_floating_point())

    hooks = [module.register_forward_hook(look) for module in model.modules()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
