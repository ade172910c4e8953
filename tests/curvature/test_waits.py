"""How often products would make the host wait for a GPU: never, but for the checks that a model's first product makes."""

from __future__ import annotations

import pytest
import torch

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.model_operator import ModelOperator
from hessprobe.curvature.residual import Residual
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import seeded
from tests.waits import waits_of

KEEP = 2**24
# By a product's way: what the first one checks. Tangents against gradients reads two lists and a verdict; the Hessian's
# symmetry one number, its comparison of a product from a graph with one without one more, and the pieces' tokens; a
# linearisation one list.
WAYS = {
    "G v": (GaussNewton, 1, False, 3),
    "G v, 3 rows": (GaussNewton, 3, False, 3),
    "G v, linearised": (GaussNewton, 1, True, 1),
    "H v": (Hessian, 1, False, 4),
    "H v, 3 rows": (Hessian, 3, False, 4),
    "H v, from a graph": (Hessian, 1, True, 9),
}


def operator(kind: type[ModelOperator], layers: int, kept: bool = False) -> ModelOperator:
    config = DecoderConfig(layers=layers, width=8, feedforward=12, heads=2, vocabulary=16, context=8)
    model = Decoder(config, generator=seeded(0))
    batches = [tuple(torch.randint(16, (2, 3, 8), generator=seeded(i))) for i in range(2)]
    found = kind(Objective(model), batches, Partition.of(model))
    return found.linearised(KEEP) if kept else found  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("way", WAYS)
def test_products_never_wait_and_the_first_only_for_its_checks(layers, way):
    kind, rows, kept, checks = WAYS[way]
    matrix = operator(kind, layers, kept)
    v = torch.randn(rows, matrix.size, generator=seeded(1))
    assert len(waits_of(lambda: matrix.apply(v))) == checks
    assert not waits_of(lambda: matrix.apply(v))


@pytest.mark.parametrize("layers", [2, 6])
def test_a_block_diagonal_product_never_waits_and_the_first_only_once(layers):
    matrix = operator(GaussNewton, layers).block_diagonal()
    v = torch.randn(1, matrix.size, generator=seeded(1))
    assert len(waits_of(lambda: matrix.apply(v))) == 1  # J against its transpose, all blocks read together
    assert not waits_of(lambda: matrix.apply(v))


def test_the_residual_never_waits_after_its_first_product():
    matrix = operator(Residual, 2)
    v = torch.randn(1, matrix.size, generator=seeded(1))
    matrix.apply(v)
    assert not waits_of(lambda: matrix.apply(v))
