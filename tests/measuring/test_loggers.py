"""A few scalars go to TensorBoard or Weights & Biases; training is the same with, without, and with one that fails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hessprobe.checkpoints.measure_series import measure_series, open_series
from hessprobe.errors import UserError
from hessprobe.measuring import loggers
from hessprobe.measuring.loggers import ScalarLog, check_loggers
from hessprobe.measuring.row_recorder import Measurement
from hessprobe.training import loop
from hessprobe.training.loop import train
from tests.training.runs import assert_same_rows, attributes, parameters, recipe, tables

ADAMW = ("optimizer.name=adamw", "training.steps=3", "cross_layer.every=2", 'probes=["cross_layer"]')


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the (step, value) pairs of each key that TensorBoard would show."""
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {key: [(e.step, e.value) for e in found.Scalars(key)] for key in found.Tags()["scalars"]}


class Scripted:
    """A logger that keeps what it is told, and fails from its n-th call on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at, self.closed = [], fails_at, False

    def log(self, step: int, scalars: Any) -> None:
        self.calls.append((step, dict(scalars)))
        if self.fails_at is not None and len(self.calls) > self.fails_at:
            raise ConnectionError("the network is gone\nand more of it")

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run that logs nowhere."""
    folder = tmp_path_factory.mktemp("loggers") / "bare"
    train(recipe(folder, *ADAMW), folder)
    return folder


def test_tensorboard_shows_what_the_tables_hold_and_training_is_the_same(bare, tmp_path):
    folder = tmp_path / "run"
    train(
        recipe(folder, *ADAMW, 'loggers=["tensorboard"]', f"data.source={bare.parent / 'text.txt'}"), folder
    )
    assert torch.equal(parameters(folder), parameters(bare))
    assert_same_rows(folder, bare)
    shown, rows = events(folder), tables(folder)
    for table, prefix in (("train", "train/"), ("cross_layer", "probe/cross_layer/")):
        keys = [key for key in shown if key.startswith(prefix)]
        assert len(keys) > 4
        for key in keys:
            stored = rows[table][key.removeprefix(prefix)]
            stored = stored[np.isfinite(stored.values)]
            assert [step for step, _ in shown[key]] == stored.step.values.tolist(), key
            if not key.endswith("seconds"):
                np.testing.assert_allclose([value for _, value in shown[key]], stored.values, rtol=1e-6)
    assert {"train/loss", "train/held_out_loss", "probe/cross_layer/off_block_energy"} <= set(shown)
    assert not any("kernel" in key or "outcome" in key for key in shown)  # arrays and texts stay in the log
    assert (tmp_path / "run" / "tensorboard").is_dir() and not (bare / "tensorboard").exists()


def test_a_logger_that_fails_is_said_once_and_dropped_and_training_goes_on(
    bare, tmp_path, monkeypatch, capsys
):
    good, bad = Scripted(), Scripted(fails_at=1)
    made = iter([bad, good])
    monkeypatch.setattr(loggers, "_MAKERS", dict.fromkeys(("wandb", "tensorboard"), lambda *_: next(made)))
    monkeypatch.setattr(loop, "check_loggers", lambda names: None)
    folder = tmp_path / "run"
    settings = (*ADAMW, 'loggers=["wandb", "tensorboard"]', f"data.source={bare.parent / 'text.txt'}")
    train(recipe(folder, *settings), folder)
    assert torch.equal(parameters(folder), parameters(bare))
    assert_same_rows(folder, bare)
    assert len(bad.calls) == 2 and len(good.calls) == 5  # 3 steps, 2 rows
    assert good.closed and not bad.closed
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("logging")]
    assert len(said) == 1 and "wandb is left out from here on (the network is gone)" in said[0]


def test_one_that_cannot_start_is_said_and_dropped(tmp_path, monkeypatch):
    def refuse(*_: Any) -> Any:
        raise PermissionError("no API key")

    monkeypatch.setitem(loggers._MAKERS, "wandb", refuse)
    said = []
    with ScalarLog.open(["wandb"], tmp_path, {}, lambda *line: said.append(line)) as log:
        log.trained(0, {"loss": 1.0})
    assert said == [("logging", "wandb is left out from here on (no API key); the run's own log goes on")]


def test_only_finite_plain_numbers_of_rows_that_were_measured_are_logged():
    logger, said = Scripted(), []
    with ScalarLog({"kept": logger}, lambda *line: said.append(line)) as log:
        row = {
            "loss": torch.tensor(2.0),
            "gap": np.float64(0.5),
            "nothing": float("nan"),
            "matrix": torch.ones(2, 2),
            "tokens": 7,
            "reason": "",
        }
        log.measured(Measurement(probe="mine", step=4, seconds=1.5, row=row))
        log.measured(Measurement(probe="mine", step=5, seconds=1.5, row=None, failure="because"))
        log.trained(
            6, {"loss": 3.0, "outcome": "accepted", "inner_loss": [1.0], "held_out_loss": float("nan")}
        )
    wanted = {"probe/mine/loss": 2.0, "probe/mine/gap": 0.5, "probe/mine/seconds": 1.5}
    assert logger.calls == [(4, wanted), (6, {"train/loss": 3.0})]
    assert logger.closed and not said


class TestResume:
    """A resumed run goes on in the same place, and what was logged beyond its checkpoint is logged anew."""

    def test_tensorboard_shows_each_step_once(self, tmp_path, monkeypatch):
        folder = tmp_path / "run"
        wanted = recipe(folder, *ADAMW, 'loggers=["tensorboard"]')
        saved = loop.save_checkpoint

        def killed(*given: Any, step: int, **state: Any) -> None:
            if step == 3:
                raise KeyboardInterrupt
            saved(*given, step=step, **state)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "save_checkpoint", killed)
            with pytest.raises(KeyboardInterrupt):
                train(wanted, folder)
        train(wanted, folder, resume=True)
        assert [step for step, _ in events(folder)["train/loss"]] == [0, 1, 2]

    def test_wandb_is_given_the_same_run_and_the_runs_facts(self, tmp_path, monkeypatch):
        begun: list[dict[str, Any]] = []
        logged: list[tuple[int, dict[str, float]]] = []

        def init(**given: Any) -> Any:
            begun.append(given)
            return SimpleNamespace(log=lambda row, step: logged.append((step, row)), finish=lambda: None)

        fake = ModuleType("wandb")
        fake.init, fake.Settings = init, lambda **given: given  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", fake)
        folder = tmp_path / "run"
        wanted = recipe(folder, *ADAMW, 'loggers=["wandb"]')
        train(wanted, folder)
        train(wanted, folder, resume=True)
        first, second = begun
        assert first["id"] == second["id"] and first["resume"] == "allow"
        assert (first["project"], first["name"], first["dir"]) == ("hessprobe", "run", str(folder))
        assert first["config"]["optimizer"]["name"] == "adamw"
        steps = [step for step, _ in logged]
        assert steps == sorted(steps) == [0, 0, 1, 2, 2]  # wandb takes no step back
        assert attributes(folder)["name"] == "run"


def test_measuring_checkpoints_logs_too_at_their_steps(bare, tmp_path):
    out = tmp_path / "out"
    measure_series(open_series([str(bare)], ['loggers=["tensorboard"]']), out)
    loss = tables(out)["cross_layer"].loss.item()
    ((step, value),) = events(out)["probe/cross_layer/loss"]
    assert step == 3 and value == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_with_its_command_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"--log {name} needs.*pip install 'hessprobe\[{name}\]'"):
        check_loggers([name])
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="pip install"):
        train(recipe(folder, *ADAMW, f'loggers=["{name}"]'), folder)
    assert not folder.exists()
