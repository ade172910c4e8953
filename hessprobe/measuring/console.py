"""What a run says while it works: one aligned line an event, a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hessprobe.instruments.instrument import loaded
from hessprobe.instruments.registry import reader_of
from hessprobe.measuring.row_recorder import Measurement, as_array
from hessprobe.optimization.report import StepReport

ACCENT = "cyan"


class RunConsole:
    """Progress of one run on stderr; results belong on stdout and are not its business.

    Args:
        steps: length of the run.
        start: step it starts from.
        console: where to write; default stderr.
        name: the optimizer's, so that its lines stand below those of the warm-up.
    """

    def __init__(self, steps: int, start: int = 0, console: Console | None = None, name: str = "") -> None:
        self.console = console or stderr()
        self.width = len(str(steps))
        self.name_width = max(len(name) + 1, 8)
        self.progress = Progress(
            TextColumn(f"[{ACCENT}]{{task.description}}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.task = self.progress.add_task("training", total=steps, completed=start)

    def __enter__(self) -> RunConsole:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, label: str, text: str) -> None:
        """Writes one line: a label in the accent colour, then text letter by letter."""
        say(self.console, label, text)

    def step(self, step: int, report: StepReport, held_out_loss: float, name: str) -> None:
        """Writes the line of one outer step and moves the bar."""
        parts = [f"loss {report.loss:.4f}"]
        if math.isfinite(held_out_loss):
            parts.append(f"held-out {held_out_loss:.4f}")
        if math.isfinite(report.step_size):
            parts.append(f"step size {report.step_size:.3f}")
        if math.isfinite(report.predicted_decrease) and report.predicted_decrease:
            parts.append(f"real/predicted {report.actual_decrease / report.predicted_decrease:.2f}")
        if report.outcome != "accepted":
            parts.append(report.outcome)
        self.say(f"step {step:>{self.width}}", f"{name:<{self.name_width}} " + "  ".join(parts))
        self.progress.update(self.task, completed=step + 1)

    def measured(self, measurement: Measurement) -> None:
        """Writes what a probe found, or why it failed."""
        if measurement.row is None:
            text = f"failed: {measurement.failure} (training goes on)"
        else:
            text = f"{_headline(measurement)}  {measurement.seconds:.1f} s"
        self.say(f"  step {measurement.step:>{self.width}}", f"{measurement.probe}: {text}")


def say(console: Console, label: str, text: str) -> None:
    """Writes one line: a label in the accent colour, then text letter by letter."""
    console.print(f"[{ACCENT}]{label:<11}[/] {escape(text)}", soft_wrap=True, emoji=False)


def stderr(*, quiet: bool = False) -> Console:
    """Returns where progress is written; with `quiet`, where nothing is."""
    return Console(stderr=True, highlight=False, quiet=quiet)


def _headline(measurement: Measurement) -> str:
    """Returns a probe's most telling numbers in a few words; of numbers that have none, that there is a row."""
    assert measurement.row is not None
    row = {name: as_array(value) for name, value in measurement.row.items()}
    return loaded(reader_of(measurement.probe).headline)(row)
