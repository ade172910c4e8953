"""Passes through a model: the same kernels however the model is run, batched or wrapped, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hessprobe.errors import UserError
from hessprobe.kernels.layer_kernels import layer_kernels
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, first_plan
from hessprobe.kernels.stream import Stream
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.kernels.plain import relative, streamed
from tests.kernels.stream_settings import VOCABULARY, Bare, Mixed, Outside, Setting, text, tiny
from tests.models import IGNORED, redraw, seeded

# -- the truth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layer", "module", "parameter"])
@pytest.mark.parametrize("plan", [None, "fast", ONE_SEQUENCE, MASKED])
def test_decoder_kernels_equal_plain_autograd(by, plan):
    setting = Setting(tiny(layers=2, mlp="swiglu"), by=by)
    assert relative(setting.kernel(plan), setting.truth()) < 1e-11


def test_all_labels_enumerated_reproduce_dense_gauss_newton():
    """One token with a target per sequence, round r its label r weighted by sqrt(p_r): sum_m w_m w_m^T = N G."""
    model = tiny()
    tokens = torch.randint(VOCABULARY, (4, 3), generator=seeded(3))
    targets = torch.full((4, 3), IGNORED)
    targets[torch.arange(4), torch.tensor([2, 1, 2, 0])] = 1
    batches = [(tokens[:1], targets[:1]), (tokens[1:], targets[1:])]
    partition = Partition.of(model, "parameter")

    def cotangents(number: int, y: int, outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        hot = torch.eye(VOCABULARY, dtype=p.dtype)[y]
        return (p - hot) * p[:, y : y + 1].sqrt() * (targets != IGNORED)[:, None]

    truth = oracles.dense(model, batches, "cross_entropy").in_order(partition.names).gauss_newton
    slices = list(partition.slices.values())
    objective = Objective(model)
    plan = verified_plan(objective, batches[1], partition)
    along = torch.randn(partition.size, generator=seeded(5), dtype=torch.float64)
    stream = Stream(objective, partition, plan, theta=None, along={"v": along})
    found = stream.run(objective.counted(list(batches)), VOCABULARY, cotangents)
    k = found.kernel
    fro2 = torch.einsum("imn,jmn->ij", k, k) / 4**2
    assert relative(fro2, oracles.block_fro2(truth, slices)) < 1e-10
    trace = torch.stack([truth[i, i].trace() for i in slices])
    assert torch.allclose(k.diagonal(dim1=1, dim2=2).sum(1) / 4, trace, rtol=1e-10)
    # And curvature along a direction, G_ij between two blocks: v_i . G_ij v_j.
    curvature = found.alignment["v"] @ found.alignment["v"].mT / 4
    wanted = torch.stack([torch.stack([along[i] @ truth[i, j] @ along[j] for j in slices]) for i in slices])
    assert relative(curvature, wanted) < 1e-10
    eigenvalues = torch.linalg.eigvalsh(k.sum(0) / 4).flip(0)
    assert torch.allclose(eigenvalues[:5], torch.linalg.eigvalsh(truth).flip(0)[:5], rtol=1e-10)


def test_parameters_given_are_the_ones_measured():
    setting = Setting(tiny())
    other = copy.deepcopy(setting.model)
    redraw(other, seeded(9))
    theta = setting.partition.unflatten(setting.partition.vector(other))
    before = setting.partition.vector(setting.model)
    assert relative(setting.kernel(theta=theta), setting.truth(other)) < 1e-11
    assert torch.equal(before, setting.partition.vector(setting.model))


# -- batches and rounds ------------------------------------------------------------------------------------


def test_micro_batches_equal_one_batch():
    model = tiny()
    whole = text((5, 4))
    one = Setting(model, whole)
    parts = Setting(model, [(x[i], y[i]) for x, y in whole for i in (slice(0, 2), slice(2, 3), slice(3, 5))])
    drawn = one.cotangents.drawn[0]
    parts.cotangents.drawn = [[c[i] for c in drawn] for i in (slice(0, 2), slice(2, 3), slice(3, 5))]
    # One batch: (round, sequence). Micro-batches: (micro-batch, round, sequence).
    order = [r * 5 + b for i in ((0, 1), (2,), (3, 4)) for r in range(2) for b in i]
    assert relative(parts.kernel(), one.kernel()[:, order][:, :, order]) < 1e-11


def test_rounds_share_one_forward():
    setting = Setting(tiny(), rounds=4)
    plan = setting.plan()
    assert not plan.fallback
    calls = []
    handle = setting.model.register_forward_hook(lambda *_: calls.append(1))
    setting.kernel(plan)
    handle.remove()
    assert len(calls) == len(setting.batches)


def test_blocks_do_not_change_what_is_computed():
    """Coarser blocks' kernels are the sums of finer ones'."""
    fine, coarse = Setting(tiny()), Setting(tiny(), by="layer")
    block = {slot.name: coarse.partition.blocks.index(slot.block) for slot in coarse.partition.slots}
    k, summed = fine.kernel(), torch.zeros(len(coarse.partition), 10, 10, dtype=torch.float64)
    for slot, mine in zip(fine.partition.slots, k, strict=True):
        summed[block[slot.name]] += mine
    assert relative(coarse.kernel(), summed) < 1e-11


# -- ways to run a model -----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Runs a module under activation checkpointing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return checkpoint(self.module, *inputs, use_reentrant=False)


@pytest.mark.parametrize("given", [False, True], ids=["own parameters", "given parameters"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_activation_checkpointing_changes_nothing(tied, given):
    """Tied: the embedding falls back, so graphs start inside the checkpoint. Given: recomputed with them, too."""
    model = tiny(layers=2, tied=tied)
    wrapped = copy.deepcopy(model)
    for i, block in enumerate(wrapped.blocks):  # type: ignore[arg-type]
        wrapped.blocks[i] = Checkpointed(block)  # type: ignore[index]
    plain, setting = Setting(model), Setting(wrapped)
    plan = setting.plan()
    assert set(plan.routes.values()) <= {"linear", "layer norm", "rms norm", "embedding", ONE_SEQUENCE}
    assert len(plan.fallback) == tied
    shift = torch.randn(plain.partition.size, generator=seeded(8), dtype=torch.float64)
    theta = plain.partition.vector(model) + 0.3 * shift
    options = [{"theta": s.partition.unflatten(theta)} if given else {} for s in (setting, plain)]
    assert relative(setting.kernel(plan, **options[0]), plain.kernel(**options[1])) < 1e-11


def test_a_checkpoint_around_the_first_layer_changes_nothing():
    first, rest = nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 3))
    model = redraw(
        nn.Sequential(nn.Sequential(Checkpointed(nn.Sequential(first, nn.Tanh()))), rest), seeded(1)
    )
    batches = [(torch.randn(n, 4, generator=seeded(n)).double(), torch.zeros(n, 3).double()) for n in (3, 2)]
    setting = Setting(model, batches, loss="squared_error")
    plan = setting.plan()
    assert not plan.fallback
    assert relative(setting.kernel(plan), setting.truth()) < 1e-11


def test_compiled_blocks_change_nothing():
    model = tiny(layers=2)
    plain = Setting(model)
    wanted = plain.truth()
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:  # type: ignore[union-attr]
        block.compile(backend="eager")
    setting = Setting(compiled)
    plan = setting.plan()
    assert not plan.fallback
    assert relative(setting.kernel(plan), wanted) < 1e-11


def test_fused_attention_changes_nothing():
    model, batches, _ = models.fused_attention(seeded(0))
    setting = Setting(model, batches)
    plan = setting.plan()
    assert plan.fallback == ("positions",)
    assert relative(setting.kernel(plan), setting.truth()) < 1e-11


def test_dropout_is_off_and_on_again_after():
    model = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Dropout(0.5), nn.Linear(4, VOCABULARY))
    redraw(model, seeded(1)).train()
    model[1].eval()
    model[1].train()
    setting = Setting(model)
    assert relative(setting.kernel(), setting.truth()) < 1e-11
    assert model.training and model[1].training


# -- parameters without a path of their own ----------------------------------------------------------------


class Twice(nn.Module):
    """A module run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(self.embedding(x))))))


class Transposed(nn.Module):
    """Modules that see positions first, sequences second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(x.mT))).transpose(0, 1))


class Unused(nn.Module):
    """A module that is never called, one whose result is thrown away, a parameter nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.pooler, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.empty(3))
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        self.aside(h)
        return self.head(h)


class Changed(nn.Module):
    """A module's input is changed in place after the module has read it, and another's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        y = self.body(h)
        h = h.add_(y.detach()) if not self.body.weight.requires_grad else h + y.detach()
        return self.head(torch.nn.functional.relu(y + h, inplace=True))


class Zero(Outside):
    """Used outside, but hidden at the start: a head of zeros lets no gradient through."""


FALLBACKS: dict[str, tuple[Callable[[], nn.Module], set[str], str]] = {
    "bare": (Bare, {"positions", "matrix"}, ONE_SEQUENCE),
    "twice": (Twice, {"body.weight", "body.bias"}, ONE_SEQUENCE),
    "outside": (Outside, {"body.weight", "body.bias"}, ONE_SEQUENCE),
    "mixed": (Mixed, {"body.weight", "body.bias", "embedding.weight"}, MASKED),
    "transposed": (Transposed, {"body.weight", "body.bias", "embedding.weight"}, ONE_SEQUENCE),
    "unused": (Unused, {"pooler.weight", "pooler.bias", "aside.weight", "aside.bias", "scale"}, ONE_SEQUENCE),
    "changed": (Changed, {"body.weight", "body.bias"}, ONE_SEQUENCE),
    "tied": (lambda: tiny(tied=True), {"embedding.weight"}, ONE_SEQUENCE),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_has_no_path_falls_back_and_is_exact(name):
    make, wanted, how = FALLBACKS[name]
    setting = Setting(redraw(make(), seeded(1)))
    plan = setting.plan()
    assert set(plan.fallback) == wanted and plan.how == how
    assert {plan.routes[n] for n in wanted} == {how}
    assert relative(setting.kernel(plan), setting.truth()) < 1e-11
    along = torch.randn(setting.partition.size, generator=seeded(4), dtype=torch.float64)
    found = streamed(
        setting.objective, setting.batches, setting.partition, setting.cotangents, plan, along={"v": along}
    )
    wanted_alignment = [setting.rows[:, i] @ along[i] for i in setting.partition.slices.values()]
    assert relative(found.alignment["v"], torch.stack(wanted_alignment)) < 1e-11


def test_sequences_as_long_as_the_batch_is_wide_do_not_pass_for_sequences():
    """Three sequences of three tokens: only the values tell a transposed module from a plain one."""
    setting = Setting(redraw(Transposed(), seeded(1)), text((3, 3)))
    plan = setting.plan()
    assert "body.weight" in plan.fallback
    assert relative(setting.kernel(plan), setting.truth()) < 1e-11


def test_a_zero_initialisation_does_not_prove_a_path():
    model = redraw(Zero(), seeded(1))
    nn.init.zeros_(model.head.weight)  # type: ignore[arg-type]
    setting = Setting(model)
    plan = setting.plan()
    assert set(plan.fallback) == {"body.weight", "body.bias"}


class Sometimes(nn.Module):
    """Calls a module twice where a token says so."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embedding(x))
        return self.head(self.body(h) if bool((x == 5).any()) else h)


def test_a_module_that_some_batch_calls_twice_leaves_the_plan():
    x = torch.randint(4, (3, 4), generator=seeded(1))
    setting = Setting(redraw(Sometimes(), seeded(1)), [(x, x), (torch.full_like(x, 5), x)])
    plan = setting.plan()
    assert not plan.fallback
    with pytest.raises(UserError, match=r"the Linear of body.weight, body.bias was not called exactly once"):
        setting.kernel(plan)
    kernels = layer_kernels(
        setting.objective, setting.batches, setting.partition, generator=seeded(6), plan=plan
    )
    assert {n for n, way in kernels.routes.items() if way == MASKED} == {"body.weight", "body.bias"}
    # As if the plan had been made so from the start, draws included.
    better = verified_plan(setting.objective, setting.batches[1], setting.partition)
    again = layer_kernels(
        setting.objective, setting.batches, setting.partition, generator=seeded(6), plan=better
    )
    assert relative(kernels.kernel, again.kernel) < 1e-11
    assert relative(setting.kernel(better), setting.truth()) < 1e-11


# -- nothing left behind -----------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> int:
    """Returns how many hooks hang on a model's modules."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


@pytest.mark.parametrize("make", [tiny, lambda: tiny(tied=True)], ids=["fast", "with fallback"])
def test_the_model_the_random_state_and_the_gradients_are_untouched(make):
    setting = Setting(make())
    model = setting.model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    identity = {name: id(p) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    setting.kernel()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {name: id(p) for name, p in model.named_parameters()} == identity
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert model.training and hooks_of(model) == 0 and torch.is_grad_enabled()


@pytest.mark.parametrize("where", ["forward", "cotangents", "backward"])
def test_an_exception_leaves_nothing_behind(where):
    setting = Setting(tiny())
    model, plan = setting.model.train(), setting.plan()
    identity = [id(p) for p in model.parameters()]

    def broken(number: int, r: int, outputs: Tensor, targets: Tensor) -> Tensor:
        if where == "cotangents":
            raise RuntimeError("broken")
        return torch.ones(1, 1) if where == "backward" else torch.zeros_like(outputs)

    handle = None
    if where == "forward":

        def fail(*_: Any) -> None:
            raise RuntimeError("broken")

        handle = model.head.register_forward_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError):
        batches = setting.objective.counted(list(setting.batches))
        Stream(setting.objective, setting.partition, plan, theta=None).run(batches, 1, broken)
    if handle is not None:
        handle.remove()
    assert hooks_of(model) == 0 and model.training
    assert [id(p) for p in model.parameters()] == identity
    assert relative(setting.kernel(plan), setting.truth()) < 1e-11


def test_measuring_inside_no_grad_works():
    setting = Setting(tiny())
    wanted = setting.truth()
    with torch.no_grad():
        assert relative(setting.kernel(), wanted) < 1e-11
        assert not torch.is_grad_enabled()


# -- bad input ---------------------------------------------------------------------------------------------


class Argmax(nn.Linear):
    """Outputs that no gradient reaches."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).detach()


def test_a_model_without_differentiable_outputs_is_refused_by_name():
    x, y = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    model = Argmax(4, 5)
    with pytest.raises(UserError, match=r"Argmax: its outputs do not depend on any of its 2 .* detach\(\)"):
        verified_plan(Objective(model), (x, y), Partition.of(model, "parameter"))


def test_nan_outputs_are_refused():
    setting = Setting(tiny())
    plan = setting.plan()
    with torch.no_grad():
        next(setting.model.parameters()).fill_(float("nan"))
    for attempt in (lambda: setting.kernel(plan), setting.plan):
        with pytest.raises(UserError, match="Decoder returned NaN for micro-batch 0"):
            attempt()
    assert hooks_of(setting.model) == 0


def test_the_first_plan_goes_by_types():
    model = tiny(tied=True)
    plan = first_plan(Objective(model), Partition.of(model))
    assert plan.fallback == ("embedding.weight",)
    assert set(plan.routes.values()) == {"linear", "layer norm", "rms norm", ONE_SEQUENCE}
