"""The page's findings for machines (JSON) and for pull requests (Markdown): the same sentences and numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hessprobe.reading.finding import Finding

# Of the run's root attributes, what a number must not be read without.
PROVENANCE = ("created", "device", "seed", "git_commit", "schema_version", "versions", "data")


def findings_json(name: str, findings: Sequence[Finding], attributes: Mapping[Any, Any]) -> str:
    """Returns findings as JSON: run, provenance, and for each its name, sentence, value, stderr, basis, steps.

    Numbers stand as computed, not as rounded in the sentence; null where there is none.
    """
    document = {
        "run": name,
        "provenance": {key: _decoded(attributes[key]) for key in PROVENANCE if key in attributes},
        "findings": [_plain(asdict(finding)) for finding in findings],
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summary_markdown(name: str, findings: Sequence[Finding], attributes: Mapping[Any, Any]) -> str:
    """Returns findings as Markdown: the headlines as a table, every sentence with its basis, one provenance line.

    Without attributes (several runs have no one provenance) that line is left out.
    """
    lines = [f"# {markdown(name)}: cross-layer importance", ""]
    headlines = [finding for finding in findings if finding.headline]
    if headlines:
        lines += ["| | |", "|---|---|"]
        lines += [f"| {markdown(each.label)} | **{markdown(each.headline)}** |" for each in headlines]
        lines.append("")
    for finding in findings:
        unresolved = "" if finding.resolved else "; not resolved"
        lines.append(f"- {markdown(finding.sentence)} ({markdown(finding.basis)}{unresolved})")
    if not findings:
        lines.append("No measured row yet, so nothing to say.")
    known = [
        f"{key.replace('_', ' ')} {attributes[key]}"
        for key in PROVENANCE[:4]
        if attributes.get(key) is not None
    ]
    if attributes:
        lines += ["", markdown("; ".join(known)) if known else "provenance not recorded"]
    return "\n".join(lines) + "\n"


def markdown(text: str) -> str:
    """Returns text that Markdown shows as it stands: names may hold its marks, or tags, or line breaks."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", " ".join(text.split()))


def _plain(value: Any) -> Any:
    """Returns a value that strict JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    """Returns an attribute that holds JSON as what it says."""
    if not isinstance(value, str):
        return _plain(value)
    try:
        return _plain(json.loads(value)) if value[:1] in "{[" else value
    except ValueError:
        return value
