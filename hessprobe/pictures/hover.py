"""What the page says at a point: names that stay text, a number with its error, and a note.

Plotly reads hover texts in a small HTML with numbers in d3's formats.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from hessprobe.pictures.picture import Axis


def shown(name: object) -> str:
    """Returns a name as plotly must be given it: its text goes through a small HTML of its own."""
    return escape(str(name), quote=False).replace("\n", "<br>")


def said(
    hover: str,
    part: str,
    axis: Axis,
    values: np.ndarray,
    stderr: np.ndarray | None,
    notes: Any,
    *,
    exact: bool = False,
) -> tuple[str, Any]:
    """Returns a hover text in plotly's language, with a number, its error and its note, and the data it needs for that.

    Errors go as numbers where every value has one, else as words, for plotly would say "± NaN". With `exact` the number
    goes as words too: what is drawn is not it.
    """
    letter, number, start = (
        {"{value}": "z"}.get(part, part[1]),
        axis.number or (".1%" if axis.percent else ".4g"),
        "",
    )
    if notes is not None and "{note}" not in hover:
        hover, start = hover + "{note}", "<br>"
    spoken = "" if exact else f"%{{{letter}:{number}}}"
    if notes is None and stderr is None and not exact:
        return hover.replace(part, spoken), None
    if notes is None and not exact and stderr is not None and np.isfinite(stderr[np.isfinite(values)]).all():
        return hover.replace(part, f"{spoken} ± %{{customdata:{'.2p' if axis.percent else '.2g'}}}"), stderr
    scale, unit = (100, "%") if axis.percent else (1, "")
    errors = np.full(values.shape, np.nan) if stderr is None else stderr
    words: list[Any] = [
        (f"{value:{number}}" if exact else "")
        + (f" ± {scale * error:.2g}{unit}" if np.isfinite(error) else "")
        for value, error in zip(values.ravel().tolist(), errors.ravel().tolist(), strict=True)
    ]
    if notes is None:
        hover, shape = hover.replace(part, f"{spoken}%{{customdata}}"), values.shape
    else:
        every = [shown(note) for note in np.asarray(notes, dtype=object).ravel()]
        words = [[word, note and start + note] for word, note in zip(words, every, strict=True)]
        hover = hover.replace(part, f"{spoken}%{{customdata[0]}}").replace("{note}", "%{customdata[1]}")
        shape = (*values.shape, 2)
    return hover, np.array(words, dtype=object).reshape(shape).tolist()
