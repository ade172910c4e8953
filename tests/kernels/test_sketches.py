"""Cotangents: mean zero, covariance the dense output Hessian, zero on ignored tokens, refused where none exist."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.kernels.sketches import COTANGENTS, draw_cotangent
from hessprobe.problem.loss_names import loss_named
from hessprobe.problem.losses import Loss
from tests.models import IGNORED, labels, logcosh, real, seeded
from tests.oracles import logit_hessians

DRAWS, TOKENS, CLASSES = 20_000, 4, 5
_WEIGHT = torch.tensor([1.0, 4.0, 0.2, 2.0, 0.5], dtype=torch.float64)
TORCH_LOSSES = {
    "mean_squared_error": nn.MSELoss(reduction="sum"),
    "class_weights": nn.CrossEntropyLoss(weight=_WEIGHT, reduction="sum"),
    "label_smoothing": nn.CrossEntropyLoss(weight=_WEIGHT, label_smoothing=0.2, reduction="sum"),
    "probabilities": nn.CrossEntropyLoss(weight=_WEIGHT, reduction="sum"),
    "binary": nn.BCEWithLogitsLoss(pos_weight=_WEIGHT, reduction="sum"),
}
REAL = ("squared_error", "mean_squared_error", "binary", "probabilities")
LOSSES = ("cross_entropy", "squared_error", *TORCH_LOSSES)
CASES = [(loss, kind) for loss in LOSSES for kind in ("sampled", "sign")]


def named(loss: str) -> Loss:
    """Returns hessprobe's loss of a case: of torch's own as users write it, with its mean."""
    if loss not in TORCH_LOSSES:
        return loss_named(loss)
    given = copy.deepcopy(TORCH_LOSSES[loss])
    given.reduction = "mean"
    return loss_named(given)


def hessians(loss: str, z: Tensor, y: Tensor) -> Tensor:
    """Returns the dense second derivative of every token's loss (n, c, c): for torch's own losses, torch's own."""
    if loss not in TORCH_LOSSES:
        return logit_hessians(loss, z, y)
    one = [lambda x, i=i: TORCH_LOSSES[loss](x[None], y[i : i + 1]) for i in range(len(z))]
    return torch.stack([torch.autograd.functional.hessian(f, row) for f, row in zip(one, z, strict=True)])


def _outputs_and_targets(loss: str, tokens: int = TOKENS, ignore: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = seeded(4)
    z = 1.5 * real(generator, tokens, CLASSES)
    if loss in REAL:
        y = real(generator, tokens, CLASSES)
        return z, {"binary": (y > 0).double(), "probabilities": y.softmax(-1)}.get(loss, y)
    return z, labels(generator, CLASSES, tokens, ignore=ignore)


def _draws(loss: str, kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns (draws, n, c) independent cotangents, all from one call on repeated tokens, and the truth (n, c, c)."""
    z, y = _outputs_and_targets(loss)
    repeated = draw_cotangent(
        kind,
        named(loss),
        z.repeat(DRAWS, 1),
        y.repeat(DRAWS, *([1] * (y.dim() - 1))),
        generator=seeded(seed),
    )
    return repeated.view(DRAWS, TOKENS, CLASSES), hessians(loss, z, y)


@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_mean_is_zero(loss, kind):
    draws, _ = _draws(loss, kind)
    z_scores = draws.mean(0) / (draws.std(0) / DRAWS**0.5)
    assert z_scores.abs().max() < 4
    assert z_scores.square().mean() < 2.5


@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_covariance_is_the_output_hessian(loss, kind):
    draws, truth = _draws(loss, kind)
    products = torch.einsum("knc,knd->kncd", draws, draws)
    error = products.std(0) / DRAWS**0.5
    exact = error < 1e-12  # a sign's square is 1 without any spread
    assert torch.allclose(products.mean(0)[exact], truth[exact])
    z_scores = ((products.mean(0) - truth) / error)[~exact]
    assert z_scores.abs().max() < 4.5
    assert z_scores.square().mean() < 2.5


@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_tokens_are_independent(loss, kind):
    draws, _ = _draws(loss, kind)
    products = torch.einsum("kc,kd->kcd", draws[:, 0], draws[:, 1])
    assert ((products.mean(0)) / (products.std(0) / DRAWS**0.5)).abs().max() < 4


def test_labels_enumerated_have_exactly_the_output_hessian():
    """c = p - e_y for every label y, weighted by p_y: sum_y p_y c c^T = diag(p) - p p^T."""
    z, y = _outputs_and_targets("cross_entropy")
    p = z.softmax(-1)
    c = p[:, None, :] - torch.eye(CLASSES, dtype=torch.float64)  # (n, y, c)
    assert torch.einsum("ny,nyc->nc", p, c).abs().max() < 1e-15
    covariance = torch.einsum("ny,nyc,nyd->ncd", p, c, c)
    assert torch.allclose(covariance, logit_hessians("cross_entropy", z, y), atol=1e-15)


def test_sampled_cotangents_are_one_of_the_enumerated_with_the_model_s_frequencies():
    draws, _ = _draws("cross_entropy", "sampled")
    z, _ = _outputs_and_targets("cross_entropy")
    p = z.softmax(-1)
    hot = p - draws
    drawn = hot.argmax(-1)
    assert torch.allclose(hot, torch.eye(CLASSES, dtype=torch.float64)[drawn], atol=1e-12)
    frequency = torch.stack([(drawn == y).double().mean(0) for y in range(CLASSES)], -1)
    z_scores = (frequency - p) / (p * (1 - p) / DRAWS).sqrt()
    assert z_scores.abs().max() < 4


def test_a_label_without_probability_is_never_drawn():
    z = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).repeat(5000, 1)
    c = draw_cotangent(
        "sampled",
        loss_named("cross_entropy"),
        z,
        torch.zeros(5000, dtype=torch.long),
        generator=seeded(0),
    )
    assert c[:, [0, 2, 4]].abs().max() == 0
    assert c.isfinite().all()


@pytest.mark.parametrize("kind", COTANGENTS)
def test_ignored_tokens_get_zero_and_the_others_do_not(kind):
    z, y = _outputs_and_targets("cross_entropy", tokens=40, ignore=0.5)
    c = draw_cotangent(kind, loss_named("cross_entropy"), z, y, generator=seeded(0))
    ignored = y == IGNORED
    assert ignored.any() and c[ignored].abs().max() == 0
    assert (c[~ignored].abs().sum(1) > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_empirical_is_the_loss_s_own_gradient(loss):
    z, y = _outputs_and_targets(loss, ignore=0.3)
    z.requires_grad_()
    (wanted,) = torch.autograd.grad(named(loss).value(z, y), z)
    got = draw_cotangent("empirical", named(loss), z.detach(), y, generator=seeded(0))
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("loss", "kind"), CASES)
def test_a_seed_means_the_same_draws_in_every_precision(loss, kind):
    z, y = _outputs_and_targets(loss, tokens=30)
    fine = draw_cotangent(kind, named(loss), z, y, generator=seeded(7))
    again = draw_cotangent(kind, named(loss), z, y, generator=seeded(7))
    coarse = draw_cotangent(kind, named(loss), z.float(), y, generator=seeded(7))
    assert torch.equal(fine, again)
    assert coarse.dtype == torch.float32 and torch.allclose(coarse.double(), fine, atol=1e-5)


def test_an_unknown_kind_names_the_known_ones():
    z, y = _outputs_and_targets("cross_entropy")
    with pytest.raises(UserError, match=r"no cotangent named 'sample'.*'sampled'.*sampled, sign, empirical"):
        draw_cotangent("sample", loss_named("cross_entropy"), z, y, generator=seeded(0))


@pytest.mark.parametrize("kind", ["sampled", "sign"])
def test_a_loss_without_a_known_root_names_the_way_out(kind):
    z, _ = _outputs_and_targets("squared_error")
    with pytest.raises(
        UserError,
        match=r"got logcosh: .*\"method\": \"products\".*cross_layer\.method=products.*block_norms\(GaussN",
    ):
        draw_cotangent(kind, loss_named(logcosh), z, z, generator=seeded(0))
