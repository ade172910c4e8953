"""The pictures of Gauss-Newton against Hessian: the gap over training, spectra, and what a step's model leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION
from hessprobe.instruments.gn_hessian.norms import GAUSS_NEWTON, HESSIAN, RESIDUAL
from hessprobe.instruments.gn_hessian.step_findings import ALONG_LADDER
from hessprobe.pictures.looks import Look, by_position
from hessprobe.pictures.over_runs import Series, lines_of_runs, over_runs
from hessprobe.pictures.picture import Axis, Density, Heatmap, Line, Lines, Panels, Picture
from hessprobe.reading.labelled import Labelled

Runs = Sequence[Labelled[GNHessianAnswers]]

MATRIX_LOOKS = {
    GAUSS_NEWTON: ("G", Look(color="series-1")),
    HESSIAN: ("H", Look(color="series-2")),
    RESIDUAL: ("H − G", Look(color="series-7", dash="dot")),
}
ENDS = {"lambda_max": ("largest", "solid"), "lambda_min": ("smallest", "dash")}
MODEL_LOOKS = {
    "loss": ("loss", Look(color="ink")),
    "prox_linear": ("linearised network", Look(color="series-3", dash="dash")),
    GAUSS_NEWTON: ("G's quadratic", Look(color="series-1", dash="dot")),
    HESSIAN: ("H's quadratic", Look(color="series-2", dash="dot")),
}
ERROR_LOOKS = {
    LINEARISATION: ("linearising", Look(color="series-2")),
    BEYOND: ("higher orders", Look(color="series-1", paper_dash="dash")),
}
DIRECTION_LOOKS = {
    "update": ("update", Look(color="series-1")),
    "gauss_newton_step": ("Gauss-Newton step", Look(color="series-2")),
    "negative_gradient": ("−gradient", Look(color="series-3", paper_dash="dash")),
    "top_eigenvector": ("G's top eigenvector", Look(color="series-4", paper_dash="dashdot")),
    "random": ("random", Look(color="series-5", paper_dash="dot")),
}
GAP, CURVATURE = "‖H − G‖ / ‖G‖", "d·Hd / d·Gd"
LENGTH, CHANGE, ERROR = (
    "step length α",
    Axis(words="change", units="nats per token"),
    Axis(words="error", units="nats per token"),
)


def pictures(runs: Runs) -> list[Picture]:
    """Returns all pictures of one run, or those that show several beside each other."""
    shared: list[Picture] = [gn_gap(runs), gn_cosine(runs), gn_density(runs), gn_negative(runs)]
    if len(runs) != 1:
        return [*shared, gn_update(runs), gn_linearisation(runs)]
    answers = runs[0].answers
    return [
        *shared,
        gn_block_gap(answers),
        gn_trace(answers),
        gn_extremes(answers),
        gn_density_training(answers),
        *block_densities(answers),
        gn_directions(answers),
        gn_model_errors(answers),
        *(draw(answers, name) for name in answers.along for draw in (gn_models, gn_errors_training)),
    ]


def gn_gap(runs: Runs) -> Picture:
    """Returns ||H - G|| / ||G|| over training."""
    lines = lines_of_runs(runs, lambda run: _series(run.answers.gap, "gn_gap"), GAP)
    return _over_training("gn_gap", lines, Axis(words=GAP, from_zero=True), runs, _of("gn_gap"))


def gn_cosine(runs: Runs) -> Picture:
    """Returns the cosine of H and G over training."""
    lines = lines_of_runs(runs, lambda run: _series(run.answers.gap, "cosine"), "cosine")
    return _over_training("gn_cosine", lines, Axis(words="cosine of H and G"), runs, _of("cosine"))


def gn_negative(runs: Runs) -> Picture:
    """Returns the negative eigenvalues' share of the sum of H's eigenvalues' sizes over training."""
    lines = lines_of_runs(runs, lambda run: _series(run.answers.negative, "share"), "H's negative share")
    axis = Axis(words="negative share of Σ|λ|", percent=True, from_zero=True)
    return _over_training("gn_negative", lines, axis, runs, _of("ritz_value"), where="page")


def gn_update(runs: Runs) -> Picture:
    """Returns d.Hd / d.Gd along the update over training."""
    lines = lines_of_runs(runs, lambda run: _series(run.answers.update_ratio), "update")
    axis = Axis(words=f"{CURVATURE} along the update")
    return _over_training("gn_update", lines, axis, runs, _of("direction_curvature"))


def gn_linearisation(runs: Runs) -> Picture:
    """Returns the linearisation's share of the two errors along the update, at its full length, over training."""

    def ask(run: Labelled[GNHessianAnswers]) -> Series | None:
        rows = run.answers.at_full_length.get("update")
        return None if rows is None else _series(rows.isel(step=np.isfinite(rows["share"].values)), "share")

    axis = Axis(words="linearising, of both errors", percent=True)
    lines = lines_of_runs(runs, ask, "linearising")
    return _over_training("gn_linearisation", lines, axis, runs, _of("linearisation"))


def gn_density(runs: Runs) -> Picture:
    """Returns the last row's densities: of one run those of G, H and R, of several each one's of H."""
    missing = _of("ritz_value")
    if len(runs) != 1:
        found = over_runs(runs, lambda run: run.answers.density)
        lines = [_density(run.label, look, rows.sel(matrix=HESSIAN)) for run, look, (_, rows) in found]
        return Density(name="gn_density", lines=lines, missing=missing)
    if runs[0].answers.density is None:
        return Density(name="gn_density", missing=missing)
    step, rows = runs[0].answers.density
    return Density(name="gn_density", lines=_of_matrices(rows), at=f"step {step:,}", data=rows)


def gn_density_training(answers: GNHessianAnswers) -> Picture:
    """Returns densities of H at several steps; nothing where one alone was measured."""
    rows = {step: found.sel(matrix=HESSIAN) for step, found in answers.densities.items()}
    lines = [_density(f"step {step:,}", by_position(i), each) for i, (step, each) in enumerate(rows.items())]
    return Density(name="gn_density_training", lines=lines if len(lines) > 1 else [], where="page")


def block_densities(answers: GNHessianAnswers) -> list[Picture]:
    """Returns the densities of G, H and R of each diagonal block that they were measured of."""
    return [
        Density(
            name=f"gn_density-{i}", lines=[] if rows is None else _of_matrices(rows), where="page", data=rows
        )
        for i, rows in enumerate(answers.block_densities.values())
    ]


def gn_block_gap(answers: GNHessianAnswers) -> Picture:
    """Returns ||(H - G)_bb|| / ||G_bb|| by block and step."""
    rows = answers.block_gap
    return Heatmap(
        name="gn_block_gap",
        rows=[str(name) for name in rows["block"].values],
        columns=rows["step"].values,
        values=rows["gn_gap"].values.T,
        stderr=rows["gn_gap_stderr"].values.T,
        value=Axis(words=f"{GAP} of the block", number=".3g"),
        end=scale_end(rows["gn_gap"]),
        x=Axis(words="step"),
        hover="{row} at step {column}<br>{value} of ‖G<sub>bb</sub>‖",
        missing=_of("block_gn_gap"),
        data=rows,
    )


def scale_end(gaps: xr.DataArray) -> float:
    """Returns the median over steps of the largest gap: one step's can be ten times another's, and hide the others."""
    largest = gaps.where(np.isfinite(gaps)).max("block")
    return float(largest.where(largest > 0).median()) if bool((largest > 0).any()) else 1.0


def gn_trace(answers: GNHessianAnswers) -> Picture:
    """Returns the traces of G, H and R over training."""
    rows = answers.traces
    lines = [_line(rows.sel(matrix=name), "trace", *look) for name, look in MATRIX_LOOKS.items()]
    axis = Axis(words="trace", units="nats")
    return Lines(name="gn_trace", lines=lines, y=axis, legend=True, where="page", data=rows)


def gn_extremes(answers: GNHessianAnswers) -> Picture:
    """Returns the extreme Ritz values of G and H over training with their residuals."""
    rows = answers.extremes
    lines = [
        _line(
            rows.sel(matrix=matrix), end, f"{label}, {words}", Look(color=look.color, dash=dash), "residual"
        )
        for end, (words, dash) in ENDS.items()
        for matrix, (label, look) in MATRIX_LOOKS.items()
        if matrix != RESIDUAL
    ]
    axis = Axis(words="eigenvalue", units="nats")
    return Lines(name="gn_extremes", lines=lines, y=axis, legend=True, missing=_of("lambda_max"), data=rows)


def gn_directions(answers: GNHessianAnswers) -> Picture:
    """Returns d.Hd / d.Gd along every direction over training."""
    ratio = answers.directions["ratio"]
    lines = [
        _line(ratio.sel(direction=name).to_dataset(name="ratio"), "ratio", *direction_look(str(name)))
        for name in ratio["direction"].values
    ]
    return Lines(
        name="gn_directions",
        lines=lines,
        y=Axis(words=CURVATURE, at=1.0),
        legend=True,
        missing=_of("direction_curvature"),
        data=ratio,
    )


def direction_look(name: str) -> tuple[str, Look]:
    """Returns a direction's name on the page and its look."""
    return DIRECTION_LOOKS.get(name, (name, Look(color="second")))


def gn_models(answers: GNHessianAnswers, direction: str) -> Picture:
    """Returns the loss along one direction at its last row, beside its models, against the step length."""
    row = answers.along[direction].isel(step=-1)
    lines = [
        Line(label=label, x=row["alpha"].values, y=row["change"].sel(model=name).values, look=look)
        for name, (label, look) in MODEL_LOOKS.items()
    ]
    return Lines(
        name=f"gn_models-{direction}", lines=lines, x=_lengths(row), y=CHANGE, hover="α {x}: {y}",
        where="page", data=row,
    )  # fmt: skip


def gn_model_errors(answers: GNHessianAnswers) -> Picture:
    """Returns the two errors of Gauss-Newton's quadratic at the last row against the step length, by direction."""
    rows = {name: along.isel(step=-1) for name, along in answers.along.items()}
    panels = [
        Lines(
            name=f"gn_errors-{name}",
            lines=[
                Line(label=label, x=row["alpha"].values, y=row[key].values, stderr=row[f"{key}_stderr"].values, look=look)
                for key, (label, look) in ERROR_LOOKS.items()
            ],
            x=_lengths(row),
            y=ERROR,
            hover="α {x}: {y}",
            at=f"along {ALONG_LADDER[name]}, step {int(row['step']):,}",
            data=row,
        )
        for name, row in rows.items()
    ]  # fmt: skip
    return Panels(name="gn_model_errors", panels=panels, missing=_of("change"))


def gn_errors_training(answers: GNHessianAnswers, direction: str) -> Picture:
    """Returns the two errors along one direction over training, in units of the change promised."""
    rows = answers.errors_over_training[direction]
    lines = [_line(rows, name, *look) for name, look in ERROR_LOOKS.items()] if rows.sizes["step"] > 1 else []
    axis = Axis(words="error / promised change", percent=True)
    return Lines(name=f"gn_errors_training-{direction}", lines=lines, y=axis, where="page", data=rows)


def _series(rows: Mapping[Any, Any] | xr.DataArray, name: str = "") -> Series | None:
    """Returns places, values and errors of a quantity over training; None where there is none of it."""
    if isinstance(rows, xr.DataArray):
        return rows["step"].values, rows.values, None
    if name not in rows:
        return None
    return rows["step"].values, rows[name].values, rows[f"{name}_stderr"].values


def _line(rows: xr.Dataset, name: str, label: str, look: Look, error: str = "stderr") -> Line:
    stderr = rows.get(f"{name}_{error}")
    return Line(
        label=label,
        x=rows["step"].values,
        y=rows[name].values,
        stderr=None if stderr is None else stderr.values,
        look=look,
    )


def _over_training(
    name: str, lines: Sequence[Line], y: Axis, runs: Runs, missing: str, where: str = "both"
) -> Lines:
    legend = True if len(runs) > 1 else None
    return Lines(name=name, lines=lines, y=y, legend=legend, missing=missing, where=where)


def _of_matrices(rows: xr.Dataset) -> list[Line]:
    return [_density(label, look, rows.sel(matrix=name)) for name, (label, look) in MATRIX_LOOKS.items()]


def _density(label: str, look: Look, rows: xr.Dataset) -> Line:
    return Line(
        label=label,
        x=rows["eigenvalue"].values,
        y=rows["density"].values,
        low=rows["low"].values,
        high=rows["high"].values,
        look=look,
        markers=False,
    )


def _lengths(row: xr.Dataset) -> Axis:
    return Axis(words=LENGTH, scale="log", ticks=row["alpha"].values.tolist())


def _of(variable: str) -> str:
    return f"no row of the table 'gn_hessian' holds a {variable}; nothing to draw"
