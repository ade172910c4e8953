"""The page's section on provenance: what was run, on what data, with which versions, from which commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import xarray as xr

from hessprobe.pictures.section import PageSection
from hessprobe.store.attributes import decoded


def provenance(run: xr.DataTree) -> PageSection:
    """Returns the section on provenance, from the run's root attributes; what is absent is said to be."""
    attributes = run.attrs
    data, versions = decoded(attributes.get("data")), decoded(attributes.get("versions"))
    facts = {
        "created": said_time(str(attributes.get("created") or "")),
        "device": attributes.get("device"),
        "seed": attributes.get("seed"),
        "commit": attributes.get("git_commit"),
        "schema version": attributes.get("schema_version"),
    }
    facts |= {f"data: {key.replace('_', ' ')}": said_setting(value) for key, value in flat(data, "")}
    counts = decoded(attributes.get("partition"))
    partition = {name: int(count) for name, count in counts.items() if isinstance(count, int | float)}
    content = {
        "facts": {key: "not recorded" if value in (None, "") else value for key, value in facts.items()},
        "versions": versions,
        "partition": partition,
        "parameters": sum(partition.values()),
        "recipe": {key: said_setting(value) for key, value in flat(decoded(attributes.get("recipe")), "")},
    }
    return PageSection(name="provenance", title="Provenance", template="provenance.html.j2", content=content)


def said_time(moment: str) -> str:
    """Returns an ISO time as `2026-01-05 10:00 UTC`; text that is no time stands as it is."""
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    zone = " UTC" if parsed.utcoffset() == timedelta(0) else f"{parsed: %z}".rstrip()
    return f"{parsed:%Y-%m-%d %H:%M}{zone}"


def said_setting(value: Any) -> str:
    """Returns a setting as a reader would write it; `default` for what the recipe left open."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yields nested settings as the dotted keys that `--set key=value` takes."""
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry
