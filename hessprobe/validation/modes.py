"""Ways to compute that a validation switches between, each put back as it was: TF32, bfloat16, deterministic algorithms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOAT32, TF32, BFLOAT16 = "float32", "TF32", "bfloat16"


def precisions(device: torch.device) -> tuple[str, ...]:
    """Returns the precisions this device has: TF32 from NVIDIA's Ampere on."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return (FLOAT32, TF32, BFLOAT16)
    return (FLOAT32, BFLOAT16)


@contextmanager
def matmuls(precision: str) -> Iterator[None]:
    """Lets float32 matrix products on a GPU round their factors to TF32, or not; puts the setting back.

    torch's older switches (allow_tf32) cannot be read once a newer one (fp32_precision, from 2.9) was set: the newer one
    is put back to what it was, and then they can.
    """
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if precision == TF32 else "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def deterministic() -> Iterator[None]:
    """Makes torch take deterministic algorithms, or raise where it has none.

    cuBLAS reads CUBLAS_WORKSPACE_CONFIG when it starts; `prepare` has set it.
    """
    before, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def prepare() -> None:
    """Sets what must stand in the environment before CUDA is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Returns the context of a training pass in this precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == BFLOAT16)


class Autocast(nn.Module):
    """A model whose own forward pass runs under autocast with bfloat16, as accelerate wraps one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        """Returns the model's outputs in float32."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return self.model(*inputs).float()
