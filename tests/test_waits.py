"""The count of what would make the host wait for a GPU: it sees each kind, and nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.waits import waits_of

X = torch.arange(6.0)
KINDS = {
    "item": lambda: X[0].item(),
    "float": lambda: float(X[0]),
    "if": lambda: 1 if X[0] > 0 else 2,
    "bool": lambda: bool(X.isnan().any()),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.numpy(),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: X.nonzero(),
    "masked_select": lambda: X.masked_select(X > 1),
    "mask": lambda: X[X > 1],
    "assignment by a mask": lambda: X.clone().__setitem__(X > 1, X[:4]),
    "unique": lambda: X.unique(),
    "repeat_interleave": lambda: torch.repeat_interleave(X, torch.ones(6, dtype=torch.long)),
}
FREE = {
    "sums": lambda: X.sum() + X.mean(),
    "masked_fill": lambda: X.masked_fill(X > 1, 0.0),
    "where": lambda: torch.where(X > 1, X, 0.0),
    "places": lambda: X[torch.tensor([0, 2])],
    "slices": lambda: X[1:3],
    "products": lambda: X[None] @ X[:, None],
    "repeats": lambda: X.repeat_interleave(2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_seen(kind):
    assert waits_of(KINDS[kind])


@pytest.mark.parametrize("kind", FREE)
def test_what_needs_no_wait_is_not(kind):
    assert not waits_of(FREE[kind])
