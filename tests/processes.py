"""Several gloo processes on this machine, each running one function of a test."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hessprobe.problem.processes import Processes

SECONDS = 120  # a hang ends the test, however busy the machine


def on_processes(count: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Runs function(processes, folder, *arguments) in `count` processes; an assertion failing in one fails the test.

    Args:
        function: at module level, so that it can be pickled.
        folder: empty; where the processes meet, and may leave files.
    """
    mp.spawn(_one, (function, count, folder, *arguments), nprocs=count)


def _one(rank: int, function: Callable[..., None], count: int, folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        function(Processes.of_group(), folder, *arguments)
    finally:
        dist.destroy_process_group()
