"""Every instrument keeps what all of them promise; one in a single file, of somebody else's package, does too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hessprobe.instruments import registry
from hessprobe.testing import check_instrument
from tests.instruments.strangers import WEIGHTS, install
from tests.training.runs import text_file, tiny

pytestmark = pytest.mark.processes

SMALL = {
    "cross_layer": {"sequences": 4, "rounds": 2},
    "gn_hessian": {"sequences": 4, "samples": 2, "lanczos_steps": 3, "lanczos_probes": 1, "cg_iterations": 3},
    "preconditioner": {
        "curvature_sequences": [2, 4],
        "held_out_sequences": 4,
        "folds": 2,
        "cg_iterations": 3,
    },
    "train": {},
}


@pytest.mark.parametrize("name", [*registry.OURS, registry.EVERY_RUN])
def test_ours_keep_every_promise(name):
    check_instrument(name, SMALL[name])


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with an instrument in one file, installed as pip leaves it."""
    folder = install(tmp_path / "packages", "weights_of_mine", WEIGHTS)
    monkeypatch.syspath_prepend(str(folder))
    registry.instruments.cache_clear()
    yield folder
    registry.instruments.cache_clear()
    sys.modules.pop("weights_of_mine", None)


def test_a_strangers_keeps_every_promise_with_one_file(installed):
    check_instrument("weights")


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        (('"norm_stderr": 0.01,', ""), "its row is what its table declares"),
        (('"norm": blocks.norm()', '"norm": blocks'), "its row is what its table declares"),
        (('estimator="exact"', 'estimator=""'), "every variable has units, an estimator and words"),
        (('"gradient_equivalents": 1.0', '"gradient_equivalents": 2.0'), "a row's cost is not below what is counted"),
        (
            ('"norm_stderr": 0.01', '"norm_stderr": __import__("random").random()'),
            "the same seed gives the same row",
        ),
        (
            ("        objective, batches = snapshot.objective, snapshot.batches\n",
             "        objective, batches = snapshot.objective, snapshot.batches\n"
             "        next(objective.model.parameters()).data.add_(1e-3)\n"),
            "training is the same, bit for bit",
        ),
    ],
)  # fmt: skip
def test_a_promise_that_is_broken_is_named(tmp_path, monkeypatch, change, promise):
    assert change[0] in WEIGHTS
    folder = install(tmp_path / "packages", "weights_of_mine", WEIGHTS.replace(*change))
    monkeypatch.syspath_prepend(str(folder))
    registry.instruments.cache_clear()
    try:
        with pytest.raises(AssertionError, match=promise):
            check_instrument("weights")
    finally:
        registry.instruments.cache_clear()
        sys.modules.pop("weights_of_mine", None)


def hessprobe(packages: Path, *words: str) -> str:
    """Returns what a command prints where those packages are installed."""
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "hessprobe", *words], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_command_line_trains_shows_reports_and_compares_with_it(tmp_path):
    packages = install(tmp_path / "packages", "weights_of_mine", WEIGHTS)
    settings = [f"--set={each}" for each in [*tiny(text_file(tmp_path)), "weights.every=1"]]
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        said = hessprobe(
            packages, "train", "--probe=weights", f"--seed={seed}", f"--out={run}", "--steps=2", *settings
        )
        assert "weights: norm " in said and "±" in said
        assert "[weights]\nevery = 1\n" in (run / "recipe.toml").read_text()
    assert "norm" in hessprobe(packages, "show", str(runs[0]))
    hessprobe(packages, "report", str(runs[0]), f"--figures={tmp_path / 'figures'}")
    page = (runs[0] / "report.html").read_text()
    assert '<section id="weights">' in page and 'data-chart="weights_block_norm"' in page
    assert {path.name for path in (tmp_path / "figures").glob("weights_*.pdf")} == {
        "weights_norm.pdf", "weights_block_norm.pdf", "weights_block_product.pdf"}  # fmt: skip
    hessprobe(packages, "report", *map(str, runs), f"--out={tmp_path / 'both.html'}")
    found = json.loads((tmp_path / "both.findings.json").read_text())["findings"]
    (norm,) = [each for each in found if each["name"] == "weights.norm"]
    assert "one" in norm["sentence"] and "two" in norm["sentence"]
    # Where the package is not installed, the log is read all the same.
    hessprobe(tmp_path / "nowhere", "report", str(runs[0]), f"--out={tmp_path / 'bare.html'}")
    assert 'data-chart="weights_norm"' in (tmp_path / "bare.html").read_text()
