"""The instruments inside Lightning's Trainer: a callback that hands the recorder the batches each step was made on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hessprobe.errors import UserError
from hessprobe.training.any_loop.recorder import Recorder

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

    Training ends in the same weights, bit for bit, as without. A step is a batch on which an optimizer moved, the first
    one 0, so accumulated micro-batches are one step, measured on all of them, and so are several optimizers' moves. The
    number of steps travels with Lightning's checkpoints, so a resumed fit goes on in the same folder. Under a strategy of
    several processes (ddp) they measure together, each its share of all batches of the step; the first alone writes.

    Args:
        folder: of the run.
        probes, every, partition, sequences, seed: as of `hessprobe.Recorder`.
        objective: module -> hessprobe.Objective. The default takes the LightningModule as a model of (inputs, targets)
            or of mappings with "labels", whose `forward` returns the outputs, with cross-entropy on them. For a module
            with another forward or loss: `lambda module: hp.Objective(module.net, loss="squared_error")`.

    Raises:
        UserError: when training starts: sharded parameters, and what `hessprobe.Recorder` raises.
    """

    def __init__(
        self,
        folder: Path | str,
        probes: Any = ("cross_layer",),
        *,
        every: Any = None,
        partition: Any = "layer",
        sequences: int | None = None,
        seed: int = 0,
        objective: Callable[[Any], Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.settings = {"probes": probes, "every": every, "partition": partition, "sequences": sequences}
        self.seed = seed
        self.objective = objective
        self.recorder: Recorder | None = None
        self.step = 0
        self._micro_batches: list[Any] = []
        self._moves = 0

    @property
    def state_key(self) -> str:
        """Where Lightning's checkpoints keep this callback's count of steps: one place a folder."""
        return f"hessprobe.ProbeCallback[{self.folder}]"

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps made, for a checkpoint."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        self.step = state_dict["step"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Opens the log, or goes on with it where training is resumed."""
        self._moves, self._micro_batches = trainer.global_step, []
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDED:
            raise UserError(
                f"ProbeCallback cannot read parameters that {strategy} has sharded: train with DistributedDataParallel, "
                "or measure a checkpoint"
            )
        self._close()
        self.recorder = Recorder(
            self.folder,
            pl_module if self.objective is None else self.objective(pl_module),
            optimizer=trainer.optimizers,
            first_step=self.step,
            resume=self.step > 0,
            seed=self.seed,
            **self.settings,
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures what is due where an optimizer moved; until then a due step's micro-batches are gathered."""
        if self.recorder is not None and self.recorder.due(self.step):
            self._micro_batches.append(batch)
        if trainer.global_step == self._moves:
            return
        self._moves = trainer.global_step
        if self.recorder is not None:
            self.recorder(self.step, self._micro_batches)
        self._micro_batches = []
        self.step += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends the recording."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the recording of a training that broke off; what was recorded stays."""
        self._close()

    def _close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = None
