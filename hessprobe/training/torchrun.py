"""What torchrun tells each process that it starts, read from the environment; no torch is loaded for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

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
