"""One entry in the table of optimizers makes one: the command line, training, the plan and the comparison know it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hessprobe.optimization.baselines import BASELINES
from hessprobe.recipe import GAUSS_NEWTON, OPTIMIZERS
from hessprobe.schema.optimizers import ENTRIES
from hessprobe.training.optimizers import LEARNING_RATES
from tests.training.runs import state, tables, text_file, tiny

ADDED = """
from hessprobe.schema import optimizers
optimizers.ENTRIES["nadam"] = optimizers.Entry(
    label="NAdam", learning_rate=0.004, builds="torch.optim:NAdam", elementwise=True,
)
"""
CALL = ADDED + "from hessprobe.cli import main\nmain()\n"
# What the optimizer does is torch's, bit for bit, and a saved one goes on.
STEPS = (
    ADDED
    + """
import torch
from hessprobe.optimization.inner_solver import FirstOrder
draw = lambda seed: torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
ours, theirs = {"weight": draw(0)}, draw(0)
solver, library = FirstOrder("nadam", ours, ()), torch.optim.NAdam([theirs], lr=0.1)
for i in range(1, 5):
    if i == 3:
        state, solver = solver.state_dict(), FirstOrder("nadam", ours, ())
        solver.load_state_dict(state)
    solver.step({"weight": draw(i)}, 0.1, None)
    theirs.grad = draw(i)
    library.step()
assert torch.equal(ours["weight"], theirs) and not torch.equal(theirs, draw(0))
"""
)


def python(code: str, *words: str, code_wanted: int = 0) -> str:
    """Returns what a process of its own says to both streams."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == code_wanted, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the folder of two steps of the added optimizer after one of the warm-up, and what the console said."""
    folder = tmp_path_factory.mktemp("added") / "run"
    words = [word for setting in tiny(text_file(folder.parent)) for word in ("--set", setting)]
    said = python(
        CALL, "train", "--optimizer", "nadam", "--steps", "3", "--out", str(folder),
        "--set", "training.evaluate_every=1", "--set", "probes=[]", *words,
    )  # fmt: skip
    return folder, said


def test_it_trains_and_the_console_names_it(run):
    folder, said = run
    assert [line.split()[2] for line in said.splitlines() if line.startswith("step ")] == [
        "warm-up", "nadam", "nadam",
    ]  # fmt: skip
    assert set(tables(folder)["train"]["outcome"].values) == {"accepted"}
    (saved,) = state(folder)["optimizer"]["solver"]
    assert all(float(kept["step"]) == 2 and "mu_product" in kept for kept in saved["state"].values())


def test_the_comparison_calls_it_by_its_label(run):
    folder, _ = run
    assert "NAdam" in python(CALL, "compare", str(folder), "--out", str(folder.parent / "page.html"))


def test_its_steps_are_the_librarys_own():
    python(STEPS)


def test_the_plan_says_its_rate_and_a_slip_lists_it():
    assert "optimizer nadam, learning rate 0.004" in python(
        CALL, "train", "--optimizer", "nadam", "--dry-run"
    )
    assert "kfac, nadam" in python(CALL, "train", "--optimizer", "sgd", code_wanted=2)
    assert "nadam" in python(CALL, "train", "--help")


def test_every_list_has_every_entry():
    assert (*GAUSS_NEWTON, *ENTRIES) == OPTIMIZERS == tuple(LEARNING_RATES)
    assert set(BASELINES) == {*ENTRIES, "ekfac"}
