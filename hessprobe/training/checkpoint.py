"""A run's state on disk, whole at every instant: written beside the last one, synced, then moved onto it."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.problem.partition import Partition
from hessprobe.training.train_row import Totals

FILE = "state.pt"
# What reading a file raises that is no checkpoint, or not a whole one.
DAMAGED = (
    pickle.UnpicklingError, RuntimeError, KeyError, EOFError, TypeError, AttributeError, ValueError, OSError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataPosition:
    """How far a run has read.

    Attributes:
        seed: of the run: at another one the streams are others, and are read from their beginning.
        first: the minibatch that each stream began with: behind those read by the run this one started from.
        read: sequences of each stream that have been read, counted from the stream's own beginning.
        bookmarks: where that is in a stream from the Hub.
    """

    seed: int = 0
    first: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    bookmarks: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run began from that is not its own: weights of another run, and where they came from."""

    parameters: torch.Tensor
    data: DataPosition
    origin: dict[str, Any]


def checkpoint_file(folder: Path) -> Path:
    """Returns where a run's state lies."""
    return folder / "checkpoint" / FILE


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    parameters: torch.Tensor,
    optimizer: dict[str, Any],
    totals: Totals,
    shapes: Mapping[str, torch.Size] | None = None,
    data: DataPosition | None = None,
    held_out_loss: float = float("nan"),
    ended: bool = False,
) -> None:
    """Writes folder/checkpoint/state.pt after outer step `step - 1`; probes need no state but the step.

    Args:
        shapes: the parameters' shapes by name, in the order of the vector.
        held_out_loss: the last one evaluated.
        ended: whether the run is over: its last step, or its target loss reached.

    Raises:
        UserError: no space left on disk; the checkpoint before stays.
    """
    target = checkpoint_file(folder)
    beside = target.with_suffix(".partial")
    state = {
        "step": step,
        "parameters": parameters,
        "optimizer": optimizer,
        "totals": asdict(totals),
        "shapes": {name: list(shape) for name, shape in (shapes or {}).items()},
        "data": asdict(data or DataPosition()),
        "held_out_loss": held_out_loss,
        "ended": ended,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
        full = isinstance(error, RuntimeError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full:
            raise
        beside.unlink(missing_ok=True)
        raise UserError(
            f"no space left on disk for {target}: the checkpoint of step {step} was not written; the one before it "
            "and the log are kept. Free some space and go on with --resume"
        ) from error


def load_checkpoint(
    folder: Path, device: torch.device, processes: Processes = ALONE
) -> dict[str, Any] | None:
    """Returns what `save_checkpoint` was given, totals and data as their types; None where none was saved yet.

    Of several processes the first reads the file, and hands it out.
    """
    path = checkpoint_file(folder)
    read = processes.from_first(lambda: path.read_bytes() if path.is_file() else None)
    if read is None:
        return None
    state = torch.load(io.BytesIO(read), map_location=device, weights_only=True)
    state["totals"] = Totals(**state["totals"])
    # The first version saved neither place nor end; what else differs there is told when its log is reopened.
    state["data"] = DataPosition(**state.get("data", {}))
    return {"held_out_loss": float("nan"), "ended": False, **state}


class CheckpointFile:
    """A checkpoint's file, opened once: step, weights and hash are of one state, whatever is moved onto it afterwards.

    Raises:
        DAMAGED: it is no checkpoint of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self._mapped: Any = mmap(file.fileno(), 0, access=ACCESS_READ)
        self.step = int(self._state("meta")["step"])  # of a large file only a few kilobytes are read for it

    def start(self, given: str, partition: Partition, said: str) -> Start:
        """Returns the weights in the order of this partition, and all that is known of where they came from.

        Args:
            given: what names the checkpoint.
            said: begins the sentence where they are not to be had.

        Raises:
            UserError: weights of another model, or not all there.
        """
        try:
            state = self._state("cpu")
            theta, shapes = state["parameters"], {n: torch.Size(s) for n, s in state["shapes"].items()}
        except DAMAGED as error:
            raise _no_checkpoint(said, self.path) from error
        wanted = {slot.name: slot.shape for slot in partition.slots}
        apart = [name for name in (*wanted, *shapes) if wanted.get(name) != shapes.get(name)]
        if apart:
            there, here = (tuple(s[apart[0]]) if apart[0] in s else "absent" for s in (shapes, wanted))
            raise UserError(
                f"{said} holds another model ({len(theta):,} parameters, this one has {partition.size:,}): {apart[0]} is "
                f"{there} there and {here} here; give the sizes of that run in [model]"
            )
        sizes = [shape.numel() for shape in shapes.values()]
        named = {n: t.view(shapes[n]) for n, t in zip(shapes, theta.split(sizes), strict=True)}
        return Start(
            parameters=partition.flatten(named),
            data=DataPosition(**state["data"]),
            origin={
                "path": given,
                "step": state["step"],
                "sha256": hashlib.sha256(self._mapped).hexdigest(),
                # The same for the same weights, whatever else the file says of seconds.
                "parameters_sha256": hashlib.sha256(theta.numpy().tobytes()).hexdigest(),
            },
        )

    def _state(self, device: str) -> dict[str, Any]:
        self._mapped.seek(0)
        return torch.load(self._mapped, map_location=device, weights_only=True)


def load_start(given: str, partition: Partition) -> Start:
    """Returns the weights of another run's last checkpoint, in the order of this partition.

    Args:
        given: a run's folder, or a checkpoint file.

    Raises:
        UserError: nothing there, not a checkpoint, or one of another model.
    """
    path = Path(os.path.expanduser(given))
    file = checkpoint_file(path) if path.is_dir() else path
    if not file.is_file():
        what = (
            "the folder holds no checkpoint/state.pt" if path.is_dir() else "there is no such file or folder"
        )
        raise UserError(
            f"training.start_from = {given!r}: {what}; give a run's folder or its checkpoint file"
        )
    said = f"training.start_from = {given!r}"
    try:
        opened = CheckpointFile(file)
    except DAMAGED as error:
        raise _no_checkpoint(said, file) from error
    return opened.start(given, partition, said)


def _no_checkpoint(said: str, file: Path) -> UserError:
    return UserError(
        f"{said}: {file} is no checkpoint of hessprobe; give a run's folder or its checkpoint/state.pt"
    )
