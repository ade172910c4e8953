"""ProbeCallback in Lightning's own Trainer: modules train to the same weights, and every optimizer step is counted once."""

from __future__ import annotations

import shutil
import sys
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hessprobe as hp
from hessprobe.errors import UserError
from hessprobe.integrations.lightning import ProbeCallback
from tests.integrations.small_lightning import LENGTH, WIDTH, Language, fit, loader, same_weights
from tests.training.runs import tables

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # Lightning advises on workers, loggers and checkpoint folders
SMALL = {"cross_layer": {"sequences": 4}}


class TwoOptimizers(Language):
    """Steps two optimizers by hand on every batch."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        rest = [*self.embedding.parameters(), *self.head.parameters()]
        return torch.optim.SGD(self.layers.parameters(), lr=0.1), torch.optim.AdamW(rest, lr=1e-2)


class Wrapped(pl.LightningModule):
    """Keeps its network inside, and its batches in mappings of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self.net(self.features(batch[0])) - self.aim(batch)).square().sum(-1).mean() / 2

    def features(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens[:, 0], WIDTH + 3)[:, :WIDTH].float()

    def aim(self, batch: Any) -> Tensor:
        return batch[1][:, :3].float()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


CASES: dict[str, tuple[type[pl.LightningModule], dict[str, Any], list[int]]] = {
    "plain": (Language, {}, [0, 2, 4]),
    "accumulated": (Language, {"accumulate_grad_batches": 2}, [0, 2]),
    "two optimizers": (TwoOptimizers, {}, [0, 2, 4]),
    "bf16": (Language, {"precision": "bf16-mixed"}, [0, 2, 4]),
}


@pytest.mark.parametrize("name", CASES)
def test_training_ends_in_the_same_weights_bit_for_bit(tmp_path, name):
    kind, options, steps = CASES[name]
    bare = fit(kind, tmp_path, **options)
    random = torch.get_rng_state()
    probed = fit(kind, tmp_path, ProbeCallback(tmp_path / "run", SMALL, every=2), **options)
    assert same_weights(bare, probed)
    assert torch.equal(torch.get_rng_state(), random)
    table = tables(tmp_path / "run")["cross_layer"]
    assert table.failure.values.tolist() == [""] * len(steps)
    assert table.step.values.tolist() == steps
    assert np.isfinite(table.step_curvature.values).all()
    assert table.block.values.tolist()[0] == "embedding"
    assert (table.sequences.values == 4).all()


def test_accumulated_micro_batches_are_measured_together(tmp_path):
    probe = ProbeCallback(tmp_path / "run", {"cross_layer": {"sequences": 12}}, every=1)
    fit(Language, tmp_path, probe, accumulate_grad_batches=3)
    table = tables(tmp_path / "run")["cross_layer"]
    assert table.sequences.values.tolist() == [12, 12]
    assert table.tokens.values.tolist() == [12 * LENGTH] * 2


def test_a_resumed_fit_goes_on_in_its_folder(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(
        tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}"
    )
    options = {"enable_checkpointing": True}
    fit(Language, tmp_path, ProbeCallback(tmp_path / "run", SMALL, every=1), checkpoint, **options)
    before = tables(tmp_path / "run")["cross_layer"]
    saved = shutil.move(tmp_path / "kept" / "step=3.ckpt", tmp_path / "3.ckpt")
    fit(Language, tmp_path, ProbeCallback(tmp_path / "run", SMALL, every=1), resume=saved)
    after = tables(tmp_path / "run")["cross_layer"]
    assert after.step.values.tolist() == before.step.values.tolist() == list(range(6))
    measured_anew = after.seconds.values != before.seconds.values
    assert measured_anew.tolist() == [False] * 3 + [True] * 3
    assert np.isfinite(after.step_curvature.values).all()


def test_a_module_of_another_kind_is_described_by_its_objective(tmp_path):
    def objective(module: Any) -> hp.Objective:
        return hp.Objective(
            module.net,
            loss="squared_error",
            forward=lambda net, batch: net(module.features(batch[0])),
            targets=module.aim,
        )

    bare = fit(Wrapped, tmp_path)
    probe = ProbeCallback(tmp_path / "run", SMALL, every=1, partition="module", objective=objective)
    assert same_weights(bare, fit(Wrapped, tmp_path, probe))
    table = tables(tmp_path / "run")["cross_layer"]
    assert table.failure.values.tolist() == [""] * 6
    assert table.block.values.tolist() == ["0", "2"]


def test_a_mistake_is_said_before_the_first_step(tmp_path):
    with pytest.raises(UserError, match="no probe named 'cross_layers'"):
        fit(Language, tmp_path, ProbeCallback(tmp_path / "run", "cross_layers"))


def test_a_training_that_breaks_off_keeps_its_rows_and_frees_the_folder(tmp_path):
    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise RuntimeError("out of luck")

    probe = ProbeCallback(tmp_path / "run", SMALL, every=1)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Language, tmp_path, probe, Breaks())
    assert tables(tmp_path / "run")["cross_layer"].sizes["step"] == 3
    assert not list((tmp_path / "run").glob("*.lock"))
    assert not list((tmp_path / "run").glob(".*.lock"))


def test_sharded_strategies_are_named_and_training_goes_on(tmp_path, caplog):
    class Sharded:
        global_step, optimizers = 0, ()
        strategy = type("FSDPStrategy", (), {})()

    callback = ProbeCallback(tmp_path / "run")
    for _ in range(2):
        callback.on_train_start(Sharded(), Language())
        callback.on_train_batch_end(Sharded(), Language(), None, None, 0)
        callback.on_exception(Sharded(), Language(), RuntimeError())
        callback.on_train_end(Sharded(), Language())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "FSDPStrategy has sharded" in caplog.text


def fails(*_: object) -> Any:
    raise KeyError("of the user's own")


@pytest.mark.parametrize("given", [{"objective": fails}, {"forward": fails}, {"partition": fails}])
def test_what_fails_once_training_has_begun_is_logged_and_training_ends_as_without(tmp_path, given, caplog):
    bare = fit(Language, tmp_path)
    assert same_weights(
        bare, fit(Language, tmp_path, ProbeCallback(tmp_path / "run", SMALL, every=2, **given))
    )
    assert "KeyError" in caplog.text and "in fails" in caplog.text


@pytest.mark.parametrize("state", [{}, {"step": "three"}, {"step": -2}, None])
def test_a_strange_state_in_a_checkpoint_counts_from_0(tmp_path, state):
    callback = ProbeCallback(tmp_path / "run")
    callback.load_state_dict(state)
    assert callback.step == 0


def test_a_second_fit_goes_on_where_steps_go_on_and_is_beside_where_they_start_again(tmp_path, caplog):
    callback, options = (
        ProbeCallback(tmp_path / "run", SMALL, every=3),
        {"max_epochs": 1, "limit_test_batches": 1},
    )
    pl.seed_everything(4, verbose=False)
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    module, trainer = Language(), pl.Trainer(callbacks=[callback], **quiet, **options)
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert tables(tmp_path / "run")["cross_layer"].step.values.tolist() == [0, 3, 6, 9]
    assert not caplog.records
    pl.Trainer(callbacks=[callback], **quiet, **options).fit(module, loader())
    assert tables(tmp_path / "run-2")["cross_layer"].step.values.tolist() == [0, 3]
    assert "is recorded beside it" in caplog.text


def test_without_the_library_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", None)
    monkeypatch.delitem(sys.modules, "hessprobe.integrations.lightning")
    with pytest.raises(
        UserError, match=r"needs the library 'lightning'.*pip install 'hessprobe\[lightning\]'"
    ):
        import_module("hessprobe.integrations.lightning")
