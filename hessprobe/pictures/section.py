"""A section of the page: a template with its numbers, its charts and what the slider shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go
import xarray as xr

from hessprobe.reading.rows import failed_rows
from hessprobe.store.reader import recorded_probes


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """What one section shows. With `missing` set, only that line is shown."""

    name: str
    title: str
    template: str
    missing: str = ""
    content: Mapping[str, Any] = field(default_factory=dict)
    charts: Mapping[str, go.Figure] = field(default_factory=dict)
    frames: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[int, str] = field(default_factory=dict)


def table_or_reason(run: xr.DataTree, name: str, recorded_with: str = "") -> tuple[xr.Dataset | None, str]:
    """Returns a table, or None and a line saying why there is nothing to show and which command records it."""
    if name not in run.children:
        recorded = recorded_probes(run)
        had = f"; this run was recorded with --probe {' '.join(recorded)}" if recorded else ""
        return (
            None,
            f"This run holds no table {name!r}. {recorded_with or f'hessprobe train --probe {name}'} records it{had}.",
        )
    dataset = run[name].to_dataset()
    failed = failed_rows(dataset)
    if dataset.sizes.get("step", 0) == 0:
        return None, f"The table {name!r} holds no recorded row yet."
    if len(failed) == dataset.sizes["step"]:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in list(failed.items())[:3])
        return None, f"No row of the table {name!r} could be measured ({reasons})."
    return dataset, ""
