"""A trend over training as a finding: by how much a quantity rises or falls, or that no trend is resolved."""

from __future__ import annotations

from hessprobe.reading.finding import Finding
from hessprobe.reading.trend import Trend
from hessprobe.reading.wording import counted, plus_minus


def trend_finding(name: str, quantity: str, line: Trend, each: str, *, share: bool = False) -> Finding:
    """Returns what a line through measured steps says of a quantity.

    Args:
        quantity: in words, such as "the share of ‖G‖² between layers".
        each: the basis of each of the line's rows.
        share: the quantity is a share, said in percentage points; the finding's value stays a fraction.
    """
    scale, unit = (100, "percentage points") if share else (1, "")
    span = f"from step {line.first_step:,} to {line.last_step:,}"
    size = plus_minus(scale * abs(line.change), scale * line.stderr, unit)
    signed = plus_minus(scale * line.change, scale * line.stderr, unit)
    through = f"straight line through {counted(line.rows, 'measured step')}"
    return Finding(
        name=name,
        sentence=f"Over training, {quantity} {'rises' if line.change > 0 else 'falls'} by {size} {span}."
        if line.resolved
        else f"Over training, {quantity} shows no resolved trend {span} ({signed}).",
        value=line.change,
        stderr=line.stderr,
        basis=f"{through}; {each} each" if each else through,
        steps=(line.first_step, line.last_step),
        resolved=line.resolved,
    )
