"""Where a log's numbers come from: machine, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from hessprobe.machine.devices import uses_tf32
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.problem.partition import Partition

_LIBRARIES = ("hessprobe", "torch", "curvlinops-for-pytorch", "numpy", "xarray", "zarr")


def machine_attributes(
    folder: Path, device: torch.device, partition: Partition, processes: Processes = ALONE
) -> dict[str, object]:
    """Returns the root attributes that any run has: when it began, by which versions, on what, which blocks."""
    known = environment(device)
    return {
        "name": folder.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": json.dumps(known.versions),
        "git_commit": known.commit,
        "device": known.device,
        "float32_matmul": known.float32_matmul,
        "autocast": known.autocast,
        "deterministic": int(torch.are_deterministic_algorithms_enabled()),
        "processes": processes.count,
        "partition": json.dumps(partition.sizes),
    }


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What numbers were computed by: versions by library, the source tree's commit or "", the device in words.

    Attributes:
        float32_matmul: what float32 matrix products round their factors to: "float32", or "tf32" on a GPU that was told so.
        autocast: the type of torch.autocast in force here, or "none"; a loop's own passes may switch it on later.
    """

    versions: dict[str, str]
    commit: str
    device: str
    float32_matmul: str
    autocast: str


def environment(device: torch.device) -> Environment:
    """Returns what runs here."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return Environment(
        versions={"python": platform.python_version(), **versions},
        commit=_git_commit(),
        device=f"{device} ({name}, {torch.get_num_threads()} threads)",
        float32_matmul="tf32" if uses_tf32(device) else "float32",
        autocast=_autocast(device.type),
    )


def _autocast(kind: str) -> str:
    return (
        str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        if torch.is_autocast_enabled(kind)
        else "none"
    )


def _git_commit() -> str:
    """Returns the commit of the source tree hessprobe runs from, or "" where it is installed without one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip()
