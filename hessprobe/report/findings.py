"""What a run shows, in sentences: each with value, error and what it rests on; nothing within its error.

A difference or a share is claimed beyond two standard errors; a trend also needs four measured steps. What
does not reach that is said to be unresolved, which is a result too.
"""

from __future__ import annotations

from typing import Any

import xarray as xr

from hessprobe.instruments.instrument import loaded
from hessprobe.instruments.registry import EVERY_RUN, reader_of
from hessprobe.reading.finding import Finding
from hessprobe.reading.symmetry import symmetry_findings
from hessprobe.report.asking import Asked, ask
from hessprobe.report.costs import cost_findings


def findings(run: xr.DataTree, groupings: Any = None) -> list[Finding]:
    """Returns the findings of a run, most important first; empty where nothing was recorded yet.

    Args:
        run: an opened run.
        groupings: what `study_groupings` said of its `cross_layer` table, where it was asked before: it takes seconds
            where layer kernels of two or more rounds were recorded.
    """
    asked = ask([run])
    if groupings is not None and "cross_layer" in asked.runs:
        vars(asked.runs["cross_layer"][0].compared)["groupings"] = groupings
    return findings_of(asked)


def findings_of(asked: Asked, run: int = 0) -> list[Finding]:
    """Returns the findings of one of the runs that were asked, up to the step at which they are compared."""
    answered = {name: each for name in asked.runs if (each := asked.recorded(name, run)) is not None}
    found = symmetry_findings({name: asked.tables[name][run] for name in answered if name != EVERY_RUN})
    for name, each in answered.items():
        state = loaded(reader_of(name).findings)
        found += state(each.compared)
    return found + cost_findings(asked.trees[run])
