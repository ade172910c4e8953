"""The radius of block-Jacobi from kernels equals dense algebra on the same sketches, in-sample and cross-fitted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.kernels import jacobi
from hessprobe.kernels.layer_kernels import LayerKernels
from tests.models import seeded
from tests.oracles import block_diagonal

SIZES = (4, 7, 2)
DAMPING = 0.3
BLOCKS = (slice(0, 4), slice(4, 11), slice(11, 13))


def drawn(sequences: int = 5, rounds: int = 3, seed: int = 3) -> tuple[LayerKernels, Tensor]:
    """Returns kernels of standard normal sketches of ragged sequences, and the sketches (m, p)."""
    generator = seeded(seed)
    w = torch.randn(sequences * rounds, sum(SIZES), generator=generator, dtype=torch.float64)
    parts = w.split(SIZES, dim=1)
    kernels = LayerKernels(
        blocks=("a", "b", "c"),
        kernel=torch.stack([part @ part.mT for part in parts]),
        sequence=torch.arange(sequences).repeat(rounds),
        round=torch.arange(rounds).repeat_interleave(sequences),
        tokens=torch.randint(3, 9, (sequences,), generator=generator),
    )
    return kernels, w


def gauss_newton(kernels: LayerKernels, w: Tensor, among: Tensor) -> Tensor:
    tokens = kernels.tokens.double()[kernels.sequence[among]]
    return w[among].mT @ (w[among] * (tokens / tokens.sum())[:, None])


def radius(d: Tensor, g: Tensor) -> float:
    eye = torch.eye(len(g), dtype=g.dtype)
    diagonal = block_diagonal(d, BLOCKS)
    return float(
        torch.linalg.eigvals(torch.linalg.solve(diagonal + DAMPING * eye, g + DAMPING * eye)).real.max()
    )


def along_held_out(built: Tensor, held: Tensor) -> float:
    """Returns the quotient of G + mu and D + mu on one half, along the top direction of the other."""
    eye = DAMPING * torch.eye(len(held), dtype=held.dtype)
    pairs = [(matrix + eye, block_diagonal(matrix, BLOCKS) + eye) for matrix in (built, held)]
    values, vectors = torch.linalg.eig(torch.linalg.solve(pairs[0][1], pairs[0][0]))
    x = vectors[:, values.real.argmax()].real
    return float(x @ pairs[1][0] @ x / (x @ pairs[1][1] @ x))


@pytest.mark.parametrize("limit", [512, 0], ids=["dense", "lanczos"])
@pytest.mark.parametrize("sequences", [2, 5])
def test_equals_dense_algebra_on_the_same_sketches(monkeypatch, sequences, limit):
    monkeypatch.setattr(jacobi, "DENSE_SKETCHES", limit)
    kernels, w = drawn(sequences)
    even = kernels.sequence % 2 == 0
    first, second = gauss_newton(kernels, w, even), gauss_newton(kernels, w, ~even)
    whole = gauss_newton(kernels, w, torch.ones_like(even))
    crossed = (radius(first, second) + radius(second, first)) / 2
    assert kernels.jacobi_radius(DAMPING) == pytest.approx(crossed, rel=1e-6)
    judged = (along_held_out(first, second) + along_held_out(second, first)) / 2
    assert kernels.jacobi_radius(DAMPING, cross_fit="direction") == pytest.approx(judged, rel=1e-6)
    assert kernels.jacobi_radius(DAMPING, cross_fit=False) == pytest.approx(radius(whole, whole), rel=1e-6)


def test_in_sample_it_lies_between_one_and_the_number_of_blocks():
    kernels, _ = drawn()
    assert kernels.jacobi_radius(1e6, cross_fit=False) == pytest.approx(1, abs=1e-3)
    one = LayerKernels(
        blocks=("a", "b", "c"),
        kernel=kernels.kernel[:1].expand(3, -1, -1),  # three copies of one block: the worst case
        sequence=kernels.sequence,
        round=kernels.round,
        tokens=kernels.tokens,
    )
    assert one.jacobi_radius(1e-6, cross_fit=False) == pytest.approx(3, rel=1e-4)


def test_mistakes_are_told():
    kernels, _ = drawn()
    with pytest.raises(UserError, match="damping must be positive"):
        kernels.jacobi_radius(0.0)
    with pytest.raises(UserError, match="'direction', got 'half'"):
        kernels.jacobi_radius(DAMPING, cross_fit="half")
    alone, _ = drawn(sequences=1)
    with pytest.raises(UserError, match="cross_fit=False"):
        alone.jacobi_radius(DAMPING)
    assert alone.jacobi_radius(DAMPING, cross_fit=False) > 1
