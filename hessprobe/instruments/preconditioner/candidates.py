"""Which candidate preconditioners there are, by name: ours, and those that installed packages bring; nothing is imported.

A package brings one by an entry point of the group `hessprobe.candidates`, named as the candidate, with the value
"package.module:function": a function(gradient (p,), snapshot) -> direction (p,), or a `Candidate` of
`measure.candidates.candidate`, which can also depend on the damping and say its inverse.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

from hessprobe.errors import warn

GROUP = "hessprobe.candidates"
_HERE = "hessprobe.instruments.preconditioner.measure.candidates"
# In the order of the table. "update" is the step the run really took.
BUILT_IN = {
    "gradient": f"{_HERE}.gradient:gradient",
    "update": f"{_HERE}.gradient:update",
    "adam": f"{_HERE}.first_order:adam",
    "sophia": f"{_HERE}.first_order:sophia",
    "muon": f"{_HERE}.first_order:muon",
    "shampoo": f"{_HERE}.first_order:shampoo",
    "soap": f"{_HERE}.first_order:soap",
    "kfac": f"{_HERE}.kronecker:kfac",
    "ekfac": f"{_HERE}.kronecker:ekfac",
    "diagonal_gn": f"{_HERE}.gauss_newton:diagonal_gn",
    "layerwise_gn": f"{_HERE}.gauss_newton:layerwise_gn",
    "full_gn": f"{_HERE}.gauss_newton:full_gn",
}


def known_candidates() -> dict[str, str]:
    """Returns {name: "package.module:function"}, ours first; what a package brings amiss is warned of and left out."""
    found = dict(BUILT_IN)
    for entry in entry_points(group=GROUP):
        if amiss := _amiss(entry, found):
            brought = f" of {entry.dist.name}" if entry.dist is not None else ""
            warn(f"candidate {entry.name!r}{brought} is left out: {amiss}")
        else:
            found[entry.name] = entry.value
    return found


def _amiss(entry: EntryPoint, found: dict[str, str]) -> str:
    """Returns why an entry point gives no candidate; "" where it does."""
    if entry.name in found:
        return "" if found[entry.name] == entry.value else f"{found[entry.name]} has that name"
    module, _, function = entry.value.partition(":")
    if not function or ":" in entry.name:
        return f"wanted 'package.module:function', got {entry.value!r}"
    package = module.partition(".")[0]
    # The package itself is looked for and not imported: torch would come with it.
    return "" if find_spec(package) else f"there is no package {package!r}"
