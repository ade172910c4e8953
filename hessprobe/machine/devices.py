"""Where tensors live: a device by name, or the one at hand."""

from __future__ import annotations

import resource
import sys

import torch

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes


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
