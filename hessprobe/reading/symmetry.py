"""Which rows say of themselves that they are not of a curvature matrix: |u.Av - v.Au| beyond what rounding leaves.

A row measured now fails on it (training.recorder); logs recorded before that rule hold such rows as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr

from hessprobe.reading.finding import Finding
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.wording import counted

# eps ** 0.4 of float32, in which all but a few runs measure: rounding leaves 1e-7 to 1e-4, a wrong derivative 1e-2 and more.
LIMIT = (2.0**-23) ** 0.4


def asymmetric_rows(table: xr.Dataset) -> dict[int, float]:
    """Returns {step: symmetry gap} of the measured rows whose products are not symmetric, in order of step."""
    rows = sound_rows(table, "symmetry_gap")
    if rows.sizes["step"] == 0:
        return {}
    steps, gaps = rows["step"].values, rows["symmetry_gap"].values
    return {int(step): float(gap) for step, gap in zip(steps, gaps, strict=True) if gap > LIMIT}


def asymmetry(table: xr.Dataset) -> str:
    """Returns the sentence on a table's rows that are not symmetric, without its subject; "" where all are."""
    found = asymmetric_rows(table)
    if not found:
        return ""
    steps = list(found)
    at = ", ".join(f"{step:,}" for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
    return (
        f"products in {counted(len(found), 'row')} (step {at}) are not symmetric: a gap of up to {max(found.values()):.1e}, "
        f"where rounding leaves less than {LIMIT:.1e}. They are not those of a curvature matrix, and numbers of these rows "
        "are not to be trusted"
    )


def symmetry_findings(tables: Mapping[str, xr.Dataset]) -> list[Finding]:
    """Returns a finding for every table with rows whose products are not symmetric; they come before all others."""
    return [
        Finding(
            name=f"symmetry_gap.{name}",
            sentence=f"In {name}, {said}.",
            value=max(asymmetric_rows(table).values()),
            stderr=None,
            basis="one random pair of vectors in each row",
            steps=tuple(asymmetric_rows(table)),
        )
        for name, table in tables.items()
        if (said := asymmetry(table))
    ]
