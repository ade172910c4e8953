"""Several gloo processes on this machine, each running one function of a test.

They are forked from one server, started at the first of them, which holds what all import: seconds of every process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hessprobe.machine.processes import Processes

SECONDS = 120  # a hang ends the test, however busy the machine
# What tests of several processes import, and what the probes load when they need it. The server itself computes nothing:
# it must own no thread when it forks.
HELD = (
    "tests.conftest", "pytest", "curvlinops", "pytorch_optimizer", "torch.distributed.fsdp", "torch.nn.parallel",
    "hessprobe.instruments.preconditioner.measure.probe", "hessprobe.any_loop.recorder", "tests.cases", "tests.processes",
)  # fmt: skip


def on_processes(count: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Runs function(processes, folder, *arguments) in `count` processes; an assertion failing in one fails the test.

    Args:
        function: at module level, so that it can be pickled.
        folder: empty; where the processes meet, and may leave files.
    """
    on_forks(_one, (function, count, folder, *arguments), count)


def on_forks(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Runs function(rank, *arguments) in `count` processes forked from the server, and waits for them."""
    multiprocessing.set_forkserver_preload(list(HELD))
    mp.start_processes(function, arguments, nprocs=count, start_method="forkserver")


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
