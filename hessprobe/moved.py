"""Old names of modules, kept for a release: importing one says where its names are now.

Scripts written before tables had folders of their own go on; `hessprobe.analysis` itself is as it was.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CROSS = "hessprobe.instruments.cross_layer"
# Old module -> where its names are now, or {name: what makes it} where functions of tables gave way to answers.
MOVED: dict[str, str | dict[str, str]] = {
    "hessprobe.analysis.comparison": "hessprobe.comparison.compared",
    "hessprobe.analysis.comparison_findings": "hessprobe.comparison.findings",
    "hessprobe.analysis.coupling": f"{_CROSS}.coupling",
    "hessprobe.analysis.grouping": f"{_CROSS}.grouping.groupings",
    "hessprobe.analysis.grouping_study": f"{_CROSS}.grouping.study",
    "hessprobe.analysis.grouping_table": f"{_CROSS}.grouping.table",
    "hessprobe.analysis.sketches": f"{_CROSS}.grouping.sketches",
    "hessprobe.analysis.sketch_space": f"{_CROSS}.grouping.sketch_space",
    "hessprobe.analysis.discrepancy": "hessprobe.instruments.gn_hessian.norms",
    "hessprobe.analysis.preconditioner": "hessprobe.instruments.preconditioner.efficiency",
    "hessprobe.analysis.preconditioner_ratio": "hessprobe.instruments.preconditioner.decrease_ratios",
    "hessprobe.analysis.reading": "hessprobe.reading.load_run",
    "hessprobe.analysis.training": "hessprobe.instruments.train.answers",
    "hessprobe.analysis.trend": "hessprobe.reading.trend",
    "hessprobe.analysis.discrepancy_findings": {
        "discrepancy_findings": "findings of gn_hessian",
        "discrepancy_trends": "nothing",  # the trends stand among the findings
    },
    "hessprobe.analysis.preconditioner_findings": {"preconditioner_findings": "findings of preconditioner"},
    "hessprobe.report.discrepancy_figures": {"discrepancy_drawings": "drawings of gn_hessian"},
    "hessprobe.report.preconditioner_figures": {"preconditioner_drawings": "drawings of preconditioner"},
    "hessprobe.report.comparison_figures": "hessprobe.comparison.pictures",
}


class _Moved(MetaPathFinder, Loader):
    """Asked last of all, so that it answers for names alone that no file has."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        home = MOVED[module.__name__]
        where = home if isinstance(home, str) else "hessprobe.instruments"
        warnings.warn(f"{module.__name__} has moved to {where}", DeprecationWarning, stacklevel=2)
        if isinstance(home, str):
            there = import_module(home)
            vars(module).update({name: value for name, value in vars(there).items() if name[:2] != "__"})
        else:
            vars(module).update({name: _made(kind) for name, kind in home.items()})


def _made(kind: str) -> Callable[[Any], Any]:
    if kind == "nothing":
        return lambda table: []
    what, _, name = kind.partition(" of ")
    return partial(_findings if what == "findings" else _drawings, name)


def _findings(name: str, table: Any) -> list[Any]:
    from hessprobe.instruments.instrument import loaded
    from hessprobe.instruments.registry import instrument_named

    instrument = instrument_named(name)
    return loaded(instrument.findings)(loaded(instrument.answers)(table))


def _drawings(name: str, run: Any) -> dict[str, Callable[[], Any]]:
    from hessprobe.instruments.registry import instrument_named
    from hessprobe.report.asking import ask
    from hessprobe.report.figure_set import drawings_of
    from hessprobe.store.reader import require_table

    require_table(run, name)
    return drawings_of(instrument_named(name), ask([run]).runs[name][0])


def keep_old_names() -> None:
    """Lets the old modules be imported; a second call changes nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
