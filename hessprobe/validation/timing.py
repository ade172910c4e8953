"""Seconds and bytes of calls on any device: medians of interleaved rounds, and by how much peak memory grows."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given; on a CPU it has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device) -> float:
    """Returns the seconds that one call takes, until the device is done."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(calls: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    """Returns each call's median seconds over interleaved rounds, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for attempt in range(rounds + 1):
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            if attempt:
                times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_growth(call: Call, device: torch.device | None = None, *, collect: bool = True) -> float:
    """Returns by how many bytes memory rose above its start during a call: the GPU's, or the resident set (Linux).

    On a CPU what earlier calls have left in the heap can hide what this one needs; NaN where it cannot be known.

    Args:
        collect: whether to collect Python's garbage before.
    """
    if collect:
        gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    if sys.platform != "linux":
        call()
        return float("nan")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except OSError:  # another libc, or /proc cannot be written
        return float("nan")


def bytes_alive(device: torch.device) -> float:
    """Returns how many bytes live tensors hold: of the GPU's allocator, or of all tensors Python knows on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()  # which cuBLAS takes from the same allocator, and keeps
        return float(torch.cuda.memory_allocated(device))
    stores = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            store = thing.untyped_storage()
            stores[store.data_ptr()] = store.nbytes()
    return float(sum(stores.values()))


def forget(device: torch.device) -> None:
    """Gives back what torch keeps of a GPU's memory without using it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024
    raise KeyError(field)
