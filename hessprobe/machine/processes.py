"""Several processes measuring and training together: each runs the network on its share, and sums are added up.

Everything else is replicated: every process knows the whole batch and goes through the same code with the same numbers,
so that results do not depend on how many there are. What fails in one process must fail in all, or the others would
wait for it for ever: every collective therefore opens with a word on how everyone is doing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hessprobe.errors import RunFailed, UserError
from hessprobe.machine.memory import is_out_of_memory

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")
_DEEPEST = 2**20  # regions within regions that a word can tell apart


class PeerFailed(RuntimeError):
    """Something failed in another process; `detail` is what that process said of it (see `Processes.together`)."""

    def __init__(self, message: str, detail: Any = None) -> None:
        super().__init__(message)
        self.detail = detail


class PeerOutOfMemory(PeerFailed, MemoryError):
    """Another process has run out of memory: whoever tries again with less must do so everywhere."""


class PeerRefused(PeerFailed, UserError):
    """Another process met a user's mistake; the message is that process's own."""


class ProcessLost(RunFailed):
    """A process is gone: nothing that needs all of them can go on."""


class Processes:
    """The processes of a distributed run as one of them sees them.

    Args:
        rank: which one this is.
        count: how many there are.
        group: of torch.distributed, None for the default one. All processes of a group make the same calls in the same
            order.

    With `ALONE`, one process without torch.distributed, all of it is free: sums are what they are given.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.count, self._group = rank, count, group
        self._depth = 0  # regions entered and not left (see `together`)
        self._broken = _DEEPEST  # the depth of the region that has failed, while it is being left
        self._place = torch.device("cpu")
        if count > 1 and "gloo" not in str(dist.get_backend_config(group)):
            self._place = torch.device("cuda", torch.cuda.current_device())

    @classmethod
    def of_group(cls, group: dist.ProcessGroup | None = None) -> Processes:
        """Returns the processes of a group of torch.distributed (default: all), or one alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all have found."""
        return self.rank == 0

    def part(self, size: int, rank: int | None = None) -> slice:
        """Returns which of `size` things, in their order, belong to a process (default: this one): about as many each."""
        r = self.rank if rank is None else rank
        return slice(size * r // self.count, size * (r + 1) // self.count)

    def total(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns each tensor's sum over the processes, the same bits in all of them; the tensors are overwritten.

        Bytes moved: about twice each tensor's in and out of every process.
        """
        return self._reduced("SUM", tensors)

    def most(self, tensor: Tensor) -> Tensor:
        """Returns the largest of each entry over the processes; the tensor is overwritten."""
        return self._reduced("MAX", (tensor,))[0]

    def all_say(self, yes: bool) -> bool:
        """Tells whether every process says yes."""
        return yes if self.count == 1 else not bool(self.most(torch.tensor(int(not yes))))

    def gathered(self, thing: Result) -> list[Result]:
        """Returns every process's thing, in their order: anything small that can be pickled."""
        if self.count == 1:
            return [thing]
        self._word("gathered")
        return self._gathered(thing)

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Returns what function() gives in the first process, which alone runs it; its error is raised in all."""
        if self.count == 1:
            return function()
        with self.together():
            found: list[Any] = [function() if self.is_first else None]
            self._word("from_first")
            self._over_wire(lambda: dist.broadcast_object_list(found, group=self._group, group_src=0))
        return found[0]

    def exchanged(self, rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, slice]:
        """Returns the rows of all processes (m, q'), in their order, for this process's part of the columns, and which.

        What is added up over columns (inner products of rows) is then computed once, and its `total` is everyone's.

        Args:
            rows: this process's (counts[rank], q).
            counts: how many rows each process has.

        Bytes moved: each process sends its rows once, and receives m q / count entries.
        """
        width = rows.shape[1]
        if self.count == 1:
            return rows, slice(0, width)
        self._word("exchanged", width)
        parts = [self.part(width, rank) for rank in range(self.count)]
        mine = parts[self.rank].stop - parts[self.rank].start
        sent = torch.cat([rows[:, part].reshape(-1) for part in parts])
        got = rows.new_empty(sum(counts) * mine)
        received = [count * mine for count in counts]
        given = [rows.shape[0] * (part.stop - part.start) for part in parts]
        self._over_wire(lambda: dist.all_to_all_single(got, sent, received, given, group=self._group))
        return got.view(sum(counts), mine), parts[self.rank]

    @contextmanager
    def together(self, detail: Callable[[Exception], Any] = lambda error: None) -> Iterator[None]:
        """What raises inside in one process raises in all: PeerFailed in the others, at their next collective or here.

        Leaving it, every process knows that all got through. May be nested; collectives outside any region are not
        protected.

        Args:
            detail: what the others are told of an error beside its message (PeerFailed.detail); small and picklable.

        Raises:
            ProcessLost: another process has died.
        """
        if self.count == 1:
            yield
            return
        self._depth += 1
        try:
            yield
            self._word("together")
        except ProcessLost:
            raise
        except Exception as error:
            if self._depth < self._broken:  # the others do not know yet
                self._tell(error, detail(error))
            raise
        finally:
            if self._depth <= self._broken:
                self._broken = _DEEPEST
            self._depth -= 1

    def _reduced(self, operation: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.count == 1:
            return tensors
        self._word(operation, sum(x.numel() for x in tensors))
        for x in tensors:
            there = x.contiguous() if x.device.type != "cpu" else x.contiguous().to(self._place)
            op = getattr(dist.ReduceOp, operation)
            self._over_wire(lambda there=there, op=op: dist.all_reduce(there, op, group=self._group))
            if there is not x:
                x.copy_(there)
        return tensors

    def _word(self, what: str, size: int = 0) -> None:
        """Says that this process is well and about to do `what`, and hears the others.

        Raises:
            PeerFailed: one of them has failed, in this region or in one around it.
        """
        if self._broken < _DEEPEST:  # someone has caught a PeerFailed and goes on inside what has failed
            raise PeerFailed("another process has failed here")
        tag = zlib.crc32(f"{what}/{size}".encode())
        failed, most, least = self._heard([0, tag, -tag])
        if failed:
            self._fail(_DEEPEST - failed)
        if most != -least:
            raise ProcessLost(
                f"the {self.count} processes have fallen out of step ({what} here, something else elsewhere): each must "
                "make the same calls in the same order, with the same model, probes and schedules"
            )

    def _tell(self, error: Exception, detail: Any) -> None:
        """Says that this process has failed in its present region."""
        failed, *_ = self._heard([_DEEPEST - self._depth, 0, 0])
        self._broken = _DEEPEST - failed
        kind = PeerFailed
        if is_out_of_memory(error):
            kind = PeerOutOfMemory
        elif isinstance(error, UserError):
            kind = PeerRefused
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._gathered((kind.__name__, said, detail))

    def _fail(self, depth: int) -> None:
        """Raises what another process has said of the failure of a region `depth` deep."""
        self._broken = depth
        told = [(rank, said) for rank, said in enumerate(self._gathered(None)) if said is not None]
        rank, (name, message, detail) = told[0]
        kinds = {kind.__name__: kind for kind in (PeerOutOfMemory, PeerRefused)}
        # What failed around this region is none of the business of those who try this region again.
        kind = kinds.get(name, PeerFailed) if depth == self._depth else PeerFailed
        raise kind(f"process {rank}: {message}", detail)

    def _heard(self, word: list[int]) -> list[int]:
        heard = torch.tensor(word, device=self._place)
        self._over_wire(lambda: dist.all_reduce(heard, dist.ReduceOp.MAX, group=self._group))
        return heard.tolist()

    def _gathered(self, thing: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        self._over_wire(lambda: dist.all_gather_object(found, thing, group=self._group))
        return found

    def _over_wire(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ProcessLost(
                f"process {self.rank} of {self.count} has lost another one: it died or does not answer ({reason}); what "
                "was logged so far is kept"
            ) from error


ALONE = Processes()


def together(
    processes_of: Callable[..., Processes],
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Makes all of a function a region of `Processes.together`: what raises in one process raises in all.

    Args:
        processes_of: the function's own arguments -> the processes that call it.
    """

    def decorated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @wraps(function)
        def entered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with processes_of(*args, **kwargs).together():
                return function(*args, **kwargs)

        return entered

    return decorated
