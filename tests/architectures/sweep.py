"""Checks every architecture, in processes of a few each: `python -m tests.architectures.sweep` prints counts and failures.

A model that crashes or outlasts its time ends its own process alone, and is reported like any other failure.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 60  # for one model; the slowest needs about ten on a free core


def swept(
    names: list[str], *, curvature: bool = True, seconds: float = SECONDS
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each architecture's outcomes; where one ends its process, the rest go on in a new one."""
    left = list(names)
    while left:
        command = [
            sys.executable,
            "-m",
            "tests.architectures.sweep",
            "--worker",
            *([] if curvature else ["--partition"]),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen(
            [*command, *left],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        reason = f"outlasts {seconds} seconds"
        for line in _lines(worker, seconds):
            found = json.loads(line)
            left.remove(found["name"])
            yield found["name"], found["checks"]
        if worker.poll() is None:
            worker.kill()
        elif left:
            reason = f"its process ended with {worker.returncode}"
        worker.wait()
        worker.stdout.close()  # type: ignore[union-attr]
        if left:
            yield left.pop(0), {"built": reason}


def swept_by(
    workers: int, names: list[str], *, curvature: bool = True, seconds: float = SECONDS
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the same as `swept` from that many processes at once, in the order in which they are done."""
    done: queue.Queue[tuple[str, dict[str, str]] | None] = queue.Queue()

    def one(part: list[str]) -> None:
        for found in swept(part, curvature=curvature, seconds=seconds):
            done.put(found)
        done.put(None)

    threads = [
        threading.Thread(target=one, args=(names[start::workers],), daemon=True) for start in range(workers)
    ]
    for thread in threads:
        thread.start()
    left = workers
    while left:
        found = done.get()
        if found is None:
            left -= 1
        else:
            yield found


def _lines(worker: subprocess.Popen[str], seconds: float) -> Iterator[str]:
    """Yields a process's lines until it ends or says nothing for that long (and 30 seconds to load, at first)."""
    assert worker.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        wait = seconds + 30
        while selector.select(wait):
            line = worker.stdout.readline()
            if not line:
                worker.wait()
                return
            wait = seconds
            if line.startswith("{"):
                yield line


def names_of(wanted: list[str], *, each: bool = False) -> list[str]:
    """Returns the architectures to check: those named, or all, or one class of each model type."""
    _quiet()
    from tests.architectures.building import architectures, one_of_each

    if each:
        return one_of_each()
    known = [architecture.name for architecture in architectures()]
    return [name for name in known if not wanted or name in wanted]


def work(names: list[str], *, curvature: bool) -> None:
    """Checks architectures in this process, a line of JSON each."""
    _quiet()
    import torch

    from tests.architectures.building import architectures
    from tests.architectures.checking import checked

    torch.set_num_threads(1)
    known = {architecture.name: architecture for architecture in architectures()}
    for name in names:
        print(json.dumps({"name": name, "checks": checked(known[name], curvature=curvature)}), flush=True)


def _quiet() -> None:
    """Hides a torchvision that cannot be imported, and what transformers logs."""
    from tests.conftest import _hide_broken_torchvision

    _hide_broken_torchvision()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def counted(outcomes: dict[str, dict[str, str]]) -> dict[str, dict[str, int]]:
    """Returns, for each check, of how many models it was right, refused and wrong."""
    found: dict[str, dict[str, int]] = {}
    for checks in outcomes.values():
        for check, said in checks.items():
            kind = "ok" if said == "ok" else "refused" if said.startswith("refused") else "failed"
            counts = found.setdefault(check, {"ok": 0, "refused": 0, "failed": 0})
            counts[kind] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes of transformers; default: all")
    parser.add_argument("--partition", action="store_true", help="build and partition only, no curvature")
    parser.add_argument("--each", action="store_true", help="one class of each model type, as the test does")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for one model")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.names, curvature=not arguments.partition)
        return
    start, outcomes = time.monotonic(), {}
    names = names_of(arguments.names, each=arguments.each)
    more = {"curvature": not arguments.partition, "seconds": arguments.seconds}
    for name, checks in swept_by(arguments.workers, names, **more):
        outcomes[name] = checks
        for check, said in checks.items():
            if said != "ok":
                print(f"{name}\t{check}\t{said}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
    print(f"{len(outcomes)} architectures in {time.monotonic() - start:.0f} s")
    for check, counts in counted(outcomes).items():
        print(f"{check}: {counts['ok']} ok, {counts['refused']} refused, {counts['failed']} failed")


if __name__ == "__main__":
    main()
