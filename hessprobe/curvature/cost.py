"""What products and passes cost, by operation count: the only formulas of it, for all who declare, plan or count.

The unit is a gradient of the batch: a forward pass, and two of its size back, for activations and for weights. So a pass
is a third; a product of G is a tangent and a pull-back (4/3) beside the forward pass (5/3 alone); of H two gradients
beside the gradient (3 alone), and of R = H - G, whose cotangent stands still, as many.
"""

from __future__ import annotations

# A product of one row of H or of R, from a graph of the gradient that is kept.
HESSIAN_PRODUCT = 2.0
_PULL_BACK = 2 / 3  # J^T w, from a linearisation that is there
# Thirds of a gradient for each row of several, and once for all of them.
_ROWS = {"gauss_newton": (4, 2), "hessian": (6, 3), "residual": (10, 5)}


def passes(forwards: float, backwards: float, products: float = 0.0) -> float:
    """Returns gradients for passes of a forward pass's size.

    Args:
        backwards: through activations and to weights count one each: a gradient has two.
        products: others as large, such as sums of outer products.
    """
    return (forwards + backwards + products) / 3


def layer_kernels(rounds: int) -> float:
    """Returns gradients that layer kernels take where every parameter has a fast path: one forward pass for all rounds.

    A Gram matrix is m^2 p multiply-adds, where a gradient is 3 p a token: it is not counted.
    """
    return passes(1, 2 * rounds)


def products(matrix: str, rows: int, times: int = 1) -> float:
    """Returns gradients for products with so many rows at once, as many times; the residual is H's and G's difference.

    Args:
        matrix: "gauss_newton", "hessian" or "residual".
    """
    each, once = _ROWS[matrix]
    return times * (each * rows + once) / 3


def gauss_newton_products(groups: int = 1) -> float:
    """Returns gradients for a product of G restricted to each of so many groups of equal work, from a linearisation."""
    return (groups + 3) / 3


def tangents(groups: int = 1) -> float:
    """Returns gradients for J v on each of so many groups of equal work, from a linearisation."""
    return (groups + 3) / 6


def linearised_gradients(groups: int) -> float:
    """Returns gradients for a product of G on each group and the linearisation, made for it."""
    return (groups + 6) / 3


def dual_pass(groups: int) -> float:
    """Returns gradients that one group's dual and reverse pass takes: the mean over groups of equal work.

    Torch multiplies by the zero tangents of a later layer's matrices too: 1 forward, not 1/2, for a group in the middle.
    """
    return 5 / 6 * (1 + 1 / groups)


def mean_block(blocks: int) -> float:
    """Returns the share of a product that is left when restricted to a block: nothing is computed below it."""
    return (1 + 1 / blocks) / 2


def graphs(blocks: int) -> float:
    """Returns gradients for the graphs of G, H and R, made once, with J compared with its transpose block by block."""
    return 3 + tangents(blocks) + _PULL_BACK


def curvature_along(directions: int, groups: int) -> float:
    """Returns gradients for slopes and curvatures along directions, between groups, with the linearisation."""
    return 1 + directions * (groups + 3) / 6


def line_search(step_sizes: int) -> float:
    """Returns gradients for the losses of a grid of step sizes and of no step."""
    return passes(step_sizes + 1, 0)


def bytes_per_row(saved: int, outputs: int, vector: int) -> int:
    """Returns what a row of a batched product holds: tangents of all that is saved, two of outputs, three vectors."""
    return saved + 2 * outputs + 3 * vector


def rows_at_once(rows: int, memory: int, each: int, least: int = 1) -> int:
    """Returns how many of the rows fit into so many bytes together, where each takes `each`; `least` in any case."""
    return min(rows, max(least, memory // each))
