"""Modules under the names they had before tables had folders: importable for a release, with a word on where they are."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

import hessprobe  # noqa: F401  (it keeps the old names)
from hessprobe.analysis import open_run, require_table
from hessprobe.moved import MOVED

SAMPLE_RUN = Path(__file__).parents[2] / "data" / "sample_run"


@pytest.mark.parametrize("name", MOVED)
def test_an_old_module_is_importable_and_says_where_its_names_are(name: str) -> None:
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} has moved to hessprobe"):
        module = import_module(name)
    assert [each for each in vars(module) if not each.startswith("_")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functions_of_tables_that_gave_way_to_answers_say_and_draw_the_same() -> None:
    run = open_run(SAMPLE_RUN)
    for table, old in (("gn_hessian", "discrepancy"), ("preconditioner", "preconditioner")):
        findings = getattr(import_module(f"hessprobe.analysis.{old}_findings"), f"{old}_findings")
        said = {finding.name for finding in findings(require_table(run, table))}
        assert {"gn_gap", "layerwise_over_full"} & said
        drawings = getattr(import_module(f"hessprobe.report.{old}_figures"), f"{old}_drawings")(run)
        figure, _ = drawings["gn_gap" if table == "gn_hessian" else "layerwise_over_full"]()
        assert figure.axes


def test_a_name_that_never_was_is_still_missing() -> None:
    with pytest.raises(ModuleNotFoundError):
        import_module("hessprobe.analysis.nothing_of_the_kind")
