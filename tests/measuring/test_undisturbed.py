"""Training goes on bit for bit as without a recorder, whatever the model keeps between its forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hessprobe as hp
from tests.problem.stateful_models import STATES, D, Looped, Net, Recurrent, Stateful, TwoNames, V

PROBES: list[Any] = ["cross_layer", {"gn_hessian": {"samples": 2, "lanczos_steps": 2, "cg_iterations": 2}}]


class Carrying(nn.Module):
    """Truncated backpropagation through time: the hidden state of the last batch is the first of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.hidden = nn.LSTM(D, D, batch_first=True), None

    def forward(self, h: Tensor) -> Tensor:
        found, hidden = self.rnn(h, self.hidden)
        self.hidden = tuple(t.detach() for t in hidden)
        return found


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "two names":
        return TwoNames()
    body = {"looped": Looped, "recurrent": Recurrent, "carrying": Carrying, "spectral norm": spectral}
    return Net(body[kind]() if kind in body else Stateful(kind))


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))


def trained(model: nn.Module, folder: Path | None) -> tuple[list[float], list[str]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    recorder = None
    if folder is not None:
        recorder = hp.Recorder(
            folder, model, probes=PROBES, every=2, optimizer=optimizer, partition="parameter"
        )
    draws, losses, failures = torch.Generator().manual_seed(1), [], []
    for step in range(4):
        x, y = torch.randint(0, V, (2, 4, 5), generator=draws)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if recorder is not None:
            failures += [row.failure for row in recorder(step, (x, y)) if row.failure]
    return losses, failures


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*STATES, "carrying", "recurrent", "looped", "two names", "spectral norm"])
def test_training_is_the_same_with_and_without(tmp_path: Path, kind: str) -> None:
    bare, probed = made(kind), made(kind)
    objects = [id(p) for p in probed.parameters()]
    wanted, _ = trained(bare, None)
    losses, failures = trained(probed, tmp_path / "run")
    assert losses == wanted and failures == []
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), probed.parameters(), strict=True))
    assert [id(p) for p in probed.parameters()] == objects


def test_state_that_cannot_be_put_back_is_named_in_the_row(tmp_path: Path) -> None:
    model = made("counter")
    model.body.numbers = (i for i in range(100))  # type: ignore[union-attr, assignment]
    model.body.register_forward_hook(lambda module, *_: (next(module.numbers), None)[1])  # type: ignore[union-attr]
    _, failures = trained(model, tmp_path / "run")
    assert failures and all("body.numbers" in reason and "put back" in reason for reason in failures)
