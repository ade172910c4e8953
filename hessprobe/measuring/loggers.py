"""A run's few scalars for TensorBoard or Weights & Biases while it goes on: train/<scalar> and probe/<name>/<scalar>.

The arrays stay in the run's log. Logging never changes training, and never ends it: a logger that fails is said once
and dropped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from hessprobe.errors import UserError, first_line
from hessprobe.measuring.row_recorder import Measurement

PROJECT = "hessprobe"
TRAIN = (
    "loss", "held_out_loss", "step_size", "update_norm", "gradient_norm", "predicted_decrease", "actual_decrease",
    "inner_loss_last", "tokens", "seconds", "probe_seconds", "gradient_equivalents",
)  # fmt: skip
_CONSTANT = ("tokens", "sequences", "damping")  # of a probe: the same in every row
_LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Logger(Protocol):
    """Where scalars go."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes some scalars of a step; more of the same step may follow."""
        ...

    def close(self) -> None:
        """Ends the logging."""
        ...


class _TensorBoard:
    """Event files in folder/tensorboard."""

    def __init__(self, folder: Path, attributes: Mapping[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged beyond the step a run is resumed at, is logged again.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """A run of the project hessprobe; the same one where a run is resumed."""

    def __init__(self, folder: Path, attributes: Mapping[str, Any], first: int) -> None:
        wandb = import_module("wandb")
        identity = f"{attributes.get('name')}/{attributes.get('created')}"
        self.run = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder),
            config=json.loads(attributes["recipe"]),
            settings=wandb.Settings(console="off"),  # what the run prints stays its own
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


_MAKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raises a UserError that names the pip command where a logger's package is missing."""
    for name in names:
        try:
            import_module(_LIBRARIES[name])
        except ImportError as error:
            raise UserError(
                f"--log {name} needs the package {_LIBRARIES[name]!r}, which cannot be imported here "
                f"({first_line(error)}): pip install 'hessprobe[{name}]', or leave --log out; the run's own log holds "
                "all it would show"
            ) from error


class ScalarLog:
    """The loggers of one run.

    Args:
        loggers: by name.
        say: (label, text) -> None, for the one line about a logger that fails.
    """

    def __init__(self, loggers: Mapping[str, Logger], say: Callable[[str, str], None]) -> None:
        self._loggers, self._say = dict(loggers), say

    @classmethod
    def open(
        cls,
        names: Sequence[str],
        folder: Path,
        attributes: Mapping[str, Any],
        say: Callable[[str, str], None],
        *,
        first: int = 0,
    ) -> ScalarLog:
        """Returns the loggers of those names, but those that cannot start, which are said.

        Args:
            attributes: of the run's log: its name, when it began, its recipe.
            first: the step the run begins at, or goes on from.
        """
        log, folder = cls({}, say), folder.absolute()
        for name in dict.fromkeys(names):
            try:
                log._loggers[name] = _MAKERS[name](folder, attributes, first)
            except Exception as error:  # whatever it is, training must go on
                log._said(name, error)
        return log

    def trained(self, step: int, row: Mapping[str, Any]) -> None:
        """Logs a row of the table `train`."""
        self._log(step, {f"train/{name}": row[name] for name in TRAIN if name in row})

    def measured(self, measurement: Measurement) -> None:
        """Logs the plain numbers among what a probe measured; of a row that failed nothing."""
        row = {
            **(measurement.row or {}),
            **({"seconds": measurement.seconds} if measurement.row else {}),
        }
        scalars = {
            f"probe/{measurement.probe}/{name}": value
            for name, value in row.items()
            if name not in _CONSTANT and _is_number(value)
        }
        self._log(measurement.step, scalars)

    def close(self) -> None:
        """Ends the logging."""
        for name, logger in list(self._loggers.items()):
            self._guarded(name, logger.close)

    def __enter__(self) -> ScalarLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _log(self, step: int, scalars: Mapping[str, Any]) -> None:
        if not self._loggers:
            return
        finite = {name: number for name, value in scalars.items() if math.isfinite(number := float(value))}
        for name, logger in list(self._loggers.items()) if finite else ():
            self._guarded(name, lambda logger=logger: logger.log(step, finite))

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            del self._loggers[name]
            self._said(name, error)

    def _said(self, name: str, error: Exception) -> None:
        self._say(
            "logging", f"{name} is left out from here on ({first_line(error)}); the run's own log goes on"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    return isinstance(value, int | float) or getattr(value, "shape", None) == ()
