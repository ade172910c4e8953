"""The page of a validation: one file that opens offline, light and dark, with every figure and its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hessprobe.report.rendering import environment_of, source
from hessprobe.validation.figures import Figure

if TYPE_CHECKING:
    from hessprobe.validation.runner import Validation

# What stands beside each other as bars: ratios to something a reader knows.
BARS = ("gradients", "times bare", "times float32", "gradients' memory")


def render_validation(found: Validation) -> str:
    """Returns the page as HTML text."""
    template = environment_of("hessprobe.validation").get_template("validate.html.j2")
    lengths = {name: bars(found.of_stage(name)) for name in found.titles}
    return template.render(found=found, bars=lengths, style=source("style.css"))


def bars(figures: Sequence[Figure]) -> dict[str, float]:
    """Returns, by a ratio's name, how long its bar is in per cent of the longest of the same unit in this stage."""
    found: dict[str, float] = {}
    for unit in BARS:
        own = {f.name: f.value for f in figures if f.unit == unit and f.value is not None and f.value > 0}
        longest = max(own.values(), default=1.0)
        found |= {name: round(100 * value / longest, 1) for name, value in own.items()}
    return found
