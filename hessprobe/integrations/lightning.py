"""The instruments inside Lightning's Trainer: a callback that hands the recorder the batches each step was made on."""

from __future__ import annotations

from operator import index
from pathlib import Path
from typing import Any, Unpack

from hessprobe.any_loop.recorder import Recorder
from hessprobe.errors import UserError
from hessprobe.integrations.hosting import LOGGER, CallbackArguments, Hosted

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as missing:
    if (missing.name or "").split(".")[0] != "lightning":
        raise  # it is there, and misses something of its own
    raise UserError(
        "hessprobe.integrations.lightning needs the library 'lightning', which is not installed here: "
        "pip install 'hessprobe[lightning]'"
    ) from missing

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class ProbeCallback(Callback):
    """Records probes while Lightning trains: `Trainer(..., callbacks=[ProbeCallback("runs/mine", every=50)])`.

    Training ends in the same weights, bit for bit, as without, and nothing that goes wrong in measuring ends it: it is
    logged (logger "hessprobe"), and training goes on. A second `fit` goes on in the same folder where the trainer's steps
    go on, and in a folder beside it (runs/mine-2) where they start again.

    A step is a batch on which an optimizer moved, the first one 0, so accumulated micro-batches are one step, measured on
    all of them, and so are several optimizers' moves. The number of steps travels with Lightning's checkpoints, so a
    resumed fit goes on in the same folder. Under a strategy of several processes (ddp) they measure together, each its
    share of all batches of the step; the first alone writes.

    Args:
        folder: of the run, from the working directory of now.
        probes, every, partition, sequences, seed: as of `hessprobe.Recorder`.
        objective: module -> hessprobe.Objective. The default takes the LightningModule as a model of (inputs, targets)
            or of mappings with "labels", whose `forward` returns the outputs, with cross-entropy on them. For a module
            with another forward or loss: `lambda module: hp.Objective(module.net, loss="squared_error")`.
        forward, targets, loss, ignore_index, batch_first, auxiliary: the same in single arguments, as of
            `hessprobe.Recorder`; without an objective.

    Attributes:
        recorder: the training's `hessprobe.Recorder`, None where nothing is recorded.

    Raises:
        UserError: an unknown probe, option, partition or schedule; an objective and arguments beside it. What only
            training shows is logged instead: sharded parameters, and what else `hessprobe.Recorder` raises.
    """

    def __init__(
        self,
        folder: Path | str,
        probes: Any = ("cross_layer",),
        *,
        seed: int = 0,
        **asked: Unpack[CallbackArguments],
    ) -> None:
        self._hosted = Hosted(folder, probes, **asked)
        self.folder, self._given = self._hosted.folder, folder
        self.seed = seed
        self.step = 0
        self._micro_batches: list[Any] = []
        self._moves = 0
        self._loaded = False

    @property
    def recorder(self) -> Recorder | None:
        """The training's recorder, None where nothing is recorded."""
        return self._hosted.recorder

    @property
    def state_key(self) -> str:
        """Where Lightning's checkpoints keep this callback's count of steps: one place a folder."""
        return f"hessprobe.ProbeCallback[{self._given}]"

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps made, for a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave; of anything else steps count from 0, which is said."""
        try:
            step = index(state_dict["step"])
        except Exception:  # whatever a checkpoint holds, training must go on
            LOGGER.warning("ProbeCallback: the checkpoint's own state does not say its step; counting from 0")
            step = 0
        self.step, self._loaded = max(step, 0), True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the log, or goes on with it where training is resumed."""
        with self._hosted.going_on():
            moves, self._micro_batches = trainer.global_step, []
            if moves < self._moves and not self._loaded:
                self.step = 0  # another trainer, whose steps start again
            self._moves, self._loaded = moves, False
            strategy = type(trainer.strategy).__name__
            if strategy in SHARDED:
                raise UserError(
                    f"ProbeCallback cannot read parameters that {strategy} has sharded: train with "
                    "DistributedDataParallel, or measure a checkpoint"
                )
            self._hosted.begin(pl_module, first_step=self.step, optimizer=trainer.optimizers, seed=self.seed)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures what is due where an optimizer moved; until then a due step's micro-batches are gathered."""
        moved = False
        with self._hosted.going_on():
            if self.recorder is not None and self.recorder.due(self.step):
                self._micro_batches.append(batch)
            moved = trainer.global_step != self._moves
            self._moves = trainer.global_step
            if moved and self.recorder is not None:
                self.recorder(self.step, self._micro_batches)
        if moved:
            self._micro_batches = []
            self.step += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the recording."""
        with self._hosted.going_on():
            self._hosted.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the recording of a training that broke off; what was recorded stays."""
        with self._hosted.going_on():
            self._hosted.end()
