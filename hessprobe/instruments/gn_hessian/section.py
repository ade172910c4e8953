"""The page's section on Gauss-Newton against Hessian: how far apart, in which spectrum, and what that costs a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION
from hessprobe.instruments.gn_hessian.norms import GAUSS_NEWTON, HESSIAN
from hessprobe.instruments.gn_hessian.pictures import MODEL_LOOKS, direction_look
from hessprobe.instruments.gn_hessian.step_findings import ALONG_LADDER
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.symmetry import asymmetry

TITLE = "Gauss-Newton against Hessian"
NO_ROWS = xr.Dataset(coords={"step": np.empty(0, int)})


def content(runs: Sequence[Labelled[GNHessianAnswers]]) -> dict[str, Any]:
    """Returns what the section's template needs of one run; of several, what their last rows rest on.

    Empty where no row holds a number.
    """
    if len(runs) != 1:
        steps = [(run, run.answers.table["step"].values) for run in runs]
        said = [
            f"{run.label}: {run.answers.basis(int(at[-1])) or 'basis not recorded'}"
            for run, at in steps
            if at.size
        ]
        return {"said": said} if any(run.answers.steps for run in runs) else {}
    answers = runs[0].answers
    if not answers.steps:
        return {}
    attributes, last = answers.table.attrs, answers.steps[-1]
    return {
        "step": last,
        "measured": len(answers.steps),
        "basis": answers.basis(last),
        "samples": attributes.get("samples"),
        "block_samples": attributes.get("block_samples"),
        "lanczos": attributes.get("lanczos_steps"),
        "probes": answers.table.sizes.get("probe"),
        "symmetry_gap": answers.symmetry_gap,
        "asymmetry": asymmetry(answers.table),
        "width": None if answers.density is None else answers.density[1].attrs["width"],
        "mass": _mass(answers),
        "place": _place(answers),
        "directions": _directions(answers),
        "ladder": _ladder(answers),
        "solve": _solve(answers),
        "density_blocks": list(answers.block_densities),
    }


def _directions(answers: GNHessianAnswers) -> list[dict[str, Any]]:
    """Returns the last row's directions: length, both curvatures and their ratio."""
    if answers.directions.sizes["step"] == 0:
        return []
    row = answers.directions.isel(step=-1)
    return [
        {
            "name": direction_look(str(name))[0],
            "norm": float(row["direction_norm"].sel(direction=name)),
            "of_g": float(row["direction_curvature"].sel(direction=name, matrix=GAUSS_NEWTON)),
            "of_h": float(row["direction_curvature"].sel(direction=name, matrix=HESSIAN)),
            "ratio": float(row["ratio"].sel(direction=name)),
        }
        for name in row["direction"].values
    ]


def _ladder(answers: GNHessianAnswers) -> list[dict[str, Any]]:
    """Returns the two errors of the last rows, at the direction's own length."""
    found = []
    for name, along in answers.at_full_length.items():
        row = along.isel(step=-1)
        numbers = {key: float(row[key]) for key in (BEYOND, LINEARISATION, "share")}
        numbers |= {f"{key}_stderr": float(row[f"{key}_stderr"]) for key in numbers}
        numbers |= {f"of_{model}": float(row["change"].sel(model=model)) for model in MODEL_LOOKS}
        words = {"key": name, "name": ALONG_LADDER[name], "dominant": str(row["dominant"].values)}
        found.append({**numbers, **words, "step": int(row["step"]), "alpha": float(row["alpha"])})
    return found


def _solve(answers: GNHessianAnswers) -> dict[str, float] | None:
    """Returns how well the last row's Gauss-Newton step was solved for."""
    if answers.solve.sizes["step"] == 0:
        return None
    row = answers.solve.isel(step=-1)
    return {
        "residual": float(row["gauss_newton_step_residual"]),
        "iterations": float(row["gauss_newton_step_iterations"]),
        "damping": answers.step_damping,
    }


def _place(answers: GNHessianAnswers) -> dict[str, Any] | None:
    """Returns the block that holds most of the residual's diagonal blocks at the last row, as a share with its error."""
    rows = answers.residual_by_block
    if rows.sizes["step"] == 0 or rows.sizes["block"] < 2 or not np.isfinite(rows["share"].values[-1]).any():
        return None
    row = rows.isel(step=-1)
    top = row.isel(block=int(np.nanargmax(row["share"].values)))
    return {
        "block": str(top["block"].values),
        "share": float(top["share"]),
        "stderr": float(top["share_stderr"]),
    }


def _mass(answers: GNHessianAnswers) -> dict[str, float] | None:
    """Returns the share of H's eigenvalues below zero at the last row, with the bounds of quadrature."""
    if answers.negative.sizes["step"] == 0:
        return None
    row = answers.negative.isel(step=-1)
    found = {name: float(row[name]) for name in ("mass", "mass_stderr", "mass_low", "mass_high")}
    return found if np.isfinite(found["mass"]) else None
