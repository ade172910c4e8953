"""What a run shows and keeps: its log, its lines, its loggers. Of several processes the first has them, and it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hessprobe.machine.processes import Processes
from hessprobe.measuring.console import RunConsole, stderr
from hessprobe.measuring.loggers import ScalarLog
from hessprobe.measuring.row_recorder import NothingWritten, RowWriter
from hessprobe.recipe import Recipe
from hessprobe.store.writer import RunWriter


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run's rows, lines and scalars go; nowhere in a process that is not the first."""

    writer: RowWriter
    console: RunConsole
    scalars: ScalarLog


@contextmanager
def open_outputs(
    recipe: Recipe, folder: Path, start_log: Callable[[], RunWriter], processes: Processes, *, first: int
) -> Iterator[Outputs]:
    """Yields a run's outputs; the first process starts or reopens the log.

    Args:
        start_log: returns the log's writer; called where there is one.
        first: the step the run begins at, or goes on from.
    """
    steps, name = recipe.training.steps, recipe.optimizer.name
    if not processes.is_first:
        console = RunConsole(steps, first, console=stderr(quiet=True), name=name)
        yield Outputs(writer=NothingWritten(), console=console, scalars=ScalarLog({}, console.say))
        return
    with (
        start_log() as writer,
        RunConsole(steps, first, name=name) as console,
        ScalarLog.open(recipe.loggers, folder, writer.attributes, console.say, first=first) as scalars,
    ):
        yield Outputs(writer=writer, console=console, scalars=scalars)
