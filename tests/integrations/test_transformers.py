"""ProbeCallback in Hugging Face's own Trainer: real models train to the same weights, and their rows are measured."""

from __future__ import annotations

import shutil
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    Trainer,
    TrainerCallback,
)  # fmt: skip

import hessprobe as hp
from hessprobe.errors import UserError
from hessprobe.integrations.transformers import ProbeCallback
from tests.integrations import small_transformers
from tests.integrations.small_transformers import (
    MODELS,
    SMALL,
    Texts,
    collate,
    same_weights,
    train,
)
from tests.training.runs import tables


def by(kind: str) -> str:
    """A BERT's pooler belongs to no layer that its names tell, and the partition would warn of it."""
    return "module" if kind == "classifier" else "layer"


@pytest.mark.parametrize("kind", MODELS)
def test_training_ends_in_the_same_weights_bit_for_bit(tmp_path, kind):
    bare = train(kind, tmp_path / "bare")
    random = torch.get_rng_state()
    probed = train(
        kind, tmp_path / "probed", ProbeCallback(tmp_path / "run", SMALL, every=2, partition=by(kind))
    )
    assert same_weights(bare, probed)
    assert torch.equal(torch.get_rng_state(), random)
    table = tables(tmp_path / "run")["cross_layer"]
    assert table.failure.values.tolist() == ["", ""]
    assert table.step.values.tolist() == [0, 2]
    assert np.isfinite(table.coupling.values).all()
    assert np.isfinite(table.step_curvature.values).all()  # so the Trainer's own update was seen
    assert (table.sequences.values == 4).all()


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_measured_is_the_models_own(tmp_path, kind):
    """Padding, -100 and the shift of causal models are read as the model itself reads them."""
    seen: dict[str, Any] = {}

    class OnTrainBegin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = kwargs["model"].eval()
            seen["batch"] = collate([Texts(kind)[i] for i in range(5)], kind)
            with torch.no_grad():
                seen["loss"] = float(model(**seen["batch"]).loss)
            model.train()

    probe = ProbeCallback(
        tmp_path / "run",
        {"cross_layer": {"sequences": 5}},
        batches=lambda step: seen["batch"],
        partition=by(kind),
    )
    train(kind, tmp_path, OnTrainBegin(), probe, max_steps=1)
    table = tables(tmp_path / "run")["cross_layer"]
    assert float(table.loss[0]) == pytest.approx(seen["loss"], rel=1e-5)
    targets = seen["batch"]["labels"][:, 1:] if kind in ("gpt2", "llama") else seen["batch"]["labels"]
    assert int(table.tokens[0]) == int((targets != -100).sum())


def test_gradients_are_accumulated_and_the_last_row_is_the_last_optimizer_step(tmp_path):
    options = {"gradient_accumulation_steps": 3, "max_steps": 3}
    bare = train("gpt2", tmp_path, **options)
    probed = train("gpt2", tmp_path, ProbeCallback(tmp_path / "run", SMALL, every=1), **options)
    assert same_weights(bare, probed)
    table = tables(tmp_path / "run")["cross_layer"]
    assert table.step.values.tolist() == [0, 1, 2]
    assert np.isfinite(table.step_slope.values).all()
    assert len({float(loss) for loss in table.loss}) == 3  # other examples at every step


def test_a_resumed_training_goes_on_in_its_folder(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    train("gpt2", tmp_path / "out", ProbeCallback(tmp_path / "one", SMALL, every=1), **options)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    again = ProbeCallback(tmp_path / "two", {"cross_layer": {"sequences": 4}}, every=1)
    train("gpt2", tmp_path / "out", again, resume=checkpoint)
    one, two = (tables(tmp_path / name)["cross_layer"] for name in ("one", "two"))
    assert two.step.values.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(two.loss.values, one.loss.values, rtol=1e-5)
    np.testing.assert_array_equal(two.seconds.values == one.seconds.values, [True, True, False, False])
    assert np.isfinite(two.step_curvature.values).all()  # its update was seen from the first step on


def test_another_objective_can_be_given(tmp_path):
    def smoothed(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(z, y, ignore_index=-100, label_smoothing=0.2, reduction="none")

    def objective(model: nn.Module) -> hp.Objective:
        return hp.Objective(model, loss=smoothed)

    products = {"cross_layer": {"sequences": 4, "method": "products", "samples": 2}}
    probe = ProbeCallback(tmp_path / "run", products, objective=objective)
    train("gpt2", tmp_path, probe, max_steps=1)
    assert tables(tmp_path / "run")["cross_layer"].failure.values.tolist() == [""]


class Stream(IterableDataset):
    """Texts that can only be read once."""

    def __iter__(self) -> Any:
        texts = Texts("gpt2")
        return (texts[i % len(texts)] for i in range(100))


def test_a_stream_needs_batches_of_its_own(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(small_transformers, "training_set", lambda kind: Stream())
    bare = train("gpt2", tmp_path)
    said = train("gpt2", tmp_path, ProbeCallback(tmp_path / "refused", SMALL))
    assert same_weights(bare, said)
    assert "training set is a stream (Stream)" in caplog.text and "pass batches=" in caplog.text
    assert not (tmp_path / "refused").exists()
    batch = collate([Texts("gpt2")[i] for i in range(4)], "gpt2")
    probed = train(
        "gpt2", tmp_path, ProbeCallback(tmp_path / "run", SMALL, every=2, batches=lambda step: batch)
    )
    assert same_weights(bare, probed)
    assert tables(tmp_path / "run")["cross_layer"].failure.values.tolist() == [""] * 2


@pytest.mark.parametrize("setting", ["fsdp", "deepspeed"])
def test_sharded_trainers_are_told_once_and_train_on(tmp_path, setting, caplog):
    args = SimpleNamespace(**{"fsdp": "", "deepspeed": None} | {setting: "full_shard"})
    callback, state = ProbeCallback(tmp_path / "run"), SimpleNamespace(global_step=1)
    for _ in range(2):
        callback.on_train_begin(args, None, None, model=None)
        callback.on_step_end(args, state, None)
        callback.on_train_end(args, state, None)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "DeepSpeed or FSDP have sharded: train with DistributedDataParallel" in caplog.text


MISTAKES = {
    "probe": ({"probes": "cross_layers"}, "no probe named 'cross_layers'"),
    "option": ({"probes": {"cross_layer": {"sequence": 4}}}, "no option in .cross_layer. named 'sequence'"),
    "schedule": ({"every": "often"}, "every='often'"),
    "partition": ({"partition": "layers"}, "no partition named 'layers'. Did you mean 'layer'"),
    "two losses": ({"objective": hp.Objective, "loss": "squared_error"}, "loss= given beside an objective"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_where_the_callback_is_made(tmp_path, mistake):
    given, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said):
        ProbeCallback(tmp_path / "run", **given)


def fails(*_: object, **__: object) -> Any:
    raise KeyError("of the user's own")


IN_TRAINING: dict[str, dict[str, Any]] = {
    "an objective that raises": {"objective": fails},
    "batches that raise": {"batches": fails},
    "batches of a strange type": {"batches": lambda step: object()},
    "a forward that raises": {"forward": fails},
    "a partition that raises": {"partition": fails},
    "blocks that do not exist": {"probes": {"gn_hessian": {"density_blocks": ["block.9"]}}},
}


@pytest.mark.parametrize("fault", IN_TRAINING)
def test_what_fails_once_training_has_begun_is_logged_and_training_ends_as_without(tmp_path, fault, caplog):
    bare = train("gpt2", tmp_path, max_steps=2)
    probed = train(
        "gpt2", tmp_path, ProbeCallback(tmp_path / "run", every=1, **IN_TRAINING[fault]), max_steps=2
    )
    assert same_weights(bare, probed)
    assert [record for record in caplog.records if record.name == "hessprobe"]


def test_a_folder_that_cannot_be_written_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    bare = train("gpt2", tmp_path, max_steps=2)
    probed = train("gpt2", tmp_path, ProbeCallback(tmp_path / "file" / "run", SMALL, every=1), max_steps=2)
    assert same_weights(bare, probed)
    assert "cannot write a run to" in caplog.text


def test_ctrl_c_passes_through(tmp_path):
    def stop(step: int) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("gpt2", tmp_path, ProbeCallback(tmp_path / "run", SMALL, batches=stop))


class SmallDevice(Trainer):
    """Pretends that more than two sequences do not fit from a step on."""

    fits_until = 0

    def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if len(inputs["input_ids"]) > 2 and self.state.global_step >= self.fits_until:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(model, inputs, *rest, **more)


@pytest.mark.parametrize("fits_until", [0, 1])
def test_a_retry_with_a_smaller_batch_goes_on_or_is_recorded_beside(
    tmp_path, fits_until, monkeypatch, caplog
):
    monkeypatch.setattr(small_transformers, "Trainer", SmallDevice)
    monkeypatch.setattr(SmallDevice, "fits_until", fits_until)
    options = {"auto_find_batch_size": True, "max_steps": 2}
    bare = train("gpt2", tmp_path, **options)
    probed = train("gpt2", tmp_path, ProbeCallback(tmp_path / "run", SMALL, every=1), **options)
    assert same_weights(bare, probed)
    last = tmp_path / ("run-2" if fits_until else "run")  # nothing was recorded: the same log
    assert tables(last)["cross_layer"].step.values.tolist() == [0, 1]
    assert sum("is recorded beside it" in record.getMessage() for record in caplog.records) == fits_until


def test_a_second_train_is_recorded_beside_the_first(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    callback = ProbeCallback("run", SMALL, every=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # as launchers and some data libraries do
    trainer = train("gpt2", tmp_path, callback, max_steps=2)
    trainer.train()
    for name in ("run", "run-2"):
        assert tables(tmp_path / name)["cross_layer"].step.values.tolist() == [0, 1]
    assert not [f for f in (tmp_path / "elsewhere").iterdir() if "run" in f.name]
    assert [r.getMessage() for r in caplog.records if r.name == "hessprobe"] == [
        f"{tmp_path / 'run'} holds a run already: this one is recorded beside it, in {tmp_path / 'run-2'}"
    ]


def test_without_the_library_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "hessprobe.integrations.transformers")
    with pytest.raises(UserError, match=r"needs the library 'transformers'.*pip install 'hessprobe\[hf\]'"):
        import_module("hessprobe.integrations.transformers")
