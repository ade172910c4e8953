"""The loss is the mean over tokens with a target, whatever the batches look like; what does not fit is said."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.problem import splitting
from hessprobe.problem.measuring import measuring
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case
from tests.models import IGNORED, labels, real, redraw

NAMES = ("mlp_regression", "mlp_classifier", "frozen_layer", "custom_loss", "decoder_tied", "decoder_ragged")


def classifier(seed: int = 0, **options) -> tuple[nn.Module, Objective]:
    model = redraw(nn.Linear(3, 4), models.seeded(seed))
    return model, Objective(model, **options)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_the_dense_truths(name, zoo_case):
    case = zoo_case(name)
    loss, gradient = case.objective.gradient(case.problem.batches, case.partition)
    assert float(loss) == pytest.approx(float(case.truth.loss), rel=1e-12)
    assert oracles.relative_error(gradient, case.truth.gradient) < 1e-10
    assert not loss.requires_grad and not gradient.requires_grad
    assert float(case.objective.loss(case.problem.batches).detach()) == pytest.approx(float(loss), rel=1e-12)
    assert case.objective.tokens(case.problem.batches) == case.truth.tokens


def test_micro_batches_are_weighted_by_their_tokens_not_by_their_number(zoo_case):
    case = zoo_case("decoder_ragged")
    objective, batches = case.objective, case.problem.batches
    counts = [objective.tokens(batch) for batch in batches]
    assert len(set(counts)) > 1
    losses = [float(objective.loss(batch).detach()) for batch in batches]
    weighted = sum(n * loss for n, loss in zip(counts, losses, strict=True)) / sum(counts)
    assert float(objective.loss(batches).detach()) == pytest.approx(weighted, rel=1e-12)


def test_a_micro_batch_without_a_target_counts_nothing():
    g = models.seeded(1)
    _, objective = classifier()
    batch = (real(g, 5, 3), labels(g, 4, 5))
    empty = (real(g, 3, 3), torch.full((3,), IGNORED))
    assert float(objective.loss([batch, empty]).detach()) == float(objective.loss(batch).detach())


def test_loss_at_other_parameters_leaves_the_models_own_alone(zoo_case):
    case = zoo_case("mlp_classifier")
    own = case.partition.vector(case.problem.model)
    moved = own + case.rows(1)[0]
    parameters = case.partition.unflatten(moved)
    with torch.no_grad():
        loss = case.objective.loss(case.problem.batches, parameters)
    wanted = oracles.dense(*case.problem, theta=parameters)
    assert float(loss) == pytest.approx(float(wanted.loss), rel=1e-12)
    assert torch.equal(case.partition.vector(case.problem.model), own)


def test_a_dataloaders_list_of_two_tensors_is_one_batch():
    g = models.seeded(1)
    _, objective = classifier()
    batch = (real(g, 5, 3), labels(g, 4, 5))
    assert torch.equal(objective.loss(list(batch)), objective.loss(batch))
    assert objective.tokens(list(batch)) == 5


def test_another_ignore_index():
    g = models.seeded(1)
    model, objective = classifier(ignore_index=2)
    x, y = real(g, 6, 3), torch.tensor([0, 1, 2, 3, 2, 2])
    assert objective.tokens((x, y)) == 3
    wanted = nn.functional.cross_entropy(model(x), y, ignore_index=2)
    torch.testing.assert_close(objective.loss((x, y)), wanted)


def test_forward_and_targets_take_any_batch_apart():
    g = models.seeded(1)
    model = redraw(nn.Linear(3, 4), g)
    objective = Objective(
        model, forward=lambda model, batch: model(batch.features), targets=lambda batch: batch.classes
    )

    class Sample:
        features, classes = real(g, 5, 3), labels(g, 4, 5)

    wanted = nn.functional.cross_entropy(model(Sample.features), Sample.classes)
    torch.testing.assert_close(objective.loss(Sample), wanted)


def test_a_one_column_regression_needs_no_class_dimension():
    g = models.seeded(1)
    model = redraw(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), g)
    x, y = real(g, 5, 3), real(g, 5)
    loss = Objective(model, loss="squared_error").loss((x, y))
    torch.testing.assert_close(loss, 0.5 * (model(x) - y).square().mean())


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.5, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


class TestHuggingFace:
    """A mapping with labels: shifted by one for a causal model, as its own forward does."""

    def batch(self, seed: int, ignored: int) -> dict[str, Tensor]:
        g = models.seeded(seed)
        tokens = torch.randint(11, (2, 6), generator=g)
        wanted = tokens.clone()
        wanted[1, 6 - ignored :] = IGNORED
        mask = torch.ones_like(tokens)
        mask[1, 6 - ignored :] = 0
        return {"input_ids": tokens, "attention_mask": mask, "labels": wanted}

    def test_the_loss_is_the_models_own(self, gpt2):
        batch = self.batch(1, 2)
        objective = Objective(gpt2)
        with measuring(gpt2), torch.no_grad():
            torch.testing.assert_close(objective.loss(batch), gpt2(**batch).loss)
        assert objective.tokens(batch) == 5 + 3

    def test_several_batches_are_weighted_by_shifted_tokens(self, gpt2):
        batches = [self.batch(1, 4), self.batch(2, 1)]
        with measuring(gpt2), torch.no_grad():
            losses = [float(gpt2(**batch).loss) for batch in batches]
            found = float(Objective(gpt2).loss(batches))
        assert found == pytest.approx((6 * losses[0] + 9 * losses[1]) / 15, rel=1e-5)

    def test_a_pair_of_inputs_and_targets_is_not_shifted(self, gpt2):
        tokens = self.batch(1, 0)["input_ids"]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        with measuring(gpt2), torch.no_grad():
            wanted = gpt2(input_ids=tokens, labels=tokens).loss
            torch.testing.assert_close(Objective(gpt2).loss((inputs, targets)), wanted)

    def test_its_layers_are_known_and_its_head_is_tied(self, gpt2):
        assert Partition.of(gpt2).blocks == ("embedding+head", "block.0", "block.1")

    def test_its_gradient_is_autograds(self, gpt2):
        model = copy.deepcopy(gpt2).eval()
        batch, partition = self.batch(3, 2), Partition.of(gpt2)
        _, gradient = Objective(gpt2).gradient(batch, partition)
        model(**batch).loss.backward()
        wanted = torch.cat([model.get_parameter(name).grad.reshape(-1) for name in partition.names])
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


class TestMeasuring:
    """While something is measured the model is deterministic; afterwards it is as before, errors included."""

    @pytest.mark.parametrize("fails", [False, True])
    def test_modes_come_back_module_by_module(self, fails):
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
        model[0].eval()
        before = [module.training for module in model.modules()]
        try:
            with measuring(model):
                assert not any(module.training for module in model.modules())
                assert torch.is_grad_enabled()
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert [module.training for module in model.modules()] == before

    def test_it_differentiates_where_the_caller_does_not(self):
        case = Case.of("mlp_classifier")
        with torch.no_grad():
            _, gradient = case.objective.gradient(case.problem.batches, case.partition)
            assert not torch.is_grad_enabled()
        assert oracles.relative_error(gradient, case.truth.gradient) < 1e-10


BAD = {
    "no batch": ([], "no batch given"),
    "all ignored": ((torch.zeros(2, 3).double(), torch.full((2,), IGNORED)), "no token carries a target"),
    "one tensor": (torch.zeros(2, 3), r"wanted a batch \(inputs, targets\).*got Tensor.*targets="),
    "no labels": ({"x": torch.zeros(2, 3)}, "keys x but no 'labels'; pass targets="),
    "lengths": (
        (torch.zeros(2, 3).double(), torch.zeros(5).long()),
        r"outputs \(2, 4\) .*do not fit targets \(5,\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_batch_that_does_not_fit_is_told_with_the_way_out(case):
    batch, message = BAD[case]
    _, objective = classifier()
    with pytest.raises(UserError, match=message):
        objective.loss(batch)


def test_a_model_without_a_tensor_of_outputs_is_told():
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    with pytest.raises(UserError, match=r"Pair returned tuple.*\.logits; pass forward="):
        Objective(Pair(3, 4)).loss((torch.zeros(2, 3), torch.zeros(2).long()))


def test_an_unknown_loss_is_named_with_the_valid_ones():
    with pytest.raises(UserError, match="no loss named 'crossentropy'.*cross_entropy, squared_error"):
        classifier(loss="crossentropy")


def test_a_reduced_loss_function_is_told():
    _, objective = classifier(loss=lambda z, y: nn.functional.cross_entropy(z, y))
    with pytest.raises(UserError, match="wanted one loss per token.*unreduced"):
        objective.loss((torch.zeros(2, 3).double(), torch.zeros(2).long()))


def test_outputs_that_are_all_zero_do_not_settle_whether_sequences_see_each_other():
    """A head that starts at zero: its batches are cut, now and when it has moved."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5)).double()
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    objective, tokens = Objective(model), torch.arange(12).reshape(4, 3) % 5
    for _ in range(2):
        assert [len(x) for x, _ in objective.split((tokens, tokens), 2)] == [2, 2]
        torch.nn.init.normal_(model[1].weight, generator=torch.Generator().manual_seed(0))


def passes(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns what will list the sequences of every pass through the objective's model."""
    seen, outputs = [], objective.outputs

    def noted(batch, *given):
        seen.append(len(batch[0]))
        return outputs(batch, *given)

    monkeypatch.setattr(objective, "outputs", noted)
    return seen


@pytest.mark.parametrize(("most", "sizes"), [(8192, [5]), (12, [3, 2]), (8, [2, 2, 1]), (3, [1] * 5)])
def test_a_long_batch_goes_through_the_model_in_pieces(monkeypatch, zoo_case, most, sizes):
    """Even ones of at most so many positions, a sequence at least; loss and gradient are the whole batch's."""
    case = zoo_case("decoder")
    draws = models.seeded(4)
    batch = (torch.randint(7, (5, 4), generator=draws), labels(draws, 7, 5, 4, ignore=0.3))
    batch[1][4] = IGNORED  # a piece without a target
    theta = case.partition.vector(case.problem.model)
    loss, gradient = case.objective.gradient(batch, case.partition, case.partition.unflatten(1.1 * theta))
    monkeypatch.setattr(splitting, "POSITIONS_AT_ONCE", most)
    objective = Objective(case.problem.model, loss=case.problem.loss)
    assert [len(inputs) for inputs, _ in objective.pieces(batch)] == sizes
    seen = passes(objective, monkeypatch)
    again = objective.gradient(batch, case.partition, case.partition.unflatten(1.1 * theta))
    assert seen == sizes
    torch.testing.assert_close(again, (loss, gradient), rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        named = case.partition.unflatten(1.1 * theta)
        torch.testing.assert_close(objective.loss([batch, batch], named), loss, rtol=1e-12, atol=0)
    assert seen == 3 * sizes


def test_whether_a_long_batch_can_be_cut_is_seen_from_a_part_of_it(monkeypatch, zoo_case):
    case, (inputs, targets) = zoo_case("decoder"), (torch.zeros(9, 4, dtype=torch.long),) * 2
    monkeypatch.setattr(splitting, "POSITIONS_AT_ONCE", 12)
    objective = Objective(case.problem.model)
    seen = passes(objective, monkeypatch)
    assert len(objective.pieces((inputs, targets))) == 3
    assert sum(seen) == 6 and max(seen) == 3
