"""A run's state on disk, whole at every instant: written beside the last one, synced, then moved onto it."""

from __future__ import annotations

import errno
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hessprobe.errors import UserError
from hessprobe.training.train_table import Totals

FILE = "state.pt"


def save_checkpoint(
    folder: Path, *, step: int, parameters: torch.Tensor, optimizer: dict[str, Any], totals: Totals
) -> None:
    """Writes folder/checkpoint/state.pt after outer step `step - 1`; data and probes need no state but the step.

    Raises:
        UserError: no space left on disk; the checkpoint before stays.
    """
    target = folder / "checkpoint" / FILE
    beside = target.with_suffix(".partial")
    state = {"step": step, "parameters": parameters, "optimizer": optimizer, "totals": asdict(totals)}
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


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Returns step, parameters, optimizer state and totals of a run, or None where it saved none yet."""
    path = folder / "checkpoint" / FILE
    if not path.is_file():
        return None
    state = torch.load(path, map_location=device, weights_only=True)
    state["totals"] = Totals(**state["totals"])
    return state
