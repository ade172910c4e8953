"""Reading in a process forked from one that has read: dask's threads stay behind, and its pools would wait for them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock

from dask import threaded


@cache
def read_after_forks() -> None:
    """Makes dask start new threads in every process forked from this one, and in this one if it was itself forked.

    The cache makes it once a process; a forked one inherits that, and the hook.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_drop_pools)
        if any(map(_is_left_behind, [threaded.default_pool, *_other_pools()])):
            _drop_pools()


def _other_pools() -> list[object]:
    return [pool for of_thread in list(threaded.pools.values()) for pool in of_thread.values()]


def _is_left_behind(pool: object) -> bool:
    """Whether a pool has threads and none of them runs: they do in the process that this one was forked from."""
    threads = pool._threads if isinstance(pool, ThreadPoolExecutor) else ()
    return bool(threads) and not any(thread.is_alive() for thread in threads)


def _drop_pools() -> None:
    threaded.default_pool = None
    threaded.pools.clear()
    threaded.pools_lock = Lock()  # another thread may have held it at the fork
