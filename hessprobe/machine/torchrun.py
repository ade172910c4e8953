"""What torchrun tells each process that it starts, read from the environment, and how such a process ends; without torch."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One of several processes.

    Attributes:
        rank: which one of all, from 0.
        count: how many there are.
        local_rank, local_count: the same among those of its machine.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int


def launched() -> Launch | None:
    """Returns which of several processes this is; None where it is the only one."""
    if any(not os.environ.get(name, "").isdigit() for name in _NAMES):
        return None
    rank, count, local_rank, local_count = (int(os.environ[name]) for name in _NAMES)
    return (
        Launch(rank=rank, count=count, local_rank=local_rank, local_count=local_count) if count > 1 else None
    )


def is_first() -> bool:
    """Whether this process speaks and writes for all."""
    launch = launched()
    return launch is None or launch.rank == 0


def leave(status: int) -> NoReturn:
    """Ends this process with a status, all it had to say said, without taking the interpreter down.

    Where another process was lost its group could not be ended, and gloo's threads go on; one of them that lets go of a
    tensor while the interpreter is being taken down ends in std::terminate, and torchrun reports signal 6 for a run that
    was whole.
    """
    atexit._run_exitfuncs()  # what loggers and stores have left to do
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
