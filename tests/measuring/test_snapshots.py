"""Snapshots of all hosts are taken in one place, at theta before the step, in at least float32."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import hessprobe
from hessprobe.measuring.snapshots import Snapshots
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition


def snapshots(dtype: torch.dtype = torch.float32) -> Snapshots:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5)).to(dtype)
    return Snapshots(objective=Objective(model), partition=Partition.of(model, "module"), seed=7)


def test_no_other_file_of_the_package_makes_a_snapshot():
    found = set()
    for file in Path(hessprobe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Snapshot":
                found.add("/".join(file.parts[-2:]))
    assert found == {"measuring/snapshots.py"}


def test_the_update_is_what_was_added_since_theta_before():
    taken = snapshots()
    before = taken.theta()
    with torch.no_grad():
        for p in taken.objective.model.parameters():
            p.add_(0.5)
    found = taken.take(3, [], before=before)
    assert (found.step, found.seed) == (3, 7) and found.parameters is before
    assert found.update is not None and torch.equal(found.update, taken.theta() - before)


def test_of_weights_as_they_are_no_update_is_known_unless_one_is_given():
    taken = snapshots()
    assert taken.take(0, []).update is None
    theta, update = taken.theta(), torch.ones(taken.partition.size)
    found = taken.take(0, [], update=update)
    assert found.update is update and torch.equal(found.parameters, theta)


@pytest.mark.parametrize(
    ("own", "wanted"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_theta_is_in_at_least_float32_and_the_models_is_left_alone(own, wanted):
    taken = snapshots(own)
    assert taken.theta().dtype == wanted
    assert {p.dtype for p in taken.objective.model.parameters()} == {own}
