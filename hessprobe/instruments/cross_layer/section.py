"""The page's section on cross-layer importance: which layers couple, how far, and what a step sees of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, ranked_gains
from hessprobe.instruments.cross_layer.pictures import DIRECTION_WORDS, Run
from hessprobe.pictures.room import evenly_spaced
from hessprobe.reading.symmetry import asymmetry
from hessprobe.reading.wording import basis

# Numbers the slider can show, all steps together: 4 bytes each, a third more as base64: about 6 MB of page.
NUMBERS_KEPT = 1_200_000
TITLE = "Cross-layer importance"


def content(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what the template needs: `section.html.j2` of one run, with its `frames`, or `several.html.j2`.

    `nothing` says why there is no more than that.
    """
    if not any(run.compared.coupling.sizes["step"] for run in runs):
        return {"nothing": "No row of the table 'cross_layer' holds a number yet."}
    return {"nothing": ""} | (_of_one(runs[0].answers) if len(runs) == 1 else _of_several(runs))


def _of_one(answers: CrossLayerAnswers) -> dict[str, Any]:
    rows, frames = answers.measured, _frames(answers)
    return {
        "frames": frames,
        "directions": {
            key: words for key, words in DIRECTION_WORDS.items() if f"share.{key}" in frames["stacks"]
        },
        "blocks": rows.sizes["block"],
        "measured": rows.sizes["step"],
        "kept": len(frames["steps"]),
        "basis": basis(rows.isel(step=-1)),
        "symmetry_gap": _largest(rows, "symmetry_gap"),
        "asymmetry": asymmetry(rows),
        "grouping": _grouping(answers.groupings),
        "jacobi_damping": float(answers.table.attrs.get("jacobi_damping", np.nan)),
    }


def _of_several(runs: Sequence[Run]) -> dict[str, Any]:
    measured = [run for run in runs if run.compared.coupling.sizes["step"]]
    studies = {run.label: run.compared.groupings for run in measured}
    return {
        "missing": [
            f"{run.label}: no measured row holds a number yet." for run in runs if run not in measured
        ],
        "matrices": [run.label for run in measured],
        "pair": [run.label for run in runs],
        "no_groupings": [f"{label}: {study.reason}" for label, study in studies.items() if study.reason],
        "damping": max((study.damping for study in studies.values() if not study.reason), default=None),
    }


def _grouping(study: GroupingStudy) -> dict[str, Any]:
    """Returns what the template says of groupings: the reason there are none, or what they rest on."""
    if study.reason:
        return {"reason": study.reason}
    content: dict[str, Any] = {
        "reason": "",
        "step": int(study.last["step"]),
        "basis": study.basis,
        "damping": study.damping,
        "wanted": study.wanted,
        "left_out": study.left_out,
        "rows": study.over_training.sizes["step"],
        "measured": study.measured,
    }
    if study.has("merge_gain"):
        gains = ranked_gains(study)
        resolved, above = gains["resolved"].values, gains["gain"].values > 0
        content |= {
            "pairs": gains.sizes["pair"],
            "adding": int((resolved & above).sum()),
            "costing": int((resolved & ~above).sum()),
        }
    return content


def _frames(answers: CrossLayerAnswers) -> dict[str, Any]:
    """Returns what the slider shows: the matrices of every kept step as packed float32, means by distance."""
    rows, means, shares = answers.coupling, answers.by_distance, answers.shares
    stacks: dict[str, np.ndarray] = {str(name): part.values for name, part in rows.items()}
    if shares is not None:
        shares = shares.reindex(step=rows["step"])
        stacks |= {
            f"share.{direction}": shares.sel(direction=direction).values
            for direction in DIRECTION_WORDS
            if direction in shares["direction"].values
        }
    blocks = [str(block) for block in rows["block"].values]
    most = max(1, NUMBERS_KEPT // (len(stacks) * len(blocks) ** 2))
    kept = evenly_spaced(rows.sizes["step"], most)
    return {
        "steps": rows["step"].values[kept].tolist(),
        "blocks": blocks,
        "depths": [int(depth) if np.isfinite(depth) else None for depth in answers.depths],
        "stacks": {name: _packed(stack[kept]) for name, stack in stacks.items()},
        "distances": means["distance"].values.tolist(),
        "means": {name: _packed(means[name].values[kept]) for name in ("coupling", "coupling_stderr")},
    }


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def _largest(rows: xr.Dataset, variable: str) -> float | None:
    known = variable in rows and bool(np.isfinite(rows[variable].values).any())
    return float(np.nanmax(rows[variable].values)) if known else None
