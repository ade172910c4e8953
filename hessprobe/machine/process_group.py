"""The processes that torchrun starts, brought together; a device for each; and how one of them ends.

What one meets ends all (see Processes.together). Only two ends come from outside: a process that was killed, which the
others notice at their next word, and torchrun's SIGTERM to those that are left. Both become one line and exit 1.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from types import FrameType

import torch
import torch.distributed as dist

from hessprobe.errors import RunFailed, UserError
from hessprobe.machine.devices import pick_device
from hessprobe.machine.processes import ALONE, PeerFailed, Processes, ProcessLost
from hessprobe.machine.torchrun import Launch, launched

# A process that died is noticed at once; this is for one that hangs, and more than any of them keeps the others waiting.
TIMEOUT = timedelta(minutes=10)
GRACE = 10.0  # seconds from SIGTERM to the end; torchrun's SIGKILL comes after 30
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_KEPT = "what was logged is kept; go on with --resume"


class Stopped(BaseException):
    """This process was told to end. Not an Exception: measuring goes on after those."""


@contextmanager
def process_group(launch: Launch | None, timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
    """Yields all processes of a launch, or the one there is without one: then nothing is done.

    Raises:
        ProcessLost: another process has died, or SIGTERM came.
        RunFailed: another process has failed for a reason of its own, or they do not find each other.
    """
    if launch is None:
        yield ALONE
        return
    with _stoppable(launch):
        both = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            # Words and pickled things go over gloo on GPUs too: a process that died is then noticed at once.
            dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=timeout)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise RunFailed(
                f"process {launch.rank} of {launch.count} did not find the others ({reason}): start them with torchrun "
                "--nproc-per-node N -m hessprobe train ..."
            ) from error
        processes = Processes.of_group()
        try:
            with processes.together():
                yield processes
        except ProcessLost:
            raise  # and leaves the group as it is: to end it, a backend could wait for who is gone
        except Exception:
            # torchrun stops the others as soon as one has ended: not before all have heard why.
            _ignore_signals()
            with suppress(ProcessLost):
                processes.all_say(True)
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def own_device(wanted: str, processes: Processes) -> torch.device:
    """Returns this process's device: with several, process n of a machine takes its GPU n.

    Raises:
        UserError: see `pick_device`; with several processes one device for all, or fewer GPUs than processes.
    """
    if processes.count == 1:
        return pick_device(wanted)
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {wanted}: {processes.count} processes take a device each; wanted auto, cpu, or cuda, where process "
            "n of a machine takes cuda:n. CUDA_VISIBLE_DEVICES chooses which GPUs there are"
        )
    device = pick_device(wanted)
    if device.type == "cpu":
        return device
    launch = launched()
    local_rank, needed = (
        (launch.local_rank, launch.local_count) if launch else (processes.rank, processes.count)
    )
    if needed > torch.cuda.device_count():
        raise UserError(
            f"{needed} processes on this machine need a GPU each, and it has {torch.cuda.device_count()}: start as many as "
            "it has GPUs (--nproc-per-node), or give --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _stoppable(launch: Launch) -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C end what runs inside, once."""
    hears, writes = socket.socketpair()
    writes.setblocking(False)
    ended = Event()

    def stop(number: int, frame: FrameType | None) -> None:
        _ignore_signals()  # torchrun passes Ctrl-C on: a second one would fall into the cleaning up
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    wakes = signal.set_wakeup_fd(writes.fileno(), warn_on_full_buffer=False)
    watcher = Thread(target=_end_for_certain, args=(hears, ended, launch), daemon=True)
    watcher.start()
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except BaseException as error:
        _ignore_signals()  # the process is about to end: torchrun must not cut off its last words
        told = _told(error, launch)
        if told is error:
            raise
        raise told from error
    else:
        for number, handler in before.items():
            signal.signal(number, handler)
    finally:
        ended.set()
        signal.set_wakeup_fd(wakes)
        writes.close()
        watcher.join(GRACE)  # it hears that: a thread must not wake up while the interpreter is taken down


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_for_certain(hears: socket.socket, ended: Event, launch: Launch) -> None:
    """Ends a process that does not end by itself after a signal.

    Python's handlers run between its own instructions, and the main thread may be waiting in a library for what a dead
    process will never send: a sum on GPUs, above all.
    """
    with hears:
        while number := hears.recv(1):  # empty: it ended
            if number[0] in _SIGNALS and not ended.wait(GRACE):
                print(f"failed: {_stopped(launch)}", file=sys.stderr, flush=True)
                os._exit(1)


def _told(error: BaseException, launch: Launch) -> BaseException:
    """Returns the error as the command line is to say it."""
    if isinstance(error, Stopped):
        return ProcessLost(_stopped(launch))
    if isinstance(error, ProcessLost):
        return ProcessLost(f"{error}; go on with --resume")
    if isinstance(error, PeerFailed) and not isinstance(error, UserError):
        return RunFailed(f"{error}; {_KEPT}")
    return error


def _stopped(launch: Launch) -> str:
    return (
        f"process {launch.rank} of {launch.count} was stopped, as torchrun does when another one has died; "
        f"{_KEPT}"
    )
