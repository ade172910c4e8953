"""A comparison of runs as a page: what each method needs to reach a loss, its sweeps, and the reference study's numbers."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hessprobe.comparison.compared import Comparison
from hessprobe.comparison.findings import comparison_findings
from hessprobe.comparison.pictures import pictures
from hessprobe.comparison.tables import (
    COSTS,
    cost_rows,
    critical_rows,
    rate_rows,
    reference_label,
    run_rows,
    step_rows,
    study_name,
    study_rows,
)
from hessprobe.pictures import plotly_pen
from hessprobe.pictures.section import PageSection
from hessprobe.reading.wording import counted
from hessprobe.report.page import render_page, write_page
from hessprobe.report.provenance import said_time


def write_comparison(comparison: Comparison, destination: Path) -> Path:
    """Writes a comparison as one self-contained HTML page and returns its path."""
    runs = comparison.runs.sizes["run"]
    text = render_page(
        name=f"Steps to a held-out loss of {comparison.target:.6g}",
        findings=comparison_findings(comparison),
        sections=[steps_to_loss(comparison)],
        subtitle=[
            counted(runs, "run"),
            f"page written {said_time(datetime.now(UTC).isoformat())}",
        ],
        kind="comparison",
        reading="comparison_reading.html.j2",
    )
    return write_page(Path(destination), text)


def steps_to_loss(comparison: Comparison) -> PageSection:
    """Returns the section on what each method needs to reach the target loss."""
    content = {
        "target": f"{comparison.target:.6g}",
        "target_basis": comparison.target_basis,
        "reference": reference_label(comparison),
        "cautions": comparison.cautions,
        "left_out": comparison.left_out,
        "steps": step_rows(comparison),
        "costs": cost_rows(comparison),
        "cost_names": COSTS,
        "rates": rate_rows(comparison),
        "study": study_rows(comparison),
        "study_name": study_name("steps_to_loss"),
        "critical": critical_rows(),
        "critical_name": study_name("critical_batch"),
        "runs": run_rows(comparison),
    }
    return PageSection(
        name="steps_to_loss",
        title="Steps to a loss",
        template="comparison.html.j2",
        content=content,
        charts=plotly_pen.charts(pictures(comparison)),
    )
