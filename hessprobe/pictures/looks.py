"""One palette for page and paper, and looks: a colour, a dash and a marker by their names.

The page's style sheet holds these colours under the same names, and others for a dark screen. Paper takes those below.
"""

from __future__ import annotations

from dataclasses import dataclass

from hessprobe.errors import unknown_name

# Series are Okabe and Ito's colours, which colour-blind readers tell apart; their yellow is lost on white.
PALETTE = {
    "accent": "#0b6a88",
    "second": "#8a8f94",
    "ink": "#1d2125",
    "muted": "#5d656d",
    "faint": "#b9bec3",
    "negative": "#b35806",
    "series-1": "#0072b2",
    "series-2": "#d55e00",
    "series-3": "#009e73",
    "series-4": "#cc79a7",
    "series-5": "#b8860b",
    "series-6": "#56b4e9",
    "series-7": "#5d656d",
}
SERIES = tuple(name for name in PALETTE if name.startswith("series-"))
# By plotly's names, with matplotlib's.
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKERS = {"circle": "o", "square": "s", "diamond": "D", "x": "x"}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a line or a set of points looks.

    Attributes:
        color: a name of PALETTE.
        dash: a name of DASHES.
        paper_dash: the dash on paper, where it is another: what is printed grey is told apart by it.
        marker: a name of MARKERS.
        hollow: markers as outlines.
        thin: a thinner line with smaller markers, for what stands beside the main thing.
    """

    color: str = "accent"
    dash: str = "solid"
    paper_dash: str = ""
    marker: str = "circle"
    hollow: bool = False
    thin: bool = False

    def __post_init__(self) -> None:
        dashes = ("color", self.color, PALETTE), ("dash", self.dash, DASHES), ("marker", self.marker, MARKERS)
        for kind, given, valid in dashes:
            if given not in valid:
                raise unknown_name(kind, given, valid)


def on_page(color: str) -> str:
    """Returns a colour as the page's style sheet names it, so that a chart follows the light or dark scheme."""
    return f"var(--{color})"


def by_position(number: int) -> Look:
    """Returns the look of the number-th of several runs or candidates: a colour, and beyond seven a dash too."""
    dashes = tuple(DASHES)
    return Look(color=SERIES[number % len(SERIES)], dash=dashes[min(number // len(SERIES), len(dashes) - 1)])
