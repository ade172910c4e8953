"""Candidates that installed packages bring are known by name and measured; what is brought amiss is said and left out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.candidates import BUILT_IN, known_candidates
from hessprobe.instruments.preconditioner.measure.probe import PreconditionerProbe
from hessprobe.instruments.preconditioner.recipe import CANDIDATES, PreconditionerRecipe
from hessprobe.instruments.snapshot import Row
from hessprobe.problem.partition import Partition
from hessprobe.store.reader import open_run
from hessprobe.training.loop import train
from tests.instruments.preconditioner.truth import problem, snapshot_of
from tests.training.runs import recipe as training_recipe

CODE = """
from hessprobe.instruments.preconditioner.measure.candidates.candidate import Candidate, Directions
from hessprobe.optimization.place import Direction


def signs(gradient, snapshot):
    return -gradient.sign()


def _damped(asked):
    g = asked.place.gradient
    found = [
        Direction(vector=-g / (1 + mu), inverse=lambda rows, mu=mu: rows / (1 + mu)) for mu in asked.dampings
    ]
    return Directions(directions=found)


damped = Candidate(answer=_damped, damped=True, linear=True)
"""
ENTRIES = {"signs": "brought:signs", "damped": "brought:damped"}


def bring(folder: Path, package: str, entries: dict[str, str], code: str = CODE) -> None:
    """Writes a package as an installation leaves it: its module and its dist-info."""
    folder.mkdir(exist_ok=True)
    (folder / f"{package}.py").write_text(code, encoding="utf-8")
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8"
    )
    lines = ["[hessprobe.candidates]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Path]:
    """Yields a folder of packages that Python looks into."""
    folder = tmp_path / "site"
    bring(folder, "brought", ENTRIES)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "brought", raising=False)
    yield folder
    sys.modules.pop("brought", None)


def measured(*candidates: str) -> Row:
    recipe = PreconditionerRecipe(
        curvature_sequences=(3,), held_out_sequences=3, folds=3, dampings=(0.5, 0.1), candidates=candidates,
        cg_iterations=60, cg_tolerance=1e-9, condition_steps=3,
    )  # fmt: skip
    case = problem("layernorm", 6)
    return PreconditionerProbe(recipe).measure(snapshot_of(case, Partition.of(case.model, "module")))


def test_they_are_known_behind_ours_and_measured_as_ours_are(site):
    assert known_candidates() == BUILT_IN | ENTRIES and tuple(BUILT_IN) == CANDIDATES
    row = measured("gradient", "signs", "damped")
    assert list(row["candidate_failure"]) == ["", "", ""]
    assert np.isfinite(row["efficiency"]).all() and np.isfinite(row["block_efficiency"]).all()
    # A multiple of the gradient at each damping is worth what the gradient is; a sign is not.
    np.testing.assert_allclose(row["efficiency"][:, 2], row["efficiency"][:, 0], rtol=1e-6)
    assert not np.isclose(row["efficiency"][0, 1], row["efficiency"][0, 0]).any()
    assert np.isfinite(row["condition"][[0, 2]]).all() and np.isnan(row["condition"][1]).all()


def test_a_training_run_records_one_by_its_name(site, tmp_path):
    given = training_recipe(
        tmp_path / "run", "training.steps=2", "probes=[\"preconditioner\"]",
        "preconditioner.every=2", "preconditioner.curvature_sequences=[2]", "preconditioner.held_out_sequences=2",
        "preconditioner.folds=2", "preconditioner.cg_iterations=2", "preconditioner.candidates=[\"gradient\",\"signs\"]",
    )  # fmt: skip
    train(given, tmp_path / "run")
    table = open_run(tmp_path / "run")["preconditioner"].to_dataset().load()
    assert list(table["candidate"].values) == ["gradient", "signs"]
    assert np.isfinite(table["efficiency_held_out"].sel(step=0)).all()


AMISS = {
    "a name of ours": ({"kfac": "brought:signs"}, "'kfac' of odd .*kronecker:kfac has that name"),
    "a name of another's": ({"signs": "odd:signs"}, "'signs' of .* has that name"),
    "no function": ({"whole": "odd"}, "wanted 'package.module:function', got 'odd'"),
    "no package": ({"lost": "nowhere.at.all:it"}, "'lost' of odd is left out: there is no package 'nowhere'"),
}


@pytest.mark.parametrize("what", AMISS)
def test_what_is_brought_amiss_is_said_and_left_out(site, what):
    entries, said = AMISS[what]
    bring(site, "odd", entries)
    with pytest.warns(UserWarning, match=said):
        found = known_candidates()
    assert set(found) == {*BUILT_IN, *ENTRIES} and {name: found[name] for name in BUILT_IN} == BUILT_IN


@pytest.mark.filterwarnings("ignore:candidate 'lost'")
def test_a_recipe_that_names_one_that_is_not_there_is_refused(site):
    bring(site, "odd", {"lost": "nowhere:it", "broken": "odd:it"}, code="raise ImportError('no odd library')")
    with pytest.raises(ValidationError, match="candidate 'lost' does not exist; valid: gradient,.*signs"):
        PreconditionerRecipe(candidates=("lost",))
    recipe = PreconditionerRecipe(candidates=("gradient", "broken"))
    with pytest.raises(UserError, match="candidate 'broken': no odd library"):
        PreconditionerProbe(recipe)


def test_a_recipe_is_read_without_importing_what_is_brought(site):
    code = (
        "import sys; from hessprobe.recipe import PreconditionerRecipe as R; R(candidates=('signs',)); "
        "assert not {'torch', 'brought'} & set(sys.modules)"
    )
    paths = f"import sys; sys.path[:0] = [{str(site)!r}]; "
    subprocess.run([sys.executable, "-c", paths + code], check=True)
