"""The checks of a row by themselves: what chance explains and what it does not, precision, a model's own loss, traces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.measuring.undisturbed import undisturbed
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.row_checks import Checked, RowChecks
from hessprobe.problem.trained_loss import Trained

CLASSES, WIDTH = 7, 16


class Net(nn.Module):
    """Residual layers with dropout, whose losses are neither small nor near chance."""

    def __init__(self, dropout: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, WIDTH, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(3))
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(WIDTH, CLASSES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for layer in self.layers:
            h = h + self.dropout(torch.tanh(layer(h)))
        return self.head(h)


def net(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(dropout, dtype)


def batch(sequences: int = 16, positions: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(CLASSES, (sequences, positions), generator=generator)
    return x, (3 * x + 1).fmod(CLASSES)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def check(model: nn.Module, batches: list[Any], trained: Any = None, **options: Any) -> Checked:
    objective = Objective(model, **options)
    return RowChecks(objective, Partition.of(model, "module"), undisturbed).check(batches, None, trained)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_chance_refuses_no_mask_and_hides_no_sixth_of_the_loss(dropout, sequences):
    model, (x, y) = net(dropout), batch(sequences)
    for seed in range(25):
        torch.manual_seed(seed)
        with torch.no_grad():
            loss = loss_of(model, x, y)
        check(model, [(x, y)], loss)
        if sequences == 16:
            with pytest.raises(UserError, match="the loss measured is not the loss trained"):
                check(model, [(x, y)], loss * 1.17)


@pytest.mark.parametrize("sign", [-1, 1])
def test_six_per_cent_are_no_chance_of_small_dropout(sign):
    model, (x, y) = net(0.1), batch(64)
    torch.manual_seed(3)
    with torch.no_grad():
        loss = loss_of(model, x, y)
    check(model, [(x, y)], loss)
    with pytest.raises(UserError, match="the loss measured is not the loss trained"):
        check(model, [(x, y)], loss * (1 + 0.06 * sign))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_chance_a_thousandth_is_another_loss(dtype):
    model, (x, y) = net(dtype=dtype), batch()
    with torch.no_grad():
        loss = loss_of(model, x, y).double()
    found = check(model, [(x, y)], loss.item())
    assert found.loss_trained == pytest.approx(found.loss_whole_batch, rel=1e-6)
    assert found.activation_bits == torch.finfo(dtype).bits
    with pytest.raises(UserError, match="passed as loss="):
        check(model, [(x, y)], loss.item() * 1.003)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_explains_its_own_rounding_alone(dropout):
    model, (x, y) = net(dropout), batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, x, y)
    check(model, [(x, y)], loss)
    with pytest.raises(UserError, match="the loss measured is not the loss trained"):
        check(model, [(x, y)], loss * 1.2)


def test_half_precision_parameters_are_trained_in_half_precision():
    model, (x, y) = net().bfloat16(), batch()
    with torch.no_grad():
        loss = loss_of(model, x, y)
    theta = torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])
    objective, partition = Objective(model), Partition.of(model, "module")
    for given in (loss, loss.bfloat16()):
        RowChecks(objective, partition, undisturbed).check([(x, y)], theta, given)
    with pytest.raises(UserError, match="the loss measured is not the loss trained"):
        RowChecks(objective, partition, undisturbed).check([(x, y)], theta, loss * 1.06)


def test_a_loss_of_after_the_step_is_compared_with_nothing():
    model, (x, y) = net(), batch()
    checks = RowChecks(Objective(model), Partition.of(model, "module"), undisturbed)
    assert checks.check([(x, y)], None, 7.0, before=False).loss_trained == 7.0
    with pytest.raises(UserError):
        checks.check([(x, y)], None, 7.0)


class WithOwnLoss(Net):
    """Gives its own loss for labels, as models of transformers do."""

    def __init__(self, scale: float) -> None:
        super().__init__(0.1)
        self.scale = scale

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        z = super().forward(x)
        loss = None if labels is None else self.scale * F.cross_entropy(z.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=z, loss=loss)


def test_a_models_own_loss_is_ours_or_the_row_says_both():
    x, y = batch()
    torch.manual_seed(0)
    check(WithOwnLoss(1.0), [{"x": x, "labels": y}])
    with pytest.raises(UserError, match="own"):
        check(WithOwnLoss(0.9), [{"x": x, "labels": y}])


def test_micro_batches_of_other_sizes_are_weighed_either_way():
    model, whole = net(), batch(12)
    micro = [(x, y) for x, y in zip(whole[0].split([10, 2]), whole[1].split([10, 2]), strict=True)]
    with torch.no_grad():
        each = [loss_of(model, x, y) for x, y in micro]
        over_tokens = loss_of(model, *whole)
    for given in (each, sum(each) / 2, over_tokens, [each[0] / 2, each[1] / 2]):
        check(model, micro, given)
    with pytest.raises(UserError, match="last of 2 micro-batches"):
        check(model, micro, each[1])


@pytest.mark.parametrize("given", ["2.3", {"loss": 1.0}, object()])
def test_what_is_no_loss_is_refused(given):
    with pytest.raises(UserError, match="loss=: wanted"):
        Trained.of(given)


@pytest.mark.parametrize("given", [float("nan"), torch.tensor(float("inf"))])
def test_an_overflow_of_half_precision_is_compared_with_nothing(given):
    model, (x, y) = net(), batch()
    assert check(model, [(x, y)], given).loss_whole_batch > 0


def test_a_checked_model_is_as_it_was():
    model, (x, y) = net(0.3), batch()
    modes = {module: module.training for module in model.modules()}
    state, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in model.modules()]
    with torch.no_grad():
        loss = loss_of(model, x, y)
    torch.set_rng_state(state)
    check(model, [(x, y)], loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert {module: module.training for module in model.modules()} == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


class Masked(nn.Module):
    """Attention whose mask, and positions, are given with the batch: (t, t) and (t,)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(CLASSES, WIDTH), nn.Embedding(32, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None, at: Tensor | None) -> Tensor:
        h = self.embedding(x)
        h = h if at is None else h + self.positions(at)
        return self.head(F.scaled_dot_product_attention(h, h, h, attn_mask=mask))


@pytest.mark.parametrize("kind", ["mask", "position ids"])
@pytest.mark.parametrize("sequences", [6, 4])
def test_an_entry_of_positions_is_never_cut_as_one_of_sequences(kind, sequences):
    torch.manual_seed(0)
    model, (x, y) = Masked(), batch(sequences, 6)
    mask = torch.ones(6, 6).tril().bool() if kind == "mask" else None
    at = torch.arange(6) if kind == "position ids" else None
    options: dict[str, Any] = {"forward": lambda m, b: m(b[0], b[2], b[3]), "targets": lambda b: b[1]}
    if sequences == 4:
        assert check(model, [(x, y, mask, at)], **options).loss_whole_batch > 0
        return
    with pytest.raises(UserError, match=r"as many sequences as positions \(6\)"):
        check(model, [(x, y, mask, at)], **options)
    objective = Objective(model, **options)
    assert len(objective.split((x, y, mask, at), 2)) == 1


class PositionsFirst(nn.Module):
    """A recurrent network with its state in the batch and outputs of one dimension for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(CLASSES, WIDTH), nn.RNN(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x), hidden)[0]).view(-1, CLASSES)


def test_sequences_that_cannot_be_cut_out_are_seen_to_be_apart_all_the_same():
    torch.manual_seed(0)
    model, (x, y) = PositionsFirst(), batch(4, 5)
    given = x.T.contiguous(), y.T.reshape(-1), torch.randn(1, 4, WIDTH)
    options: dict[str, Any] = {
        "forward": lambda m, b: m(b[0], b[2]).view(*b[0].shape, CLASSES),
        "targets": lambda b: b[1].view_as(b[0]),
    }
    found = check(model, [given], batch_first=False, **options)
    assert found.notes == () and found.loss_whole_batch > 0
    with pytest.raises(UserError, match="pass batch_first=False"):
        check(model, [given], **options)
    flat: dict[str, Any] = {"forward": lambda m, b: m(b[0], b[2]), "targets": lambda b: b[1]}
    with pytest.raises(UserError, match="pass batch_first=False"):
        check(model, [given], **flat)
    with pytest.raises(
        UserError, match=r"\(20, 7\) do not fit targets \(20,\): with batch_first=False.*view_as"
    ):
        check(model, [given], batch_first=False, **flat)


def test_a_batch_of_which_no_sequence_can_be_moved_is_noted():
    class Held:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

    found = check(net(), [Held(*batch())], forward=lambda m, b: m(b.x), targets=lambda b: b.y)
    assert (
        len(found.notes) == 1 and "sequences unverified" in found.notes[0] and "batch_first" in found.notes[0]
    )


def test_outputs_that_show_nothing_of_sequences_that_cannot_be_cut_are_noted():
    torch.manual_seed(0)
    model, (x, y) = PositionsFirst(), batch(4, 5)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    found = check(
        model, [(x.T.contiguous(), y.T.reshape(-1), torch.randn(1, 4, WIDTH))], batch_first=False,
        forward=lambda m, b: m(b[0], b[2]).view(*b[0].shape, CLASSES), targets=lambda b: b[1].view_as(b[0]),
    )  # fmt: skip
    assert len(found.notes) == 1 and "sequences unverified" in found.notes[0]


@pytest.mark.parametrize(
    ("amount", "said"), [(3e-4, r"differ by 0\.0\d*[1-9]% "), (0.3, r"differ by \d+\.\d% ")]
)
def test_however_little_sequences_see_of_each_other_it_is_said_in_a_digit_at_least(amount, said):
    class Seeing(Net):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return z + amount * z.mean(0)

    torch.manual_seed(0)
    with pytest.raises(UserError, match=said):
        check(Seeing(0.0), [batch()])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("passed", ["mean of means", "list", "over tokens"])
def test_a_mean_over_micro_batches_of_unequal_tokens_is_said(dropout, passed):
    model, (x, y) = net(dropout).eval(), batch(12)
    y[4:, 2:] = -100
    micro = [(x[:4], y[:4]), (x[4:], y[4:])]
    with torch.no_grad():
        each = [loss_of(model, x, y) for x, y in micro]
        given = {"mean of means": sum(each) / 2, "list": each, "over tokens": loss_of(model, x, y)}[passed]
    notes = check(model, micro, given).notes
    assert [("mean of their means" in note) for note in notes] == [True] * (passed != "over tokens")


def test_a_loss_without_curvature_in_the_outputs_is_noted():
    model, x = nn.Linear(3, 1), torch.randn(8, 3)
    (note,) = check(model, [(x, x[:, :1])], loss=nn.L1Loss()).notes
    assert "Gauss-Newton matrix is 0" in note
    assert check(model, [(x, x[:, :1])], loss=nn.MSELoss()).notes == ()


def test_words_for_batch_statistics_name_no_argument_that_was_not_given():
    model, (x, y) = net(), batch()
    model.dropout = nn.BatchNorm1d(32)
    (note,) = check(model, [(x, y)]).notes
    assert "another function" in note and "leave out loss=" not in note


@pytest.mark.parametrize("returned", ["tuple", "object"])
def test_a_forward_that_picks_nothing_out_is_told(returned):
    model, given = net(), batch()
    wrap = (lambda z: (z, None)) if returned == "tuple" else (lambda z: SimpleNamespace(logits=z))
    with pytest.raises(UserError, match=r"forward= returned .*: wanted a tensor.*model\(batch\[0\]\)\[0\]"):
        check(model, [given], forward=lambda m, b: wrap(m(b[0])), targets=lambda b: b[1])
