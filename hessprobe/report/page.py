"""From a stored run to one self-contained page: findings first, then the charts and tables they rest on.

Everything is inlined (style, script, plotly.js once), so the page opens from disk with no network.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.io
import xarray as xr
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from hessprobe.analysis import findings, load_run
from hessprobe.analysis.wording import percent, plus_minus
from hessprobe.report.cross_layer import cross_layer
from hessprobe.report.provenance import provenance, said_time
from hessprobe.report.section import Section
from hessprobe.report.training import costs, training

# In reading order. A later table adds its builder here and a template of the same name.
SECTIONS = (cross_layer, training, costs, provenance)


def write_report(run: Path, destination: Path | None = None) -> Path:
    """Writes a run's report as one HTML page and returns its path; a run in progress gives the page so far.

    Args:
        run: the run's folder (or its log.zarr).
        destination: the file to write; default `report.html` in the run's folder.

    Raises:
        UserError: there is no run there, a newer version wrote it, or it is damaged.
    """
    run = Path(run)
    folder = run.parent if run.name == "log.zarr" else run
    path = folder / "report.html" if destination is None else Path(destination)
    tree = load_run(run)
    text = render(tree, str(tree.attrs.get("name") or folder.resolve().name))
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


def render(run: xr.DataTree, name: str) -> str:
    """Returns the page of an opened run as HTML text."""
    sections = [build(run) for build in SECTIONS]
    environment = Environment(
        loader=PackageLoader("hessprobe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": plus_minus}
    return environment.get_template("page.html.j2").render(
        name=name,
        findings=findings(run),
        sections=sections,
        subtitle=_subtitle(run.attrs, datetime.now(UTC)),
        charts=_script_json(sections),
        frames={section.name: section.frames for section in sections if section.frames},
        source=_source,
        plotly=Markup(get_plotlyjs()),
    )


def _script_json(sections: list[Section]) -> Markup:
    """Returns the charts as JSON that is safe inside a script element: plotly escapes <, > and / in it."""
    charts = {name: figure for section in sections for name, figure in section.charts.items()}
    entries = (
        f"{json.dumps(name)}:{plotly.io.to_json(figure, validate=False)}" for name, figure in charts.items()
    )
    return Markup("{" + ",".join(entries) + "}")


def _source(name: str) -> Markup:
    """Returns a file of this package's templates as it stands (our own style and script, no user's text)."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _subtitle(attributes: Mapping[Any, Any], now: datetime) -> list[str]:
    facts = [str(attributes[key]) for key in ("device",) if attributes.get(key)]
    if created := attributes.get("created"):
        facts.append(f"run begun {said_time(str(created))}")
    return [*facts, f"page written {said_time(now.isoformat())}"]
