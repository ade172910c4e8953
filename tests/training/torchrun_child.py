"""torchrun in small: forks the processes of a command on demand, so that none of them has to import torch.

A line on stdin: `COUNT<tab>FAULT<tab>FILE<tab>WORD...`. The command's processes write what they say into the file, and
meet as torchrun's do; when one ends badly the others get SIGTERM. Lines on stdout: their pids; then how each ended.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backpack  # noqa: F401
import curvlinops  # noqa: F401  what the probes load when they need it: seconds
import pytorch_optimizer  # noqa: F401
import torch

import hessprobe.report.page
import hessprobe.training.planning.plan
import hessprobe.training.study
from hessprobe.cli import main as command_line
from hessprobe.instruments.cross_layer.measure.probe import CrossLayerProbe
from hessprobe.machine import process_group
from hessprobe.store.rows import TableRows
from hessprobe.training import loop
from hessprobe.training.optimizers import FirstOrderOptimizer
from tests.contracts.training_child import warm_up
from tests.training.in_double import decoders_in_double


def before(of: type, name: str, act: Callable[..., None]) -> None:
    """Makes a method call act(self, *words) before it does what it did."""
    method = getattr(of, name)

    def changed(self: Any, *words: Any, **named: Any) -> Any:
        act(self, *words, **named)
        return method(self, *words, **named)

    setattr(of, name, changed)


def one_measures_not(probe: CrossLayerProbe, snapshot: Any) -> None:
    if snapshot.step == 2:
        raise MemoryError("no room for the second row")


def one_rounds_otherwise(run: loop.Run) -> None:
    for p in run.objective.model.parameters():
        p.data.mul_(1 + 1e-7)


def one_breaks(optimizer: FirstOrderOptimizer, *_: Any) -> None:
    if optimizer.outer == 1:
        raise ZeroDivisionError("a mistake of ours")


def disk_is_full(rows: TableRows, step: int, *_: Any) -> None:
    if step == 1:
        raise OSError(28, "No space left on device")


def one_stops(optimizer: FirstOrderOptimizer, *_: Any) -> None:
    if optimizer.outer == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def hurry() -> None:
    process_group.GRACE = 0.5


# What goes wrong, by process.
FAULTS: dict[str, dict[int, Callable[[], None]]] = {
    "measuring": {1: lambda: before(CrossLayerProbe, "measure", one_measures_not)},
    "rounding": {1: lambda: before(loop.Run, "_same_everywhere", one_rounds_otherwise)},
    "a mistake": {1: lambda: before(FirstOrderOptimizer, "step", one_breaks)},
    "the disk": {0: lambda: before(TableRows, "put", disk_is_full)},
    "hanging": {0: hurry, 1: lambda: before(FirstOrderOptimizer, "step", one_stops)},
}


def run(rank: int, count: int, port: int, fault: str, words: list[str]) -> None:
    """Runs the command line as one of the processes."""
    if count > 1:
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in torchrun.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fault:
        FAULTS[fault].get(rank, lambda: None)()
    sys.argv = ["hessprobe", *words]
    command_line()


def forked(rank: int, count: int, port: int, fault: str, file: str, words: list[str]) -> int:
    """Returns the pid of a process that runs the command."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(file, "a", encoding="utf-8", buffering=1) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        run(rank, count, port, fault, words)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def statuses(pids: list[int]) -> list[int]:
    """Waits for all processes, as torchrun does; returns exit statuses, or minus the signals that ended them."""
    found: dict[int, int] = {}
    while len(found) < len(pids):
        pid, status = os.wait()
        found[pid] = os.waitstatus_to_exitcode(status)
        if found[pid]:
            for other in set(pids) - set(found):
                os.kill(other, signal.SIGTERM)
    return [found[pid] for pid in pids]


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def main() -> None:
    """Serves one command after the other."""
    torch.set_num_threads(1)
    decoders_in_double()
    warm_up()
    hessprobe.report.page.write_report = lambda run, destination=None: Path(run, "report.html")
    for line in sys.stdin:
        number, fault, file, *words = line.rstrip("\n").split("\t")
        count, port = int(number), free_port()
        pids = [forked(rank, count, port, fault, file, words) for rank in range(count)]
        print(*pids, flush=True)
        print(*statuses(pids), flush=True)


if __name__ == "__main__":
    main()
