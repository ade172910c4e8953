"""Several runs on one page: the same sections with a colour for each run, and differences only where errors allow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from hessprobe.instruments.cross_layer.several import cross_layer_charts, last_coupling
from hessprobe.instruments.gn_hessian.section import several_gn_hessian
from hessprobe.instruments.preconditioner.several import several_preconditioner
from hessprobe.instruments.train.section import several_training
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.wording import counted
from hessprobe.report.costs_section import several_costs
from hessprobe.report.differences import Beside, differences, runs_beside
from hessprobe.report.page import PAGE, render_page, write_page
from hessprobe.report.provenance import decoded, flat, said_setting, said_time
from hessprobe.report.summary import findings_json, summary_markdown


def write_runs_report(runs: Sequence[Path], destination: Path | None = None) -> Path:
    """Writes several runs' report as one HTML page and returns its path; findings.json and summary.md beside it.

    Args:
        runs: their folders.
        destination: the file to write; default `report.html` beside the first run's folder.

    Raises:
        UserError: as `write_report`, for the first run it holds of.
    """
    beside, common = runs_beside(runs)
    path = Path(runs[0]).resolve().parent / PAGE if destination is None else Path(destination)
    found, name = differences(beside), " · ".join(run.label for run in beside)
    at = "each at its last measured step" if common is None else f"compared at step {common:,}"
    text = render_page(
        name=name,
        findings=found,
        sections=[
            _cross_layer(beside),
            several_gn_hessian(beside),
            several_preconditioner(beside),
            several_training(beside),
            several_costs([(run.label, run.tree) for run in beside]),
            _provenance(beside),
        ],
        subtitle=[
            counted(len(beside), "run"),
            at,
            f"page written {said_time(datetime.now(UTC).isoformat())}",
        ],
    )
    write_page(path, text)
    stem = "" if path.name == PAGE else f"{path.stem}."
    write_page(path.with_name(f"{stem}findings.json"), findings_json(name, found, {}))
    write_page(path.with_name(f"{stem}summary.md"), summary_markdown(name, found, {}))
    return path


def _cross_layer(beside: Sequence[Beside]) -> Section:
    missing = [
        f"{run.label}: {reason}" for run in beside if (reason := table_or_reason(run.tree, "cross_layer")[1])
    ]
    charts = cross_layer_charts(beside)
    content = {
        "missing": missing,
        "matrices": [run.label for run in beside if last_coupling(run) is not None],
        "pair": [run.label for run in beside],
        "no_groupings": [f"{run.label}: {run.groupings.reason}" for run in beside if run.groupings.reason],
        "damping": max((run.groupings.damping for run in beside if not run.groupings.reason), default=None),
    }
    if not charts:
        return Section(
            name="cross_layer", title="Cross-layer importance", template="several_cross_layer.html.j2",
            missing=" ".join(missing) or "No measured row holds a number yet.",
        )  # fmt: skip
    return Section(
        name="cross_layer", title="Cross-layer importance", template="several_cross_layer.html.j2",
        content=content, charts=charts,
    )  # fmt: skip


def _provenance(beside: Sequence[Beside]) -> Section:
    """Returns what differs between the runs' recipes, data, devices and versions; what is the same is not repeated."""
    facts: list[dict[str, str]] = []
    for run in beside:
        attributes = run.tree.attrs
        known = {key: attributes.get(key) for key in ("device", "seed", "git_commit", "schema_version")}
        for part in ("recipe", "data", "versions"):
            known |= {f"{part}: {key}": value for key, value in flat(decoded(attributes.get(part)), "")}
        facts.append({key: said_setting(value) for key, value in known.items()})
    keys = dict.fromkeys(key for each in facts for key in each)
    differing = {
        key: values
        for key in keys
        if len(set(values := [each.get(key, "not recorded") for each in facts])) > 1
    }
    content = {
        "runs": [run.label for run in beside],
        "differing": differing,
        "same": len(keys) - len(differing),
    }
    return Section(
        name="provenance", title="Provenance", template="several_provenance.html.j2", content=content
    )
