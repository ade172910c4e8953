"""From a stored run to one self-contained page: findings first, then the charts and tables they rest on.

Everything is inlined (style, script, plotly.js once), so the page opens from disk with no network.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.io
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hessprobe.pictures.section import PageSection
from hessprobe.reading.finding import Finding
from hessprobe.reading.load_run import load_run
from hessprobe.reading.wording import percent, plus_minus
from hessprobe.report.asking import Asked, ask
from hessprobe.report.costs import costs
from hessprobe.report.findings import findings_of
from hessprobe.report.provenance import provenance, said_time
from hessprobe.report.rendering import environment_of, source
from hessprobe.report.sections import sections_on_instruments
from hessprobe.report.summary import findings_json, summary_markdown

PAGE = "report.html"


def write_report(run: Path, destination: Path | None = None) -> Path:
    """Writes a run's report as one HTML page and returns its path; a run in progress gives the page so far.

    Beside it `findings.json` and `summary.md`, with the same sentences (`NAME.findings.json` and `NAME.summary.md` for a
    page `NAME.html` of another name).

    Args:
        run: the run's folder (or its log.zarr).
        destination: the file to write; default `report.html` in the run's folder.

    Raises:
        UserError: there is no run there, a newer version wrote it, or it is damaged.
    """
    run = Path(run)
    folder = run.parent if run.name == "log.zarr" else run
    path = folder / PAGE if destination is None else Path(destination)
    tree = load_run(run)
    name = str(tree.attrs.get("name") or folder.resolve().name)
    asked = ask([tree])
    found = findings_of(asked)
    write_page(path, render(asked, name, found))
    beside = "" if path.name == PAGE else f"{path.stem}."
    write_page(path.with_name(f"{beside}findings.json"), findings_json(name, found, tree.attrs))
    write_page(path.with_name(f"{beside}summary.md"), summary_markdown(name, found, tree.attrs))
    return path


def write_page(path: Path, text: str) -> Path:
    """Writes a text, whole or not at all, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reader of the old page, or a kill, must never meet half a page.
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def render(asked: Asked, name: str, found: Sequence[Finding]) -> str:
    """Returns the page of one run that was asked as HTML text, with its findings."""
    run = asked.trees[0]
    return render_page(
        name=name,
        findings=found,
        sections=[*sections_on_instruments(asked), costs(run), provenance(run)],
        subtitle=_subtitle(run.attrs, datetime.now(UTC)),
    )


def render_page(
    *,
    name: str,
    findings: Sequence[Finding],
    sections: Sequence[PageSection],
    subtitle: Sequence[str],
    kind: str = "report",
    reading: str = "reading.html.j2",
) -> str:
    """Returns a page as HTML text: findings, sections in their order, and the template on how to read it."""
    environment = environment_of("hessprobe.report")
    environment.filters |= {"percent": percent, "number": plus_minus}
    return environment.get_template("page.html.j2").render(
        name=name,
        kind=kind,
        reading=reading,
        findings=findings,
        sections=sections,
        subtitle=subtitle,
        charts=_script_json(sections),
        frames={section.name: section.frames for section in sections if section.frames},
        source=source,
        plotly=Markup(get_plotlyjs()),
    )


def _script_json(sections: Sequence[PageSection]) -> Markup:
    """Returns the charts as JSON that is safe inside a script element: plotly escapes <, > and / in it."""
    charts = {name: figure for section in sections for name, figure in section.charts.items()}
    entries = (
        f"{json.dumps(name)}:{plotly.io.to_json(figure, validate=False)}" for name, figure in charts.items()
    )
    return Markup("{" + ",".join(entries) + "}")


def _subtitle(attributes: Mapping[Any, Any], now: datetime) -> list[str]:
    facts = [str(attributes[key]) for key in ("device",) if attributes.get(key)]
    if created := attributes.get("created"):
        facts.append(f"run begun {said_time(str(created))}")
    return [*facts, f"page written {said_time(now.isoformat())}"]
