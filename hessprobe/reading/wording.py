"""How a number with its error and its basis is written: 0.634 ± 0.021 (16 sequences, 1,024 tokens)."""

from __future__ import annotations

import math

import xarray as xr


def plus_minus(value: float, stderr: float | None, unit: str = "") -> str:
    """Returns `value ± stderr unit`, the error to two significant digits and the value to the same place.

    Without an error (None, NaN) the value stands alone with four significant digits.
    """
    tail = f" {unit}" if unit else ""
    if not math.isfinite(value):
        return "not measured"
    if stderr is None or not math.isfinite(stderr):
        return f"{_minus(f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}')}{tail}"
    if stderr <= 0:
        return f"{_minus(f'{value:.4g}')} ± 0{tail}"
    places = 1 - math.floor(math.log10(stderr))
    if places > 6:
        power = math.floor(math.log10(max(abs(value), stderr)))
        if power < -3 and places + power <= 6:  # too many zeros to count: (−5.0 ± 2.0)e-6
            return f"({plus_minus(value / 10**power, stderr / 10**power)})e{power}{tail}"
        return f"{_minus(f'{value:.4g}')} ± {stderr:.1g}{tail}"
    places = max(0, places)
    return f"{_minus(f'{value:.{places}f}')} ± {stderr:.{places}f}{tail}"


def percent(value: float, stderr: float | None = None) -> str:
    """Returns a share in percent, with its error where there is one: `42.1 ± 1.3 %`; exact ones to 0.1 %."""
    if stderr is None or not math.isfinite(stderr):
        return f"{_minus(f'{100 * value:.1f}')} %" if math.isfinite(value) else "not measured"
    return plus_minus(100 * value, 100 * stderr, "%")


def basis(row: xr.Dataset, *, exact: bool = False) -> str:
    """Returns what one row rests on: `16 sequences, 1,024 tokens, 1 round of sketches, damping 0.001`.

    A number that is exact on its batch rests on no random probes; `exact` leaves them out.
    """
    said: list[str] = []
    for name in ("sequences", "tokens"):
        count = float(row[name]) if name in row else math.nan
        if math.isfinite(count):
            said.append(f"{int(count):,} {name if count != 1 else name[:-1]}")
    rounds = math.nan if exact or "rounds" not in row else float(row["rounds"])
    if math.isfinite(rounds):
        said.append(counted(int(rounds), "round") + " of sketches")
    samples = None if exact else row.attrs.get("samples")
    if samples:
        said.append(f"{samples} probes a block")
    damping = float(row["damping"]) if "damping" in row else math.nan
    if math.isfinite(damping) and damping > 0:
        said.append(f"damping {damping:.3g}")
    return ", ".join(said)


def counted(number: int, noun: str) -> str:
    """Returns `1 row`, `2 rows`, `1,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _minus(number: str) -> str:
    # A hyphen in front of a digit reads as a dash in running text.
    return number.replace("-", "−", 1) if number.startswith("-") else number
