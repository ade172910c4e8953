"""The oracle itself is held to closed forms and finite differences before anything is held to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import models, oracles


def test_linear_regression() -> None:
    problem = models.linear_regression(models.seeded(1))
    truth = oracles.dense(*problem)
    closed_form = oracles.linear_regression_curvature(problem.batches[0][0], outputs=3)
    assert oracles.relative_error(truth.gauss_newton, closed_form) < 1e-13
    assert oracles.relative_error(truth.hessian, closed_form) < 1e-13


def test_softmax_regression() -> None:
    problem = models.softmax_regression(models.seeded(2))
    assert isinstance(problem.model, nn.Linear)
    truth = oracles.dense(*problem)
    closed_form = oracles.softmax_regression_curvature(problem.batches[0][0], problem.model.weight.detach())
    assert oracles.relative_error(truth.gauss_newton, closed_form) < 1e-13
    assert oracles.relative_error(truth.hessian, closed_form) < 1e-12


@pytest.mark.parametrize("name", ["mlp_classifier", "layernorm", "repeated_module", "custom_loss"])
def test_hessian_and_gradient_equal_central_differences(name: str) -> None:
    problem = models.ZOO[name](models.seeded(3))
    truth = oracles.dense(*problem)
    flat = torch.cat([dict(problem.model.named_parameters())[n].detach().reshape(-1) for n in truth.names])
    direction = torch.randn(flat.shape, generator=models.seeded(4), dtype=torch.float64)
    step = 1e-5

    def at(shift: float) -> oracles.Dense:
        pieces = (flat + shift * direction).split([truth.shapes[n].numel() for n in truth.names])
        theta = {n: piece.view(truth.shapes[n]) for n, piece in zip(truth.names, pieces, strict=True)}
        return oracles.dense(*problem, theta=theta)

    up, down = at(step), at(-step)
    slope = (up.loss - down.loss) / (2 * step)
    assert float(slope) == pytest.approx(float(truth.gradient @ direction), rel=1e-7)
    product = (up.gradient - down.gradient) / (2 * step)
    assert oracles.relative_error(product, truth.hessian @ direction) < 1e-7


@pytest.mark.parametrize("name", ["layernorm", "repeated_module", "fused_attention"])
def test_hessian_equals_plain_double_backward_row_by_row(name: str) -> None:
    problem = models.ZOO[name](models.seeded(3))
    truth = oracles.dense(*problem)
    parameters = [dict(problem.model.named_parameters())[n] for n in truth.names]
    with sdpa_kernel(SDPBackend.MATH):
        losses = [
            oracles.token_losses(problem.loss, problem.model(x).flatten(0, -2), y.flatten()).sum()
            for x, y in problem.batches
        ]
        gradient = torch.autograd.grad(
            torch.stack(losses).sum() / truth.tokens, parameters, create_graph=True
        )
        flat = torch.cat([g.reshape(-1) for g in gradient])
        rows = []
        for entry in flat:
            row = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in row]))
    assert oracles.relative_error(truth.hessian, torch.stack(rows)) < 1e-13


def test_gauss_newton_is_the_covariance_of_gradients_at_labels_the_model_draws() -> None:
    # Exact over the finite label set: G = mean_n sum_y p(y) g_ny g_ny^T, the Fisher matrix (Martens 2014).
    problem = models.mlp_classifier(models.seeded(5))
    inputs, _ = problem.batches[0]
    probabilities = problem.model(inputs).softmax(-1).detach()
    fisher = torch.zeros(85, 85, dtype=torch.float64)
    for n, row in enumerate(inputs):
        for label in range(5):
            log_loss = -problem.model(row).log_softmax(-1)[label]
            gradients = torch.autograd.grad(log_loss, list(problem.model.parameters()))
            gradient = torch.cat([g.reshape(-1) for g in gradients])
            fisher += probabilities[n, label] * torch.outer(gradient, gradient) / len(inputs)
    everything = [(inputs, torch.zeros(len(inputs), dtype=torch.long))]
    truth = oracles.dense(problem.model, everything, "cross_entropy")
    assert oracles.relative_error(truth.gauss_newton, fisher) < 1e-12


def test_coupling_is_one_on_the_diagonal_and_at_most_one_elsewhere() -> None:
    truth = oracles.dense(*models.mlp_classifier(models.seeded(6)))
    slices = [slice(0, 40), slice(40, 85)]
    coupling = oracles.coupling(truth.gauss_newton, slices)
    assert torch.allclose(coupling.diagonal(), torch.ones(2, dtype=torch.float64))
    assert 0 < float(coupling[0, 1]) < 1
    fro2 = oracles.block_fro2(truth.gauss_newton, slices)
    assert float(fro2.sum()) == pytest.approx(float(truth.gauss_newton.square().sum()))
