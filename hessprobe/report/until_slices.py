"""Instruments that are still read by functions of tables: what the report asks of them until they answer as objects.

An entry goes when its instrument has answers, findings(answers), pictures(runs), content(runs) and show(answers, console).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer import figures as cross_figures
from hessprobe.instruments.cross_layer.findings import cross_layer_findings, cross_layer_trends
from hessprobe.instruments.cross_layer.grouping import figures as grouping_figures
from hessprobe.instruments.cross_layer.grouping.findings import grouping_findings
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, study_groupings
from hessprobe.instruments.cross_layer.section import cross_layer
from hessprobe.instruments.cross_layer.several import cross_layer_charts, last_coupling
from hessprobe.instruments.cross_layer.terminal import show_cross_layer
from hessprobe.instruments.gn_hessian.figures import discrepancy_drawings
from hessprobe.instruments.gn_hessian.findings import discrepancy_findings, discrepancy_trends
from hessprobe.instruments.gn_hessian.section import gn_hessian
from hessprobe.instruments.gn_hessian.several import several_gn_hessian
from hessprobe.instruments.gn_hessian.terminal import show_gn_hessian
from hessprobe.instruments.instrument import Instrument, loaded
from hessprobe.instruments.preconditioner.figures import preconditioner_drawings
from hessprobe.instruments.preconditioner.findings import preconditioner_findings
from hessprobe.instruments.preconditioner.section import preconditioner
from hessprobe.instruments.preconditioner.several import several_preconditioner
from hessprobe.instruments.preconditioner.terminal import show_preconditioner
from hessprobe.pictures.section import Section, table_or_reason
from hessprobe.reading.finding import Finding
from hessprobe.reading.labelled import Labelled
from hessprobe.report.beside import Beside

Drawings = Mapping[str, Callable[[], Any]]
NO_TABLE = "this run holds no table 'cross_layer'; --probe cross_layer records it"


@dataclass(frozen=True, kw_only=True)
class Old:
    """How one instrument is read.

    Attributes:
        answers: (table, run) -> what the others take as answers.
        findings: (answers) -> findings.
        section: (run, answers or None) -> the section of one run.
        several: (runs) -> the section of several.
        drawings: (run, answers or None, step) -> figures by name.
        show: (answers, console) -> prints the table.
        agree: (labelled runs) -> the same at one setting.
    """

    findings: Callable[[Any], list[Finding]]
    section: Callable[[xr.DataTree, Any], Section]
    several: Callable[[Sequence[Beside]], Section]
    drawings: Callable[[xr.DataTree, Any, int | None], Drawings]
    show: Callable[[Any, Any], None]
    answers: Callable[[xr.Dataset], Any] = lambda table: table
    agree: Callable[[Sequence[Labelled]], Sequence[Labelled]] = lambda runs: runs


class CrossLayerTable:
    """A table `cross_layer` with its groupings, which take seconds."""

    def __init__(self, table: xr.Dataset, damping: float | None = None) -> None:
        self.table, self.damping = table, damping

    @cached_property
    def groupings(self) -> GroupingStudy:
        """What `study_groupings` says of it."""
        return study_groupings(self.table, self.damping)


def _cross_layer_findings(answers: CrossLayerTable) -> list[Finding]:
    table = answers.table
    return [
        *cross_layer_findings(table),
        *grouping_findings(answers.groupings),
        *cross_layer_trends(table),
    ]


def _cross_layer_drawings(run: xr.DataTree, answers: CrossLayerTable | None, step: int | None) -> Drawings:
    study = GroupingStudy(reason=NO_TABLE) if answers is None else answers.groupings
    return {
        "coupling": partial(cross_figures.coupling_heatmap, run, step),
        "coupling_by_distance": partial(cross_figures.coupling_by_distance, run, step),
        "off_block_energy": partial(cross_figures.off_block_energy_over_training, run),
        "cross_share": partial(cross_figures.cross_share_over_training, run),
        "jacobi_radius": partial(grouping_figures.overshoot_over_training, run),
        "merge_gains": partial(grouping_figures.merge_gains, study),
        "grouping_curve": partial(grouping_figures.grouping_curve, study),
        "importance": partial(grouping_figures.importance_over_training, study),
    }


def _at_one_damping(runs: Sequence[Labelled]) -> Sequence[Labelled]:
    studies = [run.compared.groupings for run in runs]
    damping = max((study.damping for study in studies if not study.reason), default=np.nan)
    return [
        run
        if study.reason or study.damping == damping
        else replace(run, compared=CrossLayerTable(run.compared.table, damping))
        for run, study in zip(runs, studies, strict=True)
    ]


def _several_cross_layer(beside: Sequence[Beside]) -> Section:
    missing = [
        f"{run.label}: {reason}" for run in beside if (reason := table_or_reason(run.tree, "cross_layer")[1])
    ]
    charts = cross_layer_charts(beside)
    section = partial(
        Section, name="cross_layer", title="Cross-layer importance", template="several_cross_layer.html.j2"
    )
    if not charts:
        return section(missing=" ".join(missing) or "No measured row holds a number yet.")
    content = {
        "missing": missing,
        "matrices": [run.label for run in beside if last_coupling(run) is not None],
        "pair": [run.label for run in beside],
        "no_groupings": [f"{run.label}: {run.groupings.reason}" for run in beside if run.groupings.reason],
        "damping": max((run.groupings.damping for run in beside if not run.groupings.reason), default=None),
    }
    return section(content=content, charts=charts)


OLD: dict[str, Old] = {
    "cross_layer": Old(
        answers=CrossLayerTable,
        findings=_cross_layer_findings,
        section=lambda run, answers: cross_layer(run, None if answers is None else answers.groupings),
        several=_several_cross_layer,
        drawings=_cross_layer_drawings,
        show=lambda answers, console: show_cross_layer(answers.table, console),
        agree=_at_one_damping,
    ),
    "gn_hessian": Old(
        findings=lambda table: [*discrepancy_findings(table), *discrepancy_trends(table)],
        section=lambda run, answers: gn_hessian(run),
        several=several_gn_hessian,
        drawings=lambda run, answers, step: {} if answers is None else discrepancy_drawings(run),
        show=show_gn_hessian,
    ),
    "preconditioner": Old(
        findings=preconditioner_findings,
        section=lambda run, answers: preconditioner(run),
        several=several_preconditioner,
        drawings=lambda run, answers, step: {} if answers is None else preconditioner_drawings(run),
        show=show_preconditioner,
    ),
}


def answers_of(instrument: Instrument, table: xr.Dataset) -> Any:
    """Returns what an instrument answers of a table; the table's name rides as an attribute, for readers of any table."""
    old = OLD.get(instrument.name)
    ask = old.answers if old else loaded(instrument.answers)
    return ask(table.assign_attrs(table=instrument.name))


def at_one_setting(instrument: Instrument, runs: Sequence[Labelled]) -> Sequence[Labelled]:
    """Returns several runs' answers at the setting that serves them all."""
    if len(runs) == 1:
        return runs
    old = OLD.get(instrument.name)
    agree = old.agree if old else loaded(instrument.agree) if instrument.agree else None
    return agree(runs) if agree else runs


def beside(labels: Sequence[str], trees: Sequence[xr.DataTree], cross: Sequence[Labelled]) -> list[Beside]:
    """Returns runs as the functions of several runs take them, with what they answer on cross-layer coupling."""
    none = GroupingStudy(reason="there is no table 'cross_layer'; --probe cross_layer records it")
    found = []
    for i, (label, tree) in enumerate(zip(labels, trees, strict=True)):
        answers = cross[i].compared if cross and "cross_layer" in tree.children else None
        table, study = (None, none) if answers is None else (answers.table, answers.groupings)
        found.append(Beside(label=label, tree=tree, table=table, groupings=study))
    return found
