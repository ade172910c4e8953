"""Where tensors live: a device by name, what memory it has, and ways there and back that do not make the host wait.

A host that runs ahead of a GPU keeps it busy; it waits wherever a number is read (`.item()`, `float()`), a shape depends on
data, or a copy is not asynchronous. On a CPU all of this is what plain torch does, bit for bit.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes

# Of what a GPU has free, one in so many parts is what a chunk of work may take: theta's copies and peers need some too.
PARTS_OF_FREE = 4


def pick_device(wanted: str) -> torch.device:
    """Returns the device; "auto" takes a GPU where there is one.

    Raises:
        UserError: a device that torch does not know or this machine does not have.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        have = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(
            f"--device {wanted}: not to be had here; this machine has {', '.join(have)}"
        ) from error
    return device


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new high-water mark where the device keeps one of its own (CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device, processes: Processes = ALONE) -> float:
    """Returns the high-water mark in bytes: of the GPU since the last reset, or of a whole process so far.

    Of several processes it is the largest.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return float(processes.most(torch.tensor(peak)))


def free_memory(device: torch.device) -> float:
    """Returns how many bytes a GPU has free, what torch keeps unused included; infinity on a CPU."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def working_memory(device: torch.device, usual: int) -> int:
    """Returns the bytes that a chunk of work may take: a quarter of what a GPU has free now, `usual` elsewhere."""
    return int(free_memory(device) // PARTS_OF_FREE) if device.type == "cuda" else usual


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on a device; on its way to a GPU no one waits for it.

    A conversion belongs after it: torch would convert a tensor that is still on its way from a GPU.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def put_by(tensor: Tensor) -> Tensor:
    """Returns the tensor in main memory, pinned where it comes from a GPU: to be `sent` back, and not to be read.

    It is on its way when this returns; work on the GPU's same stream comes after it.
    """
    return tensor.to("cpu", non_blocking=tensor.is_cuda)


def read(scalars: Iterable[Tensor]) -> list[float]:
    """Returns tensors of one number each as Python's, in float64, with one wait for all of them."""
    found = [x.detach().double() for x in scalars]
    return torch.stack([x.to(found[0].device) for x in found]).tolist() if found else []


def uses_tf32(device: torch.device) -> bool:
    """Tells whether float32 matrix products on this device round their factors to TF32."""
    # The older switch, allow_tf32, raises once the newer one was set.
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
