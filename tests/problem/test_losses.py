"""torch's losses in closed form: loss, gradient, G, H and kernels are those of torch's own mean, whatever it divides by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.curvature.diagonal import sampled_diagonal
from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.errors import UserError
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.optimization.local_model import local_gradient
from hessprobe.optimization.model_ladder import model_ladder
from hessprobe.problem.loss_names import loss_named
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import IGNORED, labels, real, redraw, seeded

CLASSES = 5
WEIGHT = torch.tensor([1.0, 4.0, 0.2, 2.0, 0.5], dtype=torch.float64)
# As users write them, and the loss of flat outputs and targets that they train.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor], str]] = {
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), nn.CrossEntropyLoss(weight=WEIGHT), "classes"),
    "weights unreduced": (
        partial(F.cross_entropy, weight=WEIGHT, reduction="none"),
        nn.CrossEntropyLoss(weight=WEIGHT),
        "classes",
    ),
    "smoothing": (
        partial(F.cross_entropy, label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        "classes",
    ),
    "weights and smoothing": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
        "classes",
    ),
    "ignored class": (
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(ignore_index=2),
        "all classes",
    ),
    "probabilities": (
        nn.CrossEntropyLoss(weight=WEIGHT),
        nn.CrossEntropyLoss(weight=WEIGHT),
        "probabilities",
    ),
    "mean squared error": (nn.MSELoss(), nn.MSELoss(), "real"),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), nn.BCEWithLogitsLoss(pos_weight=WEIGHT), "binary"),
    "binary weighted": (
        partial(F.binary_cross_entropy_with_logits, weight=WEIGHT),
        nn.BCEWithLogitsLoss(weight=WEIGHT),
        "binary",
    ),
    "huber": (nn.HuberLoss(delta=0.5), nn.HuberLoss(delta=0.5), "real"),
}
ROOTED = [name for name in LOSSES if name != "huber"]


def batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    """Returns micro-batches of 3 and 2 sequences of 3 and 2 positions."""
    g, found = seeded(3), []
    for shape in ((3, 3), (2, 2)):
        x, y = torch.randint(6, shape, generator=g), real(g, *shape, CLASSES)
        targets = {
            "classes": labels(g, CLASSES, *shape, ignore=0.3),
            "all classes": labels(g, CLASSES, *shape),
            "probabilities": y.softmax(-1),
            "real": y,
            "binary": (y > 0).double(),
        }
        found.append((x, targets[kind]))
    return found


class Case:
    """A small network with one of torch's losses, and dense truths by plain autograd of torch's own mean."""

    def __init__(self, name: str) -> None:
        given, self.torch, kind = LOSSES[name]
        self.model = redraw(nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, CLASSES)), seeded(1))
        self.batches = batches(kind)
        self.objective = Objective(self.model, loss=given)
        self.partition = Partition.of(self.model, "module")
        self.theta = self.partition.vector(self.model)
        self.y = torch.cat([y.flatten(0, 1) for _, y in self.batches])

    def outputs(self, theta: Tensor) -> Tensor:
        named = self.partition.unflatten(theta)
        return torch.cat(
            [torch.func.functional_call(self.model, named, (x,)).flatten(0, 1) for x, _ in self.batches]
        )

    def loss(self, theta: Tensor) -> Tensor:
        return self.torch(self.outputs(theta), self.y)

    @property
    def hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, self.theta)

    @property
    def gauss_newton(self) -> Tensor:
        z = self.outputs(self.theta).detach()
        inner = torch.autograd.functional.hessian(
            lambda flat: self.torch(flat.view_as(z), self.y), z.flatten()
        )
        jacobian = torch.autograd.functional.jacobian(lambda t: self.outputs(t).flatten(), self.theta)
        return jacobian.T @ inner @ jacobian


@pytest.mark.parametrize("name", LOSSES)
def test_loss_gradient_and_curvature_are_torchs_own_over_all_micro_batches(name):
    case = Case(name)
    loss, gradient = case.objective.gradient(case.batches, case.partition)
    wanted = torch.func.grad(case.loss)(case.theta)
    torch.testing.assert_close(loss, case.loss(case.theta), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)
    eye = torch.eye(len(case.theta), dtype=torch.float64)
    for operator, dense in ((GaussNewton, case.gauss_newton), (Hessian, case.hessian)):
        built = operator(case.objective, case.batches, case.partition)
        torch.testing.assert_close(built.apply(eye), dense, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["weights and smoothing", "binary"])
def test_models_of_the_loss_along_a_direction_are_of_the_same_mean(name):
    case = Case(name)
    d = real(seeded(5), len(case.theta))
    ladder = model_ladder(case.objective, case.batches, case.partition, d, [0.1], parameters=case.theta)
    gradient = torch.func.grad(case.loss)(case.theta)
    torch.testing.assert_close(ladder.mean(ladder.slope), gradient @ d, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        ladder.mean(ladder.curvature), d @ case.gauss_newton @ d, rtol=1e-8, atol=1e-10
    )
    change = case.loss(case.theta + 0.1 * d) - case.loss(case.theta)
    torch.testing.assert_close(ladder.mean(ladder.loss)[0], change.detach(), rtol=1e-8, atol=1e-10)
    weight, named = case.objective.weight(case.batches), case.partition.unflatten
    shares = [
        local_gradient(
            case.objective,
            batch,
            named(case.theta),
            named(0.1 * d),
            case.partition.names,
            model="quadratic",
            weight=weight,
        ).gradient
        for batch in case.batches
    ]
    found = sum(case.partition.flatten(share) for share in shares)
    torch.testing.assert_close(found, gradient + 0.1 * case.gauss_newton @ d, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cotangent", ["sampled", "sign"])
@pytest.mark.parametrize("name", ROOTED)
def test_kernels_have_the_norms_of_the_dense_blocks(name, cotangent):
    case = Case(name)
    found = layer_kernels(
        case.objective, case.batches, case.partition, rounds=200, generator=seeded(2), cotangent=cotangent
    )
    slices, truth = list(case.partition.slices.values()), case.gauss_newton
    fro2 = torch.stack([torch.stack([truth[i, j].square().sum() for j in slices]) for i in slices])
    trace = torch.stack([truth[i, i].trace() for i in slices])
    norms, traces = found.block_norms("batch"), found.trace("batch")
    assert ((norms.mean - fro2) / norms.stderr).abs().max() < 4
    assert ((traces.mean - trace).abs() <= 4 * traces.stderr + 1e-9 * trace).all()
    assert found.loss == pytest.approx(float(case.loss(case.theta)), rel=1e-9)


@pytest.mark.parametrize("name", ROOTED)
def test_the_sampled_diagonal_is_that_of_the_dense_matrix(name):
    case, g = Case(name), seeded(7)
    draws = torch.stack([
        sampled_diagonal(case.objective, case.batches, case.partition, generator=g) for _ in range(300)
    ])  # fmt: skip
    gap = draws.mean(0) - case.gauss_newton.diagonal()
    assert (gap / (draws.std(0) / 300**0.5).clamp_min(1e-12)).abs().max() < 4.5


def test_names_stand_for_torchs_means():
    z, y = real(seeded(0), 4, 3), real(seeded(1), 4, 3)
    for name, wanted in (
        ("mean_squared_error", F.mse_loss(z, y)),
        ("binary_cross_entropy", F.binary_cross_entropy_with_logits(z, y.sigmoid())),
    ):
        loss, targets = loss_named(name), y.sigmoid() if name.startswith("binary") else y
        torch.testing.assert_close(loss.value(z, targets) / loss.weights(targets).sum(), wanted)


REFUSED = {
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), "reduction='sum'.*reduction='mean'"),
    "two ignored classes": (nn.CrossEntropyLoss(ignore_index=3), "ignores class 3, and ignore_index=2"),
    "weights of another shape": (
        nn.BCEWithLogitsLoss(weight=torch.ones(2, 3)),
        r"weight wanted one number.*\(2, 3\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_mean_is_refused(case):
    loss, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        Objective(nn.Linear(3, 4), loss=loss, ignore_index=2)


def test_real_targets_that_are_no_probabilities_are_told_the_losses_for_them():
    model = redraw(nn.Linear(3, 4), seeded(0))
    for y in (real(seeded(1), 5, 4), real(seeded(1), 5)):
        with pytest.raises(UserError, match=r"mean_squared_error.*binary_cross_entropy"):
            Objective(model).loss((real(seeded(2), 5, 3), y))


def test_targets_whose_classes_weigh_nothing_carry_none():
    model, x = redraw(nn.Linear(3, 2), seeded(0)), real(seeded(1), 4, 3)
    objective = Objective(
        model, loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0], dtype=torch.float64))
    )
    with pytest.raises(UserError, match="no token carries a target"):
        objective.loss((x, torch.ones(4, dtype=torch.long)))
    with pytest.raises(UserError, match="no token carries a target"):
        objective.loss((x, torch.full((4,), IGNORED)))


class TestNegativeLogLikelihood:
    """Of a model that ends with log_softmax: the loss trained has its softmax, and its curvature, inside."""

    def case(self, ending):
        model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7), ending).double()
        draws = torch.Generator().manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, generator=draws)
        ids = torch.randint(7, (4, 5), generator=draws)
        y = torch.randint(7, (4, 5), generator=draws)
        y[0, 2:] = -1
        return model, (ids, y)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("partial_", [False, True])
    def test_value_and_curvature_are_those_of_the_logits(self, reduction, weighted, partial_):
        model, batch = self.case(torch.nn.LogSoftmax(-1))
        weight = torch.linspace(0.5, 2, 7).double() if weighted else None
        settings = {"weight": weight, "ignore_index": -1, "reduction": reduction}
        loss = partial(F.nll_loss, **settings) if partial_ else torch.nn.NLLLoss(**settings)
        logits = torch.nn.Sequential(model[0], model[1])
        found, wanted = (
            Objective(model, loss),
            Objective(logits, torch.nn.CrossEntropyLoss(weight, ignore_index=-1)),
        )
        torch.testing.assert_close(found.loss(batch), wanted.loss(batch))
        partition = Partition.of(logits, "module")
        v = torch.randn(
            2, sum(p.numel() for p in logits.parameters()), generator=torch.Generator().manual_seed(1)
        )
        for operator in (GaussNewton, Hessian):
            ours = operator(found, [batch], Partition.of(model, "module")).apply(v.double())
            theirs = operator(wanted, [batch], partition).apply(v.double())
            torch.testing.assert_close(ours, theirs)
            assert float(theirs.norm()) > 0.1

    def test_logits_are_refused(self):
        model, batch = self.case(torch.nn.Identity())
        with pytest.raises(UserError, match="wanted logarithms of probabilities.*loss='cross_entropy'"):
            Objective(model, torch.nn.NLLLoss(ignore_index=-1)).loss(batch)

    def test_a_function_that_picks_logarithms_is_no_silent_zero(self):
        def picked(z, y):
            return -z.gather(1, y.clamp(min=0)[:, None])[:, 0]

        model, batch = self.case(torch.nn.LogSoftmax(-1))
        with pytest.raises(UserError, match=r"linear in the model's outputs.*nn\.NLLLoss\(\)"):
            Objective(model, picked, ignore_index=-1).loss(batch)


@pytest.mark.parametrize(("low", "high", "marks"), [(-1, 6, -1), (0, 255, 255)])
def test_labels_out_of_range_are_told_with_what_may_ignore_them(low, high, marks):
    model, y = torch.nn.Embedding(7, 7), torch.arange(12).reshape(3, 4) % 7
    y[0, 0], y[0, 1] = low, high
    batch = (torch.zeros_like(y), y)
    with pytest.raises(UserError, match=rf"targets from {low} to {high} for.*classes.*ignore_index={marks}"):
        Objective(model).loss(batch)
    assert bool(Objective(model, ignore_index=marks).loss(batch) > 0)
