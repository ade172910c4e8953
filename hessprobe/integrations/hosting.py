"""What the callbacks share: mistakes are told at construction; once training has begun nothing of ours ends it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

from hessprobe.any_loop.chosen_probes import check_choice
from hessprobe.any_loop.objective_arguments import check_agreement
from hessprobe.any_loop.recorder import Recorder
from hessprobe.any_loop.words import for_recorder
from hessprobe.errors import UserError
from hessprobe.measuring.failures import reason_of

LOGGER = logging.getLogger("hessprobe")
_DEFAULTS = {"every": None, "partition": "layer", "sequences": None}


class CallbackArguments(TypedDict, total=False):
    """What every callback takes as `hessprobe.Recorder` does, but for an objective, which is made of the model."""

    every: Any
    partition: Any
    sequences: int | None
    objective: Callable[[Any], Any] | None
    forward: Callable[..., Any] | None
    targets: Callable[..., Any] | None
    loss: Any
    ignore_index: int | None
    batch_first: bool | None
    auxiliary: Any


class Hosted:
    """A recorder inside somebody's trainer.

    Args:
        folder: of the run, from the working directory of now.
        probes, every, partition, sequences: as of `Recorder`; checked as far as they can be without a model.
        objective: model -> hp.Objective, or None for `arguments` on the model itself.
        arguments: forward, targets, loss, ignore_index, batch_first, auxiliary, as of `Recorder`.

    Raises:
        UserError: an unknown probe, option, partition or schedule; an objective and arguments beside it.
        TypeError: an argument of another name.
    """

    def __init__(self, folder: Path | str, probes: Any, **asked: Unpack[CallbackArguments]) -> None:
        if unknown := [name for name in asked if name not in CallbackArguments.__annotations__]:
            raise TypeError(
                f"ProbeCallback has no argument {unknown[0]!r}; it takes {', '.join(CallbackArguments.__annotations__)}"
            )
        self.folder = Path(folder).absolute()
        self.objective = asked.pop("objective", None)
        own = {name: asked.pop(name, default) for name, default in _DEFAULTS.items()}
        self.settings: dict[str, Any] = {"probes": probes, **own}
        self.arguments = {name: value for name, value in asked.items() if value is not None}
        self.recorder: Recorder | None = None
        self._said: set[str] = set()
        try:
            check_choice(**self.settings)
        except UserError as error:
            raise UserError(for_recorder(str(error))) from error
        if self.objective is not None:
            check_agreement(self.objective, self.arguments)

    def begin(self, model: Any, *, first_step: int, **options: Any) -> Recorder:
        """Opens the log for a training that begins at a step, or goes on with it: in the folder, or beside it.

        It goes on in the last log where steps go on, or none was recorded in it. Where steps start again, in a retry or
        another training, a log of its own begins beside the first.
        """
        nothing_yet = self.recorder is not None and not self.recorder.rows
        self.end()
        self.recorder = None
        given, arguments = model, self.arguments
        if self.objective is not None:
            given, arguments = self.objective(model), {}
        self.recorder = Recorder(
            self.folder,
            given,
            first_step=first_step,
            resume=first_step > 0 or nothing_yet,
            beside=True,
            **self.settings,
            **arguments,
            **options,
        )
        return self.recorder

    def end(self) -> None:
        """Ends the recording; what was recorded stays, and `recorder` can still be asked."""
        if self.recorder is not None:
            self.recorder.close()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Around all that a trainer calls: what goes wrong is logged, and ends the recording, not the training."""
        try:
            yield
        except Exception as error:  # whatever it is
            self.stop(for_recorder(reason_of(error)))

    def stop(self, reason: str) -> None:
        """Ends the recording, and says why, once."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.close()
        if reason not in self._said:
            self._said.add(reason)
            LOGGER.error("%s. Nothing is recorded from here on; training goes on", reason)
