"""Several runs on one page: the same sections with a colour for each run, and differences only where errors allow."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from hessprobe.pictures.section import PageSection
from hessprobe.reading.labelled import labels
from hessprobe.reading.load_run import load_run
from hessprobe.reading.wording import counted
from hessprobe.report.asking import Asked, ask
from hessprobe.report.costs import several_costs
from hessprobe.report.differences import differences
from hessprobe.report.page import PAGE, render_page, write_page
from hessprobe.report.provenance import flat, said_setting, said_time
from hessprobe.report.sections import sections_on_instruments
from hessprobe.report.summary import findings_json, summary_markdown
from hessprobe.store.attributes import decoded


def write_runs_report(runs: Sequence[Path], destination: Path | None = None) -> Path:
    """Writes several runs' report as one HTML page and returns its path; findings.json and summary.md beside it.

    Args:
        runs: their folders.
        destination: the file to write; default `report.html` beside the first run's folder.

    Raises:
        UserError: as `write_report`, for the first run it holds of.
    """
    asked = ask([load_run(run) for run in runs], labels(runs))
    path = Path(runs[0]).resolve().parent / PAGE if destination is None else Path(destination)
    found, name = differences(asked), " · ".join(asked.labels)
    at = "each at its last measured step" if asked.step is None else f"compared at step {asked.step:,}"
    text = render_page(
        name=name,
        findings=found,
        sections=[
            *sections_on_instruments(asked),
            several_costs(asked.labels, asked.trees),
            _provenance(asked),
        ],
        subtitle=[
            counted(len(asked.trees), "run"),
            at,
            f"page written {said_time(datetime.now(UTC).isoformat())}",
        ],
    )
    write_page(path, text)
    stem = "" if path.name == PAGE else f"{path.stem}."
    write_page(path.with_name(f"{stem}findings.json"), findings_json(name, found, {}))
    write_page(path.with_name(f"{stem}summary.md"), summary_markdown(name, found, {}))
    return path


def _provenance(asked: Asked) -> PageSection:
    """Returns what differs between the runs' recipes, data, devices and versions; what is the same is not repeated."""
    facts: list[dict[str, str]] = []
    for run in asked.trees:
        attributes = run.attrs
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
        "runs": list(asked.labels),
        "differing": differing,
        "same": len(keys) - len(differing),
    }
    return PageSection(
        name="provenance", title="Provenance", template="several_provenance.html.j2", content=content
    )
