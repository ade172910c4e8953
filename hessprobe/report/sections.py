"""The page's sections on instruments, each asked through the registry: its pictures drawn, its template filled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from hessprobe.instruments.instrument import Instrument, loaded
from hessprobe.pictures import plotly_pen
from hessprobe.pictures.picture import Picture
from hessprobe.pictures.section import PageSection, table_or_reason
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.rows import failed_rows
from hessprobe.report.asking import Asked, readers


def sections_on_instruments(asked: Asked) -> list[PageSection]:
    """Returns the sections of one run, or of several, in reading order."""
    build = _of_one if len(asked.trees) == 1 else _of_several
    return [build(each, asked) for each in readers(asked.trees)]


def pictures_of(instrument: Instrument, runs: Sequence[Labelled[Any]]) -> list[Picture]:
    """Returns the pictures of an instrument."""
    return loaded(instrument.pictures)(runs)


def _of_one(instrument: Instrument, asked: Asked) -> PageSection:
    section = _section(instrument, instrument.template)
    table, reason = table_or_reason(asked.trees[0], instrument.name, instrument.recorded_with)
    if table is None:
        return section(missing=reason)
    failed = failed_rows(table)
    charts = plotly_pen.charts(pictures_of(instrument, asked.runs[instrument.name]))
    if not charts:
        return section(missing=f"No row of the table {instrument.name!r} holds a number yet.", failed=failed)
    content = loaded(instrument.content)(asked.runs[instrument.name])
    if content.get("nothing"):
        return section(missing=content["nothing"], failed=failed)
    return section(content=content, charts=charts, frames=content.get("frames", {}), failed=failed)


def _of_several(instrument: Instrument, asked: Asked) -> PageSection:
    section = _section(instrument, instrument.several_template)
    missing = [
        f"{label}: {reason}"
        for label, tree in zip(asked.labels, asked.trees, strict=True)
        if (reason := table_or_reason(tree, instrument.name, instrument.recorded_with)[1])
    ]
    runs = asked.runs.get(instrument.name, ())
    charts = plotly_pen.charts(pictures_of(instrument, runs)) if runs else {}
    if not charts:
        return section(missing=" ".join(missing) or "No measured row holds a number yet.")
    content = {"missing": missing, **loaded(instrument.content)(runs)}
    return section(content=content, charts=charts, frames=content.get("frames", {}))


def _section(instrument: Instrument, template: str) -> partial[PageSection]:
    return partial(PageSection, name=instrument.section_id, title=instrument.title, template=template)
