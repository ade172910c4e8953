"""K-FAC and EK-FAC against dense float64: their factors by definition, their scale by G's own traces, and G itself
where theory says they are it. curvlinops' scale depends on how data and outputs are laid out; ours must not."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hessprobe.curvature.kronecker import kronecker_factors, kronecker_names
from hessprobe.curvature.kronecker_factors import KINDS, KroneckerFactors
from hessprobe.errors import RunFailed, UserError
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.models import Problem, labels, real, redraw, seeded

# The zoo's perceptrons have no layers whose names mean anything.
pytestmark = pytest.mark.filterwarnings("ignore:layer partition")
DECODERS = ("decoder", "decoder_ragged", "decoder_swiglu_layernorm")


def factors_of(problem: Problem, seed: int = 0, **options) -> KroneckerFactors:
    partition = Partition.of(problem.model, "parameter")
    objective = Objective(problem.model, loss=problem.loss)
    return kronecker_factors(objective, list(problem.batches), partition, generator=seeded(seed), **options)


def dense(factors: KroneckerFactors, name: str, shape: Sequence[int], **options) -> Tensor:
    """Returns one parameter's block as a matrix, by applying it to the identity."""
    size = torch.Size(shape).numel()
    rows = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return factors.apply({name: rows}, **options)[name].reshape(size, size)


def true_blocks(problem: Problem) -> dict[str, Tensor]:
    """Returns G's diagonal block of every parameter."""
    partition = Partition.of(problem.model, "parameter")
    truth = oracles.dense(*problem).in_order(partition.names)
    return {s.name: truth.gauss_newton[s.start : s.stop, s.start : s.stop] for s in partition.slots}


def kfac_by_definition(problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns B (o, o) and A (i, i) of every linear layer, from its rows and the Jacobians of all outputs in them."""
    model = copy.deepcopy(problem.model).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].detach(), y)}))
    tokens = sum(int((y != models.IGNORED).sum()) for _, y in problem.batches)
    inputs: dict[str, list[Tensor]] = {}
    gradients: dict[str, Tensor] = {}
    for x, y in problem.batches:
        z, valid = model(x).flatten(0, -2), (y != models.IGNORED).reshape(-1)
        curvature = oracles.logit_hessians(problem.loss, z.detach(), y.reshape(-1))
        for name, (a, _) in seen.items():
            inputs.setdefault(name, []).append(a.flatten(0, -2))
        leaving = [h for _, h in seen.values()]
        for n in valid.nonzero()[:, 0].tolist():
            pulled = [torch.autograd.grad(z[n, c], leaving, retain_graph=True) for c in range(z.shape[1])]
            for i, name in enumerate(seen):
                rows = torch.stack([grads[i].flatten(0, -2) for grads in pulled])  # (classes, rows, outputs)
                outer = torch.einsum("cro,cd,drp->op", rows, curvature[n], rows) / tokens
                gradients[name] = gradients.get(name, torch.zeros_like(outer)) + outer
    entering = {name: torch.cat(rows) for name, rows in inputs.items()}
    return {name: (gradients[name], a.T @ a / len(a)) for name, a in entering.items()}


def perceptron(
    *sizes: int, activation: type[nn.Module] = nn.Identity, seed: int = 3, bias: bool = True
) -> nn.Module:
    layers = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o, bias=bias), activation())]
    return redraw(nn.Sequential(*layers[:-1]), seeded(seed))


# -- scale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decoder_ragged", "decoder_swiglu_layernorm"])
def test_kfac_is_what_its_definition_says(name):
    problem = models.ZOO[name](seeded(3))
    factors, wanted = factors_of(problem, fisher="exact"), kfac_by_definition(problem)
    assert {n.removesuffix(".weight") for n in factors.names} == set(wanted)
    for parameter in factors.names:
        b, a = wanted[parameter.removesuffix(".weight")]
        got = dense(factors, parameter, problem.model.get_parameter(parameter).shape)
        torch.testing.assert_close(
            got, torch.kron(b.contiguous(), a), rtol=1e-9, atol=1e-9 * float(got.abs().max())
        )


@pytest.mark.parametrize("name", [*DECODERS, "fused_attention", "mlp_regression", "frozen_layer"])
def test_ekfac_has_the_traces_of_gauss_newtons_own_blocks(name):
    problem = models.ZOO[name](seeded(3))
    traces, wanted = factors_of(problem, kind="ekfac", fisher="exact").traces(), true_blocks(problem)
    assert traces
    for parameter, trace in traces.items():
        assert trace == pytest.approx(float(wanted[parameter].trace()), rel=1e-8), parameter


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_labels_give_the_exact_traces_in_the_mean(kind):
    problem = models.ZOO["decoder_ragged"](seeded(3))
    wanted = factors_of(problem, kind=kind, fisher="exact").traces()
    draws = [factors_of(problem, seed, kind=kind, samples=4).traces() for seed in range(16)]
    for parameter, trace in wanted.items():
        got = torch.tensor([draw[parameter] for draw in draws])
        assert abs(float(got.mean()) - trace) < 3.5 * float(got.std()) / len(draws) ** 0.5, parameter


def test_where_inputs_are_of_one_size_and_positions_independent_kfac_has_the_true_trace():
    problem = models.ZOO["decoder"](seeded(3))
    with torch.no_grad():
        problem.model.get_parameter("final_norm.weight").fill_(
            1.0
        )  # rows that enter the head: all of norm sqrt(8)
    kfac, wanted = factors_of(problem, fisher="exact").traces(), true_blocks(problem)
    assert kfac["head.weight"] == pytest.approx(float(wanted["head.weight"].trace()), rel=1e-4)
    assert kfac["blocks.0.attention.v.weight"] != pytest.approx(
        float(wanted["blocks.0.attention.v.weight"].trace()), rel=0.05
    )


class Flattening(nn.Module):
    """Applies its layers to all tokens at once, (b * t, d), or sequence by sequence, (b, t, d)."""

    def __init__(self, flatten: bool, recompute: bool = False) -> None:
        super().__init__()
        self.flatten, self.recompute = flatten, recompute
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1) if self.flatten else x

        def body(r: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(r)))

        z = checkpoint(body, rows, use_reentrant=False) if self.recompute else body(rows)
        return z.reshape(*x.shape[:2], -1)


# EK-FAC of flattened tokens takes each of them for an example: another approximation, by design.
@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("kfac", {"flatten": True}),
        ("kfac", {"flatten": False, "recompute": True}),
        ("ekfac", {"flatten": False, "recompute": True}),
    ],
)
def test_the_layout_of_inputs_and_recomputation_change_nothing(kind, variant):
    plain = redraw(Flattening(False), seeded(1))
    other = Flattening(**variant).double()
    other.load_state_dict(plain.state_dict())
    g = seeded(2)
    batches = [(real(g, 3, 4, 3), labels(g, 4, 3, 4, ignore=0.3)), (real(g, 2, 2, 3), labels(g, 4, 2, 2))]
    one, two = (
        factors_of(Problem(m, batches, "cross_entropy"), kind=kind, samples=3) for m in (plain, other)
    )
    for name in one.names:
        shape = plain.get_parameter(name).shape
        torch.testing.assert_close(dense(two, name, shape), dense(one, name, shape))


def test_micro_batches_stand_for_their_union():
    problem = models.ZOO["decoder"](seeded(3))
    g = seeded(9)
    x, y = torch.randint(7, (4, 5), generator=g), labels(g, 7, 4, 5, ignore=0.4)
    whole = Problem(problem.model, [(x, y)], "cross_entropy")
    parts = Problem(problem.model, [(x[:1], y[:1]), (x[1:], y[1:])], "cross_entropy")
    one, two = (factors_of(p, fisher="exact") for p in (whole, parts))
    for name in one.names:
        shape = problem.model.get_parameter(name).shape
        torch.testing.assert_close(dense(two, name, shape), dense(one, name, shape), rtol=1e-8, atol=1e-10)


# -- where theory says it is Gauss-Newton -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        ("one layer, squared error", (4, 3), 8, "squared_error"),
        ("one layer, one datum", (4, 3), 1, "cross_entropy"),
        ("deep linear, one datum", (4, 5, 6, 3), 1, "cross_entropy"),
        ("deep linear, squared error", (4, 5, 6, 3), 7, "squared_error"),
    ],
    ids=lambda case: case[0],
)
def test_it_is_gauss_newton_where_theory_says_so(kind, case):
    _, sizes, data, loss = case
    g = seeded(5)
    model = perceptron(*sizes)
    y = real(g, data, sizes[-1]) if loss == "squared_error" else labels(g, sizes[-1], data)
    problem = Problem(model, [(real(g, data, sizes[0]), y)], loss)
    factors, wanted = factors_of(problem, kind=kind, fisher="exact"), true_blocks(problem)
    assert set(factors.names) == set(wanted)
    for name, block in wanted.items():
        shape = model.get_parameter(name).shape
        torch.testing.assert_close(dense(factors, name, shape), block, rtol=1e-9, atol=1e-10)
        damped = block + 0.1 * torch.eye(len(block), dtype=torch.float64)
        inverse = dense(factors, name, shape, power=-1.0, damping=0.1)
        torch.testing.assert_close(inverse, torch.linalg.inv(damped), rtol=1e-8, atol=1e-8)


def test_its_damped_inverse_is_curvlinops_own():
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    g = seeded(4)
    model = perceptron(4, 6, 5, activation=nn.GELU)
    x, y = real(g, 9, 4), labels(g, 5, 9)
    ours = factors_of(Problem(model, [(x, y)], "cross_entropy"), fisher="exact")
    parameters = list(model.parameters())
    theirs = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [(x, y)], fisher_type="type-2", check_deterministic=False
    )
    vectors = [real(g, *p.shape) for p in parameters]
    wanted = KFACInverseLinearOperator(theirs, damping=0.03, use_exact_damping=True) @ vectors
    got = ours.apply_inverse(dict(zip(ours.names, vectors, strict=True)), damping=0.03)
    for name, tensor in zip(ours.names, wanted, strict=True):
        torch.testing.assert_close(got[name], tensor)


def test_powers_and_damping_are_exact():
    problem = models.ZOO["mlp_classifier"](seeded(3))
    factors = factors_of(problem)
    shape = problem.model.get_parameter("0.weight").shape
    root = dense(factors, "0.weight", shape, power=-0.5, damping=0.2)
    inverse = dense(factors, "0.weight", shape, power=-1.0, damping=0.2)
    torch.testing.assert_close(root @ root, inverse)
    block = dense(factors, "0.weight", shape)
    torch.testing.assert_close(inverse @ (block + 0.2 * torch.eye(len(block), dtype=torch.float64)),
                               torch.eye(len(block), dtype=torch.float64))  # fmt: skip
    assert factors.apply({"no such": torch.zeros(1)}) == {}


# -- which layers -------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """nn.MultiheadAttention reads its output layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_layers_it_cannot_take_are_left_out(kind):
    tied = models.ZOO["decoder_tied"](seeded(3))
    assert not [n for n in factors_of(tied, kind=kind).names if "embedding" in n or "head" in n]
    assert factors_of(models.ZOO["repeated_module"](seeded(3)), kind=kind).names == (
        "head.weight",
        "head.bias",
    )
    assert not [n for n in factors_of(models.ZOO["frozen_layer"](seeded(3)), kind=kind).names if n[0] == "0"]
    g = seeded(1)
    problem = Problem(redraw(Attending(), g), [(real(g, 2, 3, 4), labels(g, 3, 2, 3))], "cross_entropy")
    assert factors_of(problem, kind=kind).names == ("head.weight", "head.bias")
    wide = models.ZOO["decoder"](seeded(3))
    partition = Partition.of(wide.model)
    assert not [n for n in kronecker_names(wide.model, partition, largest=8) if "mlp" in n]
    assert "head.weight" in kronecker_names(wide.model, partition, largest=8)


# -- what it leaves behind ----------------------------------------------------------------------------------


def hooks(model: nn.Module) -> list[int]:
    return [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]


class Breaking(nn.Module):
    """Fails behind its second layer: in its forward pass, or in the backward pass."""

    def __init__(self, backward: bool) -> None:
        super().__init__()
        self.first, self.second, self.backward = nn.Linear(3, 4), nn.Linear(4, 2), backward

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.backward:
            h.register_hook(self.fail)
        z = self.second(h)
        return z if self.backward else self.fail(z)

    def fail(self, _: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_failed_construction_leaves_no_hooks(kind, backward):
    g = seeded(1)
    model = redraw(Breaking(backward), g)
    model.first.register_forward_hook(lambda *_: None)  # the user's own stays
    before, theta = hooks(model), {n: p.data_ptr() for n, p in model.named_parameters()}
    problem = Problem(model, [(real(g, 5, 3), labels(g, 2, 5))], "cross_entropy")
    elsewhere = {n: p.detach() + 1 for n, p in model.named_parameters()}
    with pytest.raises(ArithmeticError):
        factors_of(problem, kind=kind, parameters=elsewhere)
    assert hooks(model) == before
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == theta


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_the_global_generator_stay_as_they_were(kind):
    g = seeded(1)
    model = redraw(nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 4)), g)
    model.train()
    model[2].eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    factors_of(Problem(model, [(real(g, 7, 3), labels(g, 4, 7))], "cross_entropy"), kind=kind)
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in before.items())
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state()) and not any(hooks(model))


def test_it_can_be_built_at_other_parameters_than_the_models_own():
    problem = models.ZOO["decoder_ragged"](seeded(3))
    there = models.ZOO["decoder_ragged"](seeded(8))
    theta = {n: p.detach().clone() for n, p in there.model.named_parameters()}
    kept = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    got = factors_of(problem, parameters=theta)
    wanted = factors_of(Problem(there.model, problem.batches, problem.loss))
    assert got.traces() == wanted.traces()
    assert all(torch.equal(p, kept[n]) for n, p in problem.model.named_parameters())


def test_draws_depend_on_the_generator_alone_and_factors_survive_saving():
    problem = models.ZOO["decoder_ragged"](seeded(3))
    one, same, other = (factors_of(problem, seed) for seed in (0, 0, 1))
    assert one.traces() == same.traces() != other.traces()
    again = KroneckerFactors.from_state_dict(one.state_dict())
    g = {n: real(seeded(1), *p.shape) for n, p in problem.model.named_parameters()}
    for name, x in one.apply_inverse(g, damping=0.1).items():
        assert torch.equal(x, again.apply_inverse(g, damping=0.1)[name])


def test_its_cost_counts_passes_and_sums_of_outer_products():
    g = seeded(1)
    problem = Problem(
        perceptron(4, 4, 4, bias=False), [(real(g, 9, 4), labels(g, 4, 9))] * 2, "cross_entropy"
    )
    assert factors_of(problem).gradient_equivalents == pytest.approx(2 * (1 + 2 / 3))
    assert factors_of(problem, kind="ekfac").gradient_equivalents == pytest.approx(4 * (1 + 2 / 3))
    assert factors_of(problem, samples=3).gradient_equivalents == pytest.approx(2 * (7 / 3 + 4 / 3))


# -- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "kfak"}, "no Kronecker factorisation named 'kfak'.*kfac, ekfac"),
        ({"fisher": "type-2"}, "no fisher named 'type-2'.*mc, exact, empirical"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"largest": 2}, "an nn.Linear with sides up to 2, trained"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        factors_of(models.ZOO["mlp_classifier"](seeded(3)), **options)


def test_a_loss_it_does_not_know_and_a_layer_outside_are_named():
    with pytest.raises(UserError, match="takes the losses cross_entropy, squared_error, .*, got logcosh"):
        factors_of(models.ZOO["custom_loss"](seeded(3)))
    g = seeded(1)
    model = perceptron(3, 4)
    model.add_module("aside", nn.Linear(2, 2).double())
    model.forward = lambda x: model[0](x)
    with pytest.raises(UserError, match="takes no part in the outputs; freeze it"):
        factors_of(Problem(model, [(real(g, 5, 3), labels(g, 4, 5))], "cross_entropy"))


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_must_be_positive(damping):
    factors = factors_of(models.ZOO["mlp_classifier"](seeded(3)))
    with pytest.raises(UserError, match="must be above 0"):
        factors.apply_inverse({}, damping=damping)


def test_factors_that_are_not_finite_stop_the_run():
    g = seeded(1)
    problem = Problem(perceptron(3, 4), [(real(g, 5, 3) * 1e200, real(g, 5, 4))], "squared_error")
    with pytest.raises(RunFailed, match="not finite"):
        factors_of(problem)


class Twice(nn.Module):
    """Calls its only linear layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_that_can_be_factored_is_said(kind):
    """Not an empty stand-in for G, which would be taken for a curvature of zero."""
    model = Twice().double()
    batch = (torch.randn(2, 4, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.long))
    partition = Partition.of(model, "parameter")
    with pytest.raises(
        UserError, match=r"called once in a forward pass. Of Twice's, inner.weight, inner.bias"
    ):
        kronecker_factors(Objective(model), batch, partition, kind=kind, generator=seeded(0))


def test_a_curvlinops_that_has_changed_is_named(monkeypatch):
    import curvlinops

    monkeypatch.delattr(curvlinops.EKFACLinearOperator, "compute_eigenvalue_correction")
    with pytest.raises(
        UserError, match=r"no EKFACLinearOperator.compute_eigenvalue_correction; .*>=3.0.1,<4"
    ):
        factors_of(models.decoder(seeded(0)))
    monkeypatch.delattr(curvlinops, "KFACLinearOperator")
    with pytest.raises(UserError, match=r"curvlinops 3\S* has no KFACLinearOperator;"):
        factors_of(models.decoder(seeded(0)))
