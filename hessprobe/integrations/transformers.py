"""The instruments inside Hugging Face's Trainer: a callback that draws its own batches from the training set.

A Trainer hands its callbacks no batch, so a row is measured on examples drawn from the training set, by seed and step
alone, through a copy of the Trainer's own collator: training reads and shuffles as if nobody had looked. Of several
processes each collates its share of them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

from hessprobe.any_loop.recorder import Recorder
from hessprobe.errors import UserError
from hessprobe.integrations.hosting import CallbackArguments, Hosted

try:
    from transformers import TrainerCallback, set_seed
except ModuleNotFoundError as missing:
    if (missing.name or "").split(".")[0] != "transformers":
        raise  # it is there, and misses something of its own
    raise UserError(
        "hessprobe.integrations.transformers needs the library 'transformers', which is not installed here: "
        "pip install 'hessprobe[hf]'"
    ) from missing


class ProbeCallback(TrainerCallback):
    """Records probes while a Trainer trains: `Trainer(..., callbacks=[ProbeCallback("runs/mine", every=50)])`.

    Training ends in the same weights, bit for bit, as without, and nothing that goes wrong in measuring ends it: it is
    logged (logger "hessprobe"), and training goes on. Where steps start again, in a second `train()` or a retry with a
    smaller batch, the rows go into a folder beside the first (runs/mine-2).

    Causal and masked language models and classifiers are understood as they come (labels of -100 carry no loss); the loss
    is cross-entropy on the labels, whatever else a Trainer may add to it (label smoothing, a balancing loss). Under
    torchrun every process has the callback, as it has the Trainer: they measure together, and the first alone writes.

    Args:
        folder: of the run, from the working directory of now; a training resumed from a checkpoint goes on in it.
        probes, every, partition, sequences, seed: as of `hessprobe.Recorder`; a step is an optimizer step, the first
            one 0. The seed defaults to the Trainer's.
        objective: model -> hessprobe.Objective, where the default does not fit: another loss, outputs elsewhere.
        forward, targets, loss, ignore_index, batch_first, auxiliary: the same in single arguments, as of
            `hessprobe.Recorder`; without an objective.
        batches: step -> batch or list of micro-batches to measure on, where the training set cannot be drawn from (a
            stream) or something else is wanted. It must not move the data that training reads. Of several processes each
            returns its own part.

    Attributes:
        recorder: the training's `hessprobe.Recorder`, None where nothing is recorded.

    Raises:
        UserError: an unknown probe, option, partition or schedule; an objective and arguments beside it. What only
            training shows is logged instead: sharded parameters (FSDP, DeepSpeed), a training set that is a stream
            without `batches`, and what else `hessprobe.Recorder` raises.
    """

    def __init__(
        self,
        folder: Path | str,
        probes: Any = ("cross_layer",),
        *,
        seed: int | None = None,
        batches: Callable[[int], Any] | None = None,
        **asked: Unpack[CallbackArguments],
    ) -> None:
        self._hosted = Hosted(folder, probes, **asked)
        self.folder = self._hosted.folder
        self.seed = seed
        self.batches = batches

    @property
    def recorder(self) -> Recorder | None:
        """The training's recorder, None where nothing is recorded."""
        return self._hosted.recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the log, or goes on with it where training is resumed."""
        with self._hosted.going_on():
            if args.deepspeed or args.fsdp:
                raise UserError(
                    "ProbeCallback cannot read parameters that DeepSpeed or FSDP have sharded: train with "
                    "DistributedDataParallel, or measure a checkpoint"
                )
            loader, seed = kwargs.get("train_dataloader"), args.seed if self.seed is None else self.seed
            if self.batches is None:
                _check_drawable(loader)  # before there is a folder
            recorder = self._hosted.begin(
                kwargs["model"],
                first_step=state.global_step,
                optimizer=kwargs.get("optimizer"),
                steps=state.max_steps if state.max_steps > 0 else None,
                seed=seed,
            )
            self._draw = self.batches or _TrainingSet(loader, recorder, seed)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures what is due after an optimizer step."""
        with self._hosted.going_on():
            if self.recorder is not None:
                step = state.global_step - 1
                self.recorder(step, lambda: self._draw(step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the recording."""
        with self._hosted.going_on():
            self._hosted.end()


class _TrainingSet:
    """Draws micro-batches from a DataLoader's own set, as large as the loader's, by (seed, step) alone."""

    def __init__(self, loader: Any, recorder: Recorder, seed: int) -> None:
        self.dataset, self.seed = loader.dataset, seed
        # A collator that draws (masks) may hold a generator of its own, which must not move on.
        self.collate = copy.deepcopy(loader.collate_fn)
        self.sequences = max(recorder.sequences, 1)
        self.size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or self.sequences
        self.processes = recorder.processes

    def __call__(self, step: int) -> list[Any]:
        # Called where all global random states are put back afterwards: masks and crops follow from (seed, step) too.
        set_seed((self.seed * 1_000_003 + step + 500_009 * self.processes.rank) % 2**32)
        wanted = min(self.sequences, len(self.dataset))
        drawn = random.Random(f"{self.seed}/{step}").sample(range(len(self.dataset)), wanted)
        own = drawn[self.processes.part(wanted)]
        return [
            self.collate([self.dataset[i] for i in own[start : start + self.size]])
            for start in range(0, len(own), self.size)
        ]


def _check_drawable(loader: Any) -> None:
    """Raises a UserError where examples cannot be taken from the training set without taking them from training."""
    dataset: Any = getattr(loader, "dataset", None)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(
            f"the training set is a stream ({type(dataset).__name__}), and reading from it would take examples away "
            "from training: pass batches=, a function step -> batch to measure on"
        )
