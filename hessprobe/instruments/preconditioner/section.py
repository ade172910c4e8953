"""The page's section on preconditioners: what its template says beside the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.findings import LOOSE
from hessprobe.instruments.preconditioner.table import FULL, LAYERWISE
from hessprobe.pictures.room import COLUMNS_DRAWN
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.symmetry import asymmetry
from hessprobe.reading.trend import STANDARD_ERRORS


def content(runs: Sequence[Labelled[PreconditionerAnswers]]) -> dict[str, Any]:
    """Returns what the template needs: of one run its numbers, of several what each was asked with."""
    sound = [run for run in runs if not run.answers.empty]
    if len(runs) == 1 and sound:
        return _of_one(runs[0].answers)
    said = [
        f"{run.label}: {run.answers.size:,} curvature and {run.answers.held_out:,} held-out sequences, "
        f"damping {run.answers.damping:g}"
        for run in sound
    ]
    return {"said": said}


def _of_one(answers: PreconditionerAnswers) -> dict[str, Any]:
    rows = answers.rows
    return {
        "step": answers.last_step,
        "measured": rows.sizes["step"],
        "columns": min(rows.sizes["step"], COLUMNS_DRAWN),
        "damping": answers.damping,
        "size": answers.size,
        "block_damping": answers.block_damping,
        "held_out": answers.held_out,
        "folds": rows.sizes["fold"],
        "draws": rows.sizes["draw"],
        "tolerance": answers.tolerance,
        "residual": answers.residual,
        "pays": [_verdict(answers, i) for i in range(answers.pays.sizes["damping"])],
        "board": _board(answers),
        "failures": [
            {"candidate": name, "reason": reason, "steps": steps}
            for name, (reason, steps) in answers.failures.items()
        ],
        "asymmetry": asymmetry(answers.table),
    }


def _verdict(answers: PreconditionerAnswers, damping: int) -> dict[str, Any]:
    each = answers.pays.isel(damping=damping)
    known = np.flatnonzero(np.isfinite(each["ratio"].values))
    last = each.isel(curvature_sequences=known[-1] if known.size else -1)
    numbers = ("damping", "crossover", "crossover_low", "crossover_high", "below", "above")
    at_last = ("ratio", "stderr", "own_ratio", "own_stderr")
    return {
        **{name: float(each[name]) for name in numbers},
        **{name: float(last[name]) for name in at_last},
        "unfinished": answers.largest_residual(float(each["damping"]), FULL, LAYERWISE) > LOOSE,
        "verdict": str(each["verdict"].values),
        "told": [int(size) for size in each["curvature_sequences"].values[each["ahead"].values != 0]],
    }


def _board(answers: PreconditionerAnswers) -> list[dict[str, Any]]:
    """Returns the scoreboard's rows for the template: the last measured row beside the layerwise oracle over all."""
    board, at = answers.board, answers.over_layerwise.isel(damping=0, curvature_sequences=-1)
    rows = []
    for i, name in enumerate(board["candidate"].values):
        each = {
            str(key): values.values[i].item() for key, values in board.data_vars.items() if key != "failure"
        }
        ratio, stderr = (float(at[key].sel(candidate=name)) for key in ("ratio", "stderr"))
        apart = abs(ratio - 1) > STANDARD_ERRORS * stderr
        failure = str(board["failure"].values[i])
        rows.append(
            each | {"name": str(name), "failure": failure, "ratio": ratio, "stderr": stderr, "apart": apart}
        )
    return rows
