"""The processes of a data-parallel loop that record together: how they meet, and what they tell each other.

They talk in groups of their own, so that no message is ever taken for one of training's. A process that waits where the
others do not call says so, and gives up after a while: recording then stops, and training goes on.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes, ProcessLost
from hessprobe.problem.batches import Batch

LOGGER = logging.getLogger("hessprobe")
WAIT = timedelta(
    minutes=5
)  # for the others to come: shorter than any backend waits for training's own collectives
PATIENCE = 30.0  # seconds until a line says who is waited for
_ALIKE = 1e-5  # of the norm of theta: what different machines may make of the same training


class OutOfStep(UserError):
    """The processes are not at the same step, so their batches do not belong together."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one process brings to a row.

    Attributes:
        batches: its micro-batches, on the CPU.
        known: what it knows of the time before the step; "" where that is nothing.
        weights: the sum and the norm of theta.
    """

    batches: list[Batch]
    known: str
    weights: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class _Said:
    step: int
    due: tuple[str, ...]
    part: bytes = b""
    failure: str = ""


class Meeting:
    """The processes that record together, as one of them sees them.

    Args:
        processes: who they are; None: all of torch.distributed's, in groups of their own.
        device: where the model is.

    Attributes:
        processes: what measurements run on.

    Raises:
        UserError: the others have not come within 5 minutes.
    """

    def __init__(self, processes: Processes | None, device: torch.device) -> None:
        self._groups: list[dist.ProcessGroup] = []
        if processes is not None or Processes.of_group().count == 1:
            self.processes = self._talk = processes or ALONE
            return
        with self._waiting("at its construction"):
            try:
                self._groups.append(_group("gloo", WAIT))
                self._talk = Processes.of_group(self._groups[0])
                self._talk.gathered(None)
            except (RuntimeError, ProcessLost) as error:
                raise UserError(
                    f"this is process {dist.get_rank()} of {dist.get_world_size()}, and not all of them have made a "
                    f"recorder in {WAIT.seconds:,} s ({str(error).strip().splitlines()[0]}): every process makes one and "
                    "calls it, the first alone writes; processes=hessprobe.machine.processes.ALONE records the batches of "
                    "one process alone"
                ) from error
        # Not in the same group: processes with more to do than others may keep those waiting for longer than WAIT. Words
        # and pickled things go over gloo on GPUs too: a process that died is then noticed at once.
        over_nccl = device.type == "cuda" and "nccl" in str(dist.get_backend_config())
        backend = "cpu:gloo,cuda:nccl" if over_nccl else "gloo" if device.type == "cpu" else None
        self._groups.append(_group(backend, None))
        self.processes = Processes.of_group(self._groups[1])

    def check_alike(self, settings: Mapping[str, object]) -> None:
        """Raises a UserError in all processes where one was given other settings than the first."""
        _check_alike(self.processes.gathered(dict(settings)))

    def check_step(self, step: int) -> None:
        """Raises an OutOfStep in all processes where one is at another step than the first."""
        with self._waiting(f"at step {step:,}"):
            told = self._talk.gathered({"step": step})
        _check_alike(told)

    def all_parts(
        self, step: int, due: tuple[str, ...], own: Callable[[], Contribution]
    ) -> tuple[list[Batch], bool]:
        """Returns the micro-batches of all processes, in their order, and whether all know the same of before the step.

        Raises:
            UserError: in every process, where one could not give its part or holds other parameters.
            OutOfStep: they are not at the same step.
            ProcessLost: one does not come.
        """
        try:
            said = _Said(step=step, due=due, part=pickle.dumps(own()))
        except Exception as error:  # whatever it is, the others must hear of it
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            said = _Said(step=step, due=due, failure=reason)
        with self._waiting(f"at step {step:,}"):
            told = self._talk.gathered(said)
        _check_alike([{"step": other.step, "due": other.due} for other in told])
        for rank, other in enumerate(told):
            if other.failure:
                raise UserError(f"process {rank}: {other.failure}")
        parts: list[Contribution] = [pickle.loads(other.part) for other in told]
        total, norm = parts[0].weights
        for rank, part in enumerate(parts):
            if max(abs(part.weights[0] - total), abs(part.weights[1] - norm)) > _ALIKE * norm:
                raise UserError(
                    f"process {rank} holds other parameters than process 0, and a row is of one model: train under "
                    "DistributedDataParallel, or record one process alone (processes=hessprobe.machine.processes.ALONE)"
                )
        batches = [batch for part in parts for batch in part.batches]
        return batches, all(part.known == parts[0].known for part in parts)

    def leave(self) -> None:
        """Ends the talking; who still waits for this process hears of it at once."""
        for group in self._groups:
            with suppress(Exception):  # training may have ended all groups before
                if "nccl" not in str(dist.get_backend_config(group)):  # whose end would wait for the others
                    dist.destroy_process_group(group)
        self._groups = []

    @contextmanager
    def _waiting(self, where: str) -> Iterator[None]:
        """Says so where the others keep this process waiting."""
        timer = threading.Timer(
            PATIENCE,
            LOGGER.warning,
            (
                "hp.Recorder has been waiting for the other processes %s for %.0f s: every process makes one and calls it "
                "after the same steps, also those that write nothing; it gives up after %.0f s",
                where,
                PATIENCE,
                WAIT.total_seconds(),
            ),
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _group(backend: str | None, timeout: timedelta | None) -> dist.ProcessGroup:
    found = dist.new_group(backend=backend, timeout=timeout)
    assert isinstance(found, dist.ProcessGroup)
    return found


def _check_alike(told: list[dict[str, Any]]) -> None:
    for rank, other in enumerate(told):
        for name, first in told[0].items():
            if other[name] != first:
                both = f" ({other[name]}, and {first} there)" if len(f"{other[name]}{first}") < 80 else ""
                raise OutOfStep(
                    f"process {rank} has another {name} than process 0{both}: every process makes the same recorder, and "
                    "calls it after the same steps, with its own batch of each"
                )
