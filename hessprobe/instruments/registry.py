"""Which instruments there are: those that come with the package, and those that installed packages add by entry point.

An entry point of the group `hessprobe.instruments` names an `Instrument`. One that cannot be had is said once, and left out.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from hessprobe.errors import first_line, unknown_name, warn
from hessprobe.instruments.instrument import Instrument

GROUP = "hessprobe.instruments"
# In reading order; those of other packages come between these and the table that every run has.
OURS = ("cross_layer", "gn_hessian", "preconditioner")
EVERY_RUN = "train"


@cache
def instruments() -> dict[str, Instrument]:
    """Returns every instrument by name, in reading order."""
    found = {name: _ours(name) for name in OURS}
    last = _ours(EVERY_RUN)
    for point in entry_points(group=GROUP):
        where = f"the instrument {point.value!r} of {point.dist.name if point.dist else 'an unknown package'}"
        try:
            instrument = point.load()
        except Exception as error:  # whatever another package raises, ours go on
            warn(f"{where} is left out: {type(error).__name__}: {first_line(error)}")
            continue
        if not isinstance(instrument, Instrument):
            warn(f"{where} is left out: wanted an Instrument, got {type(instrument).__name__}")
        elif instrument.name in (*found, last.name):
            warn(f"{where} is left out: there is another instrument named {instrument.name!r}")
        else:
            found[instrument.name] = instrument
    return found | {last.name: last}


def probed() -> dict[str, Instrument]:
    """Returns the instruments that a probe measures, by name."""
    return {name: each for name, each in instruments().items() if each.probe}


def instrument_named(name: str) -> Instrument:
    """Returns an instrument that a probe measures.

    Raises:
        UserError: there is none of that name.
    """
    if name not in probed():
        raise unknown_name("probe", name, probed())
    return probed()[name]


def reader_of(name: str) -> Instrument:
    """Returns the instrument of a table in a log; of a table that no instrument here knows, one that reads any."""
    known = instruments().get(name)
    return known or Instrument(name=name, title=name.replace("_", " "), table=_undeclared, compared=())


def is_ours(name: str) -> bool:
    """Tells whether an instrument comes with this package."""
    return name in (*OURS, EVERY_RUN)


def _ours(name: str) -> Instrument:
    return import_module(f"hessprobe.instruments.{name}").INSTRUMENT


def _undeclared(*_: object) -> None:
    raise LookupError("no instrument here declares this table")
