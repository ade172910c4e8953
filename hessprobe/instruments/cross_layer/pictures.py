"""Pictures of coupling between layers, of one run or of several: where it lies, how far it reaches, what a step sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers, coupling_difference
from hessprobe.instruments.cross_layer.grouping.pictures import grouping_pictures
from hessprobe.instruments.cross_layer.table import DIRECTIONS
from hessprobe.pictures.looks import Look
from hessprobe.pictures.over_runs import Series, lines_of_runs
from hessprobe.pictures.picture import Axis, Heatmap, Line, Lines, Picture
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.rows import sound_rows

Run = Labelled[CrossLayerAnswers]

DIRECTION_WORDS = dict(zip(DIRECTIONS, ("the update", "−gradient"), strict=True))
LOOKS = {
    "update": Look(),
    "negative_gradient": Look(color="second", dash="dot", paper_dash="dash"),
}
COUPLING = Axis(words="coupling", number=".3g", from_zero=True)
NO_NUMBER = "no row of the table 'cross_layer' holds {}; nothing to draw"
NO_DEPTH = "these blocks have no depth (embedding, block.N, head); no distance to draw against"


def pictures(runs: Sequence[Run], step: int | None = None) -> list[Picture]:
    """Returns every picture of the instrument, in reading order.

    Args:
        runs: one or several.
        step: the measured step whose coupling is drawn; default the last.

    Raises:
        UserError: a step that was not measured.
    """
    return [
        *coupling_pictures(runs, step),
        *([shares_picture(runs[0])] if len(runs) == 1 else []),
        distance_picture(runs),
        energy_picture(runs),
        cross_share_picture(runs),
        *grouping_pictures(runs),
        jacobi_radius_picture(runs),
    ]


def coupling_pictures(runs: Sequence[Run], step: int | None = None) -> list[Heatmap]:
    """Returns the coupling of every pair of layers: of one run, or of each of several with the difference of two."""
    found = [(run, run.compared.coupling) for run in runs]
    rows = {run.label: _row(coupling, step) for run, coupling in found if coupling.sizes["step"]}
    # One scale for all steps of one run, or for the rows drawn of several.
    shown = (coupling if len(runs) == 1 else rows[run.label] for run, coupling in found if run.label in rows)
    end = max((_largest(_off_diagonal(each["coupling"])) for each in shown), default=0.0) or None
    drawn = [
        _matrix(f"coupling-{i}" if len(runs) > 1 else "coupling", row, "coupling", "coupling_stderr", end=end)
        for i, row in enumerate(rows.values())
    ]
    if len(runs) == 1:
        return drawn or [Heatmap(name="coupling", missing=NO_NUMBER.format("a number"))]
    apart = coupling_difference(*(run.compared for run in runs)) if len(runs) == 2 else None
    if apart is not None:
        drawn.append(_matrix("coupling-difference", apart, "difference", "stderr", signed=True))
    return drawn


def shares_picture(run: Run) -> Heatmap:
    """Returns each pair's share of a step's curvature: at the last step and along the first direction that has one."""
    shares = run.compared.shares
    known = [] if shares is None else [name for name in DIRECTIONS if name in shares["direction"].values]
    for direction in known:
        along = shares.sel(direction=direction)  # pyright: ignore
        steps = np.flatnonzero(np.isfinite(along.values).any((1, 2)))
        if steps.size:
            row, names = along.isel(step=steps[-1]), _names(along)
            return Heatmap(
                name="shares", where="page", rows=names, columns=names, values=row.values, square=True, signed=True,
                value=Axis(words="share of d·Gd", percent=True, number=".3p"),
                end=_typical_end(np.abs(shares.values)),  # pyright: ignore
                hover="{row} × {column}<br>{value} of d·Gd", data=row,
            )  # fmt: skip
    return Heatmap(name="shares", where="page", missing=NO_NUMBER.format("a step_curvature"))


def distance_picture(runs: Sequence[Run]) -> Lines:
    """Returns coupling against layer distance at the last row: means with errors, of one run every pair too."""

    def ask(run: Run) -> Series | None:
        rows = run.compared.by_distance
        if rows.sizes["step"] == 0:
            return None
        row = rows.isel(step=-1)
        return row["distance"].values, row["coupling"].values, row["coupling_stderr"].values

    alone = len(runs) == 1
    means = lines_of_runs(runs, ask, "mean, with its error")
    rows = runs[0].compared.by_distance
    return Lines(
        name="coupling_by_distance",
        at=_step(rows.isel(step=-1)) if alone and rows.sizes["step"] else "",
        lines=[*(_pairs(runs[0].compared) if alone else []), *means],
        x=Axis(words="layers apart", whole=True),
        y=COUPLING,
        hover="{x} apart<br>coupling {y}",
        legend=True,
        missing=NO_DEPTH if any(run.compared.coupling.sizes["step"] for run in runs) else NO_NUMBER.format("a number"),
        data=rows.isel(step=-1) if alone and means else None,
    )  # fmt: skip


def _pairs(answers: CrossLayerAnswers) -> list[Line]:
    """Returns every pair of the last row as a dot at its layers' distance, the most strongly coupled first."""
    pairs = answers.strongest_pairs
    if pairs is None:
        return []
    depth = dict(zip(answers.coupling["block"].values, answers.depths, strict=True))
    first, second = (pairs[side].values for side in ("block", "other_block"))
    apart = np.array([abs(depth[one] - depth[other]) for one, other in zip(first, second, strict=True)])
    known = np.flatnonzero(np.isfinite(apart))
    errors = pairs["coupling_stderr"].values
    notes = [
        (f"± {errors[i]:.2g}" if np.isfinite(errors[i]) else "") + f"\n{first[i]} × {second[i]}"
        for i in known
    ]
    dots = Line(
        label="pairs", x=apart[known], y=pairs["coupling"].values[known], dots=True, notes=notes,
        look=Look(color="second", thin=True), hover="coupling {y} {note}",
    )  # fmt: skip
    return [dots]


def energy_picture(runs: Sequence[Run]) -> Lines:
    """Returns the share of |G|_F^2 between layers over training with its errors."""

    def ask(run: Run) -> Series | None:
        rows = run.answers.off_block_energy
        return rows["step"].values, rows["off_block_energy"].values, rows["off_block_energy_stderr"].values

    words = "off-block energy"
    return Lines(
        name="off_block_energy", lines=lines_of_runs(runs, ask, words), y=Axis(words=words),
        legend=len(runs) > 1, missing=NO_NUMBER.format("an off_block_energy"), data=runs[0].answers.off_block_energy,
    )  # fmt: skip


def cross_share_picture(runs: Sequence[Run]) -> Lines:
    """Returns the share of d.Gd between layers over training: of one run along each direction, of several the update."""

    def along(direction: str, run: Run) -> Series | None:
        shares = run.answers.cross_share
        if shares is None or direction not in shares["direction"].values:
            return None
        return shares["step"].values, shares.sel(direction=direction).values, None

    alone = len(runs) == 1
    lines = [
        line
        for direction in (DIRECTIONS if alone else ("update",))
        for line in lines_of_runs(
            runs,
            lambda run, direction=direction: along(direction, run),
            f"along {DIRECTION_WORDS[direction]}",
            LOOKS[direction],
        )
    ]
    return Lines(
        name="cross_share", lines=lines,
        y=Axis(words="cross share" if alone else "cross share along the update", percent=True),
        legend=None if alone else True, missing=NO_NUMBER.format("a step_curvature"), data=runs[0].answers.cross_share,
    )  # fmt: skip


def jacobi_radius_picture(runs: Sequence[Run]) -> Lines:
    """Returns the largest stable layerwise step, 2 / jacobi_radius: of one run both estimates and the steps taken."""

    def ask(run: Run) -> Series | None:
        radius = run.answers.jacobi_radius
        return radius["step"].values, 2 / radius["high"].values, None

    alone = len(runs) == 1
    lines = _stable_and_chosen(runs[0]) if alone else lines_of_runs(runs, ask, "")
    words = "step size" if alone else "largest stable layerwise step"
    return Lines(
        name="jacobi_radius", lines=lines, y=Axis(words=words, from_zero=True), legend=True,
        missing=NO_NUMBER.format("a jacobi_radius"), data=runs[0].answers.jacobi_radius,
    )  # fmt: skip


def _stable_and_chosen(run: Run) -> list[Line]:
    radius = run.answers.jacobi_radius
    if radius.sizes["step"] == 0:
        return []
    steps, low, high = radius["step"].values, radius["low"].values, radius["high"].values
    notes = [
        f"layerwise steps up to {2 / most:.3g} to {2 / least:.3g} are stable\n"
        f"jacobi_radius {least:.3g} to {most:.3g}"
        for least, most in zip(low, high, strict=True)
    ]
    name = "2 / jacobi_radius, its two estimates"
    lines = [
        Line(label=name, x=steps, y=2 / end, group=name, notes=notes, hover="step {x}: {note}", fill=fill,
             look=Look(thin=True))
        for end, fill in ((high, False), (low, True))
    ]  # fmt: skip
    if run.run is not None and "train" in run.run.children:
        chosen = sound_rows(run.run["train"].to_dataset(), "step_size")
        if chosen.sizes["step"]:
            sizes = chosen["step_size"].values.astype(float)
            look = Look(color="second", marker="circle")
            lines.append(
                Line(
                    label="chosen by the line search", x=chosen["step"].values, y=sizes, dots=True, look=look
                )
            )
    return lines


def _matrix(
    name: str, row: xr.Dataset, variable: str, stderr: str, *, end: float | None = None, signed: bool = False
) -> Heatmap:
    """Returns one number of every pair of blocks, the diagonal blank."""
    values, names = _off_diagonal(row[variable]), _names(row)
    return Heatmap(
        name=name, at=_step(row) if "step" in row.coords else "", rows=names, columns=names, values=values,
        stderr=row[stderr].values, value=Axis(words=variable, number=".3g"), end=end, signed=signed, square=True,
        hover=f"{{row}} × {{column}}<br>{variable} {{value}}",
        data=row.assign({variable: (row[variable].dims, values)}),
    )  # fmt: skip


def _row(rows: xr.Dataset, step: int | None) -> xr.Dataset:
    measured = rows["step"].values
    if step is None:
        return rows.isel(step=-1)
    if step not in measured:
        raise UserError(f"step {step} was not measured; measured: {', '.join(str(s) for s in measured[:20])}")
    return rows.sel(step=step)


def _off_diagonal(values: xr.DataArray) -> np.ndarray:
    return np.where(np.eye(values.shape[-1], dtype=bool), np.nan, values.values)


def _names(rows: xr.Dataset | xr.DataArray) -> list[str]:
    return [str(name) for name in rows["block"].values]


def _step(row: xr.Dataset) -> str:
    return f"step {int(row['step']):,}"


def _largest(values: np.ndarray) -> float:
    """Returns the largest finite value; 0 where there is none above."""
    return float(values[np.isfinite(values)].max(initial=0.0))


def _typical_end(values: np.ndarray) -> float:
    """Returns the median over steps of the largest value.

    Where terms nearly cancel, one step's shares can be a hundred times another's; on a scale that reached
    them the other steps would look blank.
    """
    largest = np.where(np.isfinite(values), values, 0.0).max(axis=(-2, -1))
    return float(np.median(largest[largest > 0])) if (largest > 0).any() else 1.0
