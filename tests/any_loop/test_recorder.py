"""The recorder in any loop: it measures what is due, costs nothing where nothing is, and never changes training."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessprobe as hp
from hessprobe.any_loop.recorder import Recorder
from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.measure.probe import CrossLayerProbe
from hessprobe.instruments.snapshot import Row, Snapshot
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import CrossLayerRecipe
from hessprobe.store.writer import RunWriter
from tests.any_loop.loops import LOOPS, Loop, _plain, batches, build, plain, run
from tests.any_loop.watching import Seen, assert_untouched
from tests.training.runs import assert_same_rows, attributes, tables

CROSS_LAYER = {"cross_layer": {"sequences": 8}}


class Clumsy(Seen):
    """Does everything a probe must not, and then fails."""

    name = "clumsy"

    def measure(self, snapshot: Snapshot) -> Row:
        model = snapshot.objective.model.eval()
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    buffer.add_(1)
                    module._buffers[name] = buffer + 1
        torch.randn(3), np.random.rand(), torch.manual_seed(3)
        model(snapshot.batches[0][0]).sum().backward()
        raise RuntimeError("fell over")


def recorder(folder: Path, loop: Loop, probes: Any = CROSS_LAYER, **options: Any) -> Recorder:
    given = {"partition": "module", "optimizer": loop.optimizers, "every": 2} | options
    return Recorder(folder, Objective(loop.model), probes, **given)


def heard(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Returns what was logged, but for the note on the batch statistics of these loops' models."""
    return [record for record in caplog.records if "another function" not in record.getMessage()]


@pytest.mark.parametrize("name", LOOPS)
def test_training_is_the_same_bit_for_bit_with_and_without(tmp_path, name):
    bare = run(LOOPS[name](), 5)
    loop = LOOPS[name]()
    with recorder(tmp_path, loop) as held:
        found = run(loop, 5, held)
    assert_untouched(found, bare)
    table = tables(tmp_path)["cross_layer"]
    assert table.step.values.tolist() == [0, 2, 4]
    assert table.failure.values.tolist() == [""] * 3
    assert np.isfinite(table.coupling.values).all()
    assert table.sizes["block"] == len(Partition.of(loop.model, "module"))
    moved = (table.step_slope.sel(direction="update").values != 0).any(axis=1)
    assert moved.tolist() == [name != "mixed_precision", True, True]  # whose scaler skips its first step


@pytest.mark.parametrize("mode", ["a clumsy probe", "inside no_grad"])
def test_not_even_a_clumsy_probe_leaves_a_trace(tmp_path, mode):
    bare = run(plain(), 4)
    loop = plain()
    with recorder(tmp_path, loop, Clumsy() if mode == "a clumsy probe" else CROSS_LAYER, every=1) as held:
        found = run(loop, 4, torch.no_grad()(held) if mode == "inside no_grad" else held)
    assert_untouched(found, bare)
    (table,) = tables(tmp_path).values()
    reasons = table.failure.values.tolist()
    if mode == "a clumsy probe":  # the place in the user's own code is named
        assert all("RuntimeError: fell over (" in reason for reason in reasons)
        assert all(reason.endswith(", in measure)") and "test_recorder.py:" in reason for reason in reasons)
    else:
        assert reasons == [""] * 4


def test_a_row_sees_theta_before_the_step_and_the_update_that_was_made(tmp_path):
    loop, probe, theta, losses = plain(), Seen(), [], []
    objective, partition = Objective(loop.model), Partition.of(loop.model, "module")
    theta.append(partition.vector(loop.model))
    with recorder(tmp_path, loop, probe, every=[0, 3], partition=partition, seed=11) as held:

        def after(step: int, micro: list[Any]) -> None:
            theta.append(partition.vector(loop.model))
            losses.append(float(objective.gradient(micro, partition, partition.unflatten(theta[step]))[0]))
            held(step, micro)

        run(loop, 5, after)
    for step, snapshot in zip((0, 3), probe.snapshots, strict=True):
        assert (snapshot.step, snapshot.seed) == (step, 11)
        assert torch.equal(snapshot.parameters, theta[step])
        assert torch.equal(snapshot.update, theta[step + 1] - theta[step])
        assert snapshot.optimizer.solver == "adamw"
        (state,) = snapshot.optimizer.state
        assert {int(s["step"]) for s in state["state"].values()} == ({step} if step else set())
    assert tables(tmp_path)["seen"].loss.values.tolist() == [losses[0], losses[3]]


def test_where_theta_before_the_step_is_not_known_the_row_has_no_update(tmp_path):
    loop, probe = plain(), Seen()
    with recorder(tmp_path, loop, probe, every=1) as held:
        held(4, next(batches(1)))  # the recorder expected step 0
        held(6, next(batches(1)))
    assert [snapshot.update for snapshot in probe.snapshots] == [None, None]
    assert torch.equal(probe.snapshots[0].parameters, held.partition.vector(loop.model))


def test_micro_batches_are_one_batch_and_probes_read_its_first_sequences(tmp_path):
    loop, probe = plain(), Seen()
    micro = list(batches(3))
    with recorder(tmp_path, loop, probe, every=1) as held:
        probe.sequences = 13
        for step, given in enumerate(
            (micro, micro[0], list(micro[0]), {"x": micro[0][0], "labels": micro[0][1]})
        ):
            held(step, given)
        held(9, lambda: micro[:2])
    found = [
        [len(batch["labels"] if isinstance(batch, dict) else batch[1]) for batch in s.batches]
        for s in probe.snapshots
    ]
    assert found == [
        [8, 5],
        [8],
        [8],
        [8, 5],
    ]  # a classifier of tensors cannot read the mapping: its row failed
    assert torch.equal(probe.snapshots[0].batches[1][0], micro[1][0][:5])
    assert "TypeError" in str(tables(tmp_path)["seen"].failure.values[3])


def test_a_batch_is_made_only_where_a_probe_is_due(tmp_path):
    made = []

    def make() -> Any:
        torch.rand(1)  # drawing a batch may draw from the global generator
        made.append(1)
        return next(batches(1))

    bare, loop = run(plain(), 6), plain()
    with recorder(tmp_path, loop, Seen(), every="log:2") as held:
        found = run(loop, 6, lambda step, _: held(step, make))
    assert held.due(0) == []  # closed
    assert tables(tmp_path)["seen"].step.values.tolist() == [0, 1, 3]
    assert len(made) == 3
    assert_untouched(found, bare)


def test_every_probe_has_its_schedule_and_its_options(tmp_path):
    loop = plain()
    probes = ["cross_layer", {"gn_hessian": {"every": 4}}, Seen()]
    with recorder(tmp_path, loop, probes, every={"cross_layer": 3, "seen": [1, 5]}, sequences=5) as held:
        assert [held.due(step) for step in range(6)] == [
            ["cross_layer", "gn_hessian"], ["seen"], [], ["cross_layer"], ["gn_hessian"], ["seen"],
        ]  # fmt: skip
        assert [probe.sequences for probe in held._recorder.probes] == [5, 5, 8]
        assert Recorder(tmp_path / "default", loop.model, partition="module").due(50) == ["cross_layer"]
    kept = json.loads(attributes(tmp_path)["recipe"])
    assert kept["probes"] == ["cross_layer", "gn_hessian", "seen"]
    assert (kept["cross_layer"]["sequences"], kept["cross_layer"]["every"], kept["gn_hessian"]["every"]) == (
        5,
        3,
        4,
    )


@pytest.mark.parametrize("steps", [None, 100])
def test_rows_are_readable_while_training_goes_on_and_nothing_is_due_beyond_its_length(tmp_path, steps):
    loop = plain()
    with recorder(tmp_path, loop, Seen(keep=False), every=1, steps=steps) as held:
        batch = next(batches(1))
        for step in range(102):  # an unknown length grows past its first block of 64 rows
            held(step, batch)
            if step in (0, 63, 64, 101):
                rows = hp.open_run(tmp_path)["seen"]["loss"]
                assert rows.sizes["step"] == min(step + 1, steps or 1000)


def test_an_interrupted_run_goes_on_in_its_folder(tmp_path):
    loop, again = plain(), plain()
    with recorder(tmp_path / "whole", loop) as held:
        run(loop, 6, held)
    held = recorder(tmp_path / "cut", again)
    run(again, 3, held)  # and dies without closing: steps 0 and 2 are kept
    assert tables(tmp_path / "cut")["cross_layer"].step.values.tolist() == [0, 2]
    held._recorder.writer._lock.release()
    again = plain()
    with recorder(tmp_path / "cut", again, resume=True) as held:
        run(again, 6, lambda step, micro: held(step, micro) if step >= 1 else None)
    whole, cut = tables(tmp_path / "whole")["cross_layer"], tables(tmp_path / "cut")["cross_layer"]
    np.testing.assert_array_equal(cut.fro2.values[1:], whole.fro2.values[1:])


def test_the_same_seed_gives_the_same_rows_and_another_gives_others(tmp_path):
    for folder, seed in (("one", 0), ("two", 0), ("other", 1)):
        loop = plain()
        with recorder(tmp_path / folder, loop, seed=seed) as held:
            run(loop, 1, held)
    assert_same_rows(tmp_path / "one", tmp_path / "two")
    one, other = (tables(tmp_path / folder)["cross_layer"] for folder in ("one", "other"))
    assert not np.array_equal(one.fro2.values, other.fro2.values)
    np.testing.assert_array_equal(one.loss.values, other.loss.values)


def test_a_relative_folder_is_the_one_at_construction(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    loop = plain()
    with recorder(Path("run"), loop, every=1) as held:
        monkeypatch.chdir(tmp_path / "elsewhere")
        run(loop, 3, held)
    assert tables(tmp_path / "run")["cross_layer"].failure.values.tolist() == [""] * 3
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_step_that_is_not_due_makes_few_calls_and_none_of_torch(tmp_path):
    loop, batch, made = plain(), next(batches(1)), []

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            made.append(frame.f_code.co_name if event == "call" else str(argument))

    probes = ["cross_layer", "gn_hessian"]
    with recorder(tmp_path, loop, probes, every=10**6) as held:
        held(2, batch)
        sys.setprofile(count)
        try:
            for step in range(3, 103):
                held(step, batch)
        finally:
            sys.setprofile(None)
    assert len(made) <= 100 * 40, made[:60]
    assert not [name for name in made if "torch" in name or "Tensor" in name]


def test_a_step_that_is_not_due_takes_less_than_50_microseconds(tmp_path):
    loop, batch = plain(), next(batches(1))
    probes = ["cross_layer", "gn_hessian", Seen()]
    for name, every in (
        ("every", 10**6),
        ("log", {"cross_layer": "log:8", "gn_hessian": "log:8", "seen": [9999]}),
    ):
        with recorder(tmp_path / name, loop, probes, every=every) as held:
            quiet = [s for s in range(2, 4000) if not (held.due(s) or held.due(s + 1))]
            taken = []
            for step in quiet:
                start = time.perf_counter()
                held(step, batch)
                taken.append(time.perf_counter() - start)
        assert len(taken) > 3500
        assert np.median(taken) < 50e-6


WIDE = 160


def test_five_hundred_probed_steps_take_no_more_memory_than_the_first(tmp_path):
    model = nn.Sequential(
        nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 3)
    )  # 100 kB: a kept copy a step would show
    loop = _plain(model)
    batch = torch.randn(4, WIDE), torch.arange(4) % 3
    process, found = psutil.Process(), []
    with recorder(tmp_path, loop, Seen(keep=False), every=1) as held:
        for step in range(500):
            loop.step([batch])
            held(step, batch)
            if step in (60, 499):
                gc.collect()
                found.append(process.memory_info().rss)
    assert tables(tmp_path)["seen"].failure.values.tolist() == [""] * 500
    assert found[1] <= 1.02 * found[0], found


@pytest.mark.parametrize("probe", ["cross_layer", "gn_hessian"])
def test_no_tensor_outlives_its_row(tmp_path, probe):
    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    loop, batch, counts = plain(), next(batches(1)), {}
    with recorder(tmp_path, loop, {probe: {"sequences": 8}}, every=1) as held:
        for step in range(6):
            loop.step([batch])
            (found,) = held(step, batch)
            assert found.failure == ""
            del found
            if step in (2, 5):
                counts[step] = alive()
    assert counts[5] == counts[2]


def test_what_goes_wrong_is_in_the_row_and_said_once(tmp_path, caplog):
    loop = plain()
    inputs, targets = next(batches(1))
    with recorder(tmp_path, loop, every=1) as held, caplog.at_level(logging.WARNING, "hessprobe"):
        for step in range(3):
            (found,) = held(step, (inputs, torch.full_like(targets, -100)))
            assert "no token carries a target" in found.failure
        held(3, (inputs, targets))
    table = tables(tmp_path)["cross_layer"]
    assert ["no token carries a target" in str(reason) for reason in table.failure.values] == [True] * 3 + [
        False
    ]
    assert len(heard(caplog)) == 1
    assert "step 0: cross_layer failed: no token carries a target" in caplog.text


def test_a_row_that_does_not_fit_its_own_table_is_a_failed_row(tmp_path):
    class Short(Seen):
        def measure(self, snapshot: Snapshot) -> Row:
            return {name: value for name, value in super().measure(snapshot).items() if name != "tokens"}

    with recorder(tmp_path, plain(), Short(), every=1) as held:
        for step in range(2):
            (found,) = held(step, next(batches(1)))
            assert found.failure == "ValueError: a row of table 'seen': missing ['tokens'], unknown []"
        assert held.active
    assert tables(tmp_path)["seen"].sizes["step"] == 2


class Tuples(nn.Linear):
    """Returns more than its outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = super().forward(x)
        return z, 2 * z


def test_a_model_that_returns_tuples_is_told_how_to_pick_its_outputs(tmp_path):
    model = Tuples(6, 4)
    with Recorder(tmp_path / "whole", model, CROSS_LAYER, every=1, partition="module") as held:
        (failed,) = held(0, next(batches(1)))
    assert "returned tuple of 2: wanted a tensor of outputs" in failed.failure
    assert "pass forward=" in failed.failure
    objective = Objective(model, forward=lambda m, batch: m(batch[0])[0])
    with Recorder(tmp_path / "picked", objective, CROSS_LAYER, every=1, partition="module") as held:
        (found,) = held(0, next(batches(1)))
    assert found.failure == ""


def test_a_loss_that_needs_more_than_outputs_and_targets_is_refused():
    def weighted(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return weights * cross_entropy(outputs, targets, reduction="none")

    with pytest.raises(UserError, match="loss weighted: wanted a function of .* and no more, got .*weights"):
        Objective(build(), loss=weighted)
    Objective(build(), loss=partial(weighted, weights=torch.ones(8)))


def test_epochs_that_count_from_0_again_are_warned_of_and_training_goes_on(tmp_path, caplog):
    loop, batch = plain(), next(batches(1))
    with recorder(tmp_path, loop, Seen(keep=False)) as held, caplog.at_level(logging.WARNING, "hessprobe"):
        for _ in range(2):
            for step in range(3):
                held(step, batch)
        held(4, batch)
    assert tables(tmp_path)["seen"].step.values.tolist() == [0, 2, 4]
    assert [record.getMessage()[:38] for record in heard(caplog)] == [
        "step 0 came after step 2, and nothing "
    ]


def test_a_full_disk_ends_the_recording_not_the_training(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise UserError("no space left on disk")

    bare, loop = run(plain(), 4), plain()
    with recorder(tmp_path, loop, Seen(keep=False), every=1) as held:
        monkeypatch.setattr(RunWriter, "write", full)
        assert_untouched(run(loop, 4, held), bare)
        assert not held.active
    assert [record.levelname for record in heard(caplog)] == ["ERROR"]
    assert "no space left on disk. Recording has stopped; training goes on" in caplog.text


def test_half_precision_weights_are_measured_in_float32(tmp_path):
    model, probe = build(counted=False).bfloat16(), Seen()
    model[1].float()  # batch statistics stay
    with Recorder(tmp_path, model, probe, partition="module") as held:
        held(0, next(batches(1)))
    (snapshot,) = probe.snapshots
    assert snapshot.parameters.dtype == snapshot.update.dtype == torch.float32


BAD = {
    "no trainable parameters": (lambda m: m.requires_grad_(False), {}, "has no trainable parameters"),
    "no probe": (None, {"probes": []}, "wanted at least one, each once, got none"),
    "one probe twice": (None, {"probes": ["cross_layer", {"cross_layer": {}}]}, "each once, got cross_layer, cross_layer"),
    "an unknown probe": (None, {"probes": "cross_layers"}, "no probe named 'cross_layers'. Did you mean 'cross_layer'"),
    "an unknown option": (None, {"probes": {"cross_layer": {"sequence": 4}}}, r"in \[cross_layer\] named 'sequence'"),
    "an option out of range": (None, {"probes": {"cross_layer": {"sequences": 1}}}, "cross_layer.sequences = 1"),
    "an unknown partition": (None, {"partition": "layers"}, "no partition named 'layers'"),
    "a schedule that is none": (None, {"every": "often"}, "every='often': wanted a number of steps"),
    "a schedule of another probe": (None, {"every": {"seen": 3}}, "no probe named 'seen'. Valid: cross_layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_the_call_is_said_before_training(tmp_path, name):
    change, options, said = BAD[name]
    model = build()
    if change:
        change(model)
    with pytest.raises(UserError, match=said):
        Recorder(tmp_path / "run", model, **{"probes": "cross_layer", "partition": "module", **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", ["three", 2.5, None, float("nan")])
def test_a_step_that_is_no_number_is_said_once_and_training_goes_on(tmp_path, step, caplog):
    loop, batch = plain(), next(batches(1))
    with recorder(tmp_path, loop, Seen(keep=False), every=1) as held:
        assert [held(step, batch), held(step, batch), held.due(step)] == [(), (), []]
        assert len(held(0, batch)) == 1
    assert [record.getMessage() for record in heard(caplog)] == [
        f"step {step!r} is no whole number, and nothing is recorded of it: count optimizer steps, from 0"
    ]


def test_a_recorder_may_be_closed_twice_and_called_afterwards(tmp_path, caplog):
    held = recorder(tmp_path, plain(), Seen(keep=False), every=1)
    held.close()
    held.close()
    assert held(0, next(batches(1))) == held.measure("late", next(batches(1))) == ()
    assert not held.check(next(batches(1))).probes
    assert tables(tmp_path)["seen"].sizes["step"] == 0


@pytest.mark.parametrize(
    "error", [PermissionError(13, "no"), FileNotFoundError(2, "gone"), OSError(5, "torn")]
)
def test_a_folder_that_is_lost_ends_the_recording_not_the_training(tmp_path, monkeypatch, caplog, error):
    def lost(*_: object) -> None:
        raise error

    bare, loop = run(plain(), 3), plain()
    with recorder(tmp_path, loop, Seen(keep=False), every=1) as held:
        monkeypatch.setattr(RunWriter, "write", lost)
        monkeypatch.setattr(RunWriter, "close", lost)
        assert_untouched(run(loop, 3, held), bare)
        assert not held.active
    assert "Recording has stopped; training goes on" in caplog.text


def test_a_batch_that_asks_to_stop_stops(tmp_path):
    def interrupted() -> Any:
        raise KeyboardInterrupt

    with recorder(tmp_path, plain(), every=1) as held, pytest.raises(KeyboardInterrupt):
        held(0, interrupted)


class Refuses(Seen):
    """Fails alike, but for numbers, until it is told that all is well."""

    def __init__(self) -> None:
        super().__init__(keep=False)
        self.tried, self.well = [], False

    def measure(self, snapshot: Snapshot) -> Row:
        self.tried.append(snapshot.step)
        if not self.well:
            raise UserError(f"{snapshot.step} sequences are too few")
        return super().measure(snapshot)


def test_a_hopeless_failure_is_tried_ever_more_seldom_and_recovers(tmp_path, caplog):
    probe, batch = Refuses(), next(batches(1))
    with recorder(tmp_path, plain(), probe, every=1) as held:
        for step in range(20):
            held(step, batch)
        assert probe.tried == [0, 1, 2, 3, 5, 9, 17]
        held.retry("seen")
        held(20, batch)
        probe.well = True
        for step in range(21, 25):
            held(step, batch)
    assert probe.tried[7:] == [20, 21, 22, 23, 24]
    failures = tables(tmp_path)["seen"].failure.values.tolist()
    assert all("sequences are too few" in reason for reason in failures[:21])
    assert failures[21:] == [""] * 4
    assert "not tried again yet" in failures[4]
    assert sum("is tried ever more seldom" in record.getMessage() for record in caplog.records) == 1
    assert "recorder.retry('seen')" in caplog.text


def test_a_failure_names_the_place_in_the_users_own_code_in_one_line(tmp_path):
    def loses(outputs: Tensor, targets: Tensor) -> Tensor:
        raise IndexError("out of\nrange")

    probes = {"cross_layer": {"sequences": 8, "method": "products"}}
    with Recorder(tmp_path, build(), probes, every=1, partition="module", loss=loses) as held:
        (found,) = held(0, next(batches(1)))
    line = loses.__code__.co_firstlineno + 1
    assert found.failure.startswith("IndexError: out of range (")
    assert found.failure.endswith(f"test_recorder.py:{line}, in loses)")


def test_a_check_says_what_rows_cost_writes_none_and_changes_nothing(tmp_path, capsys):
    bare, loop = run(plain(), 3), plain()
    probes = [{"cross_layer": {"sequences": 8}}, Clumsy(), Seen()]
    with recorder(tmp_path, loop, probes, every=2) as held:
        found = held.check(next(batches(1)))
        assert_untouched(run(loop, 3, held), bare)
        again = held.check(next(batches(1)))
    assert [probe.probe for probe in found.probes] == ["cross_layer", "clumsy", "seen"]
    assert not found.ok and "fell over" in found.probes[1].failure
    assert (
        found.probes[0].seconds > 0 and found.probes[0].steps == found.probes[0].seconds / found.step_seconds
    )
    assert "every=" in str(found.probes[0])
    assert (
        found.step_from == "taken as one gradient of this batch" and again.step_from == "the mean of 2 so far"
    )
    assert capsys.readouterr().out == f"{found}\n{again}\n"
    assert tables(tmp_path)["cross_layer"].step.values.tolist() == [0, 2]
    assert np.isfinite(tables(tmp_path)["cross_layer"].step_slope.values).all()


def test_weights_are_measured_by_label_as_they_are(tmp_path):
    loop, probe, thetas = plain(), Seen(), []
    with recorder(tmp_path, loop, probe, every=10) as held:
        for label in ("first.pt", 7, np.int64(5), "last.pt", "first.pt"):
            loop.step([next(batches(1))])
            thetas.append(held.partition.vector(loop.model))
            held.measure(label, next(batches(1)))
    assert [snapshot.step for snapshot in probe.snapshots] == [0, 7, 5, 8, 0]
    for snapshot, theta in zip(probe.snapshots, thetas, strict=True):
        assert torch.equal(snapshot.parameters, theta) and snapshot.update is None
    assert sorted(tables(tmp_path)["seen"].step.values.tolist()) == [0, 5, 7, 8]
    assert json.loads(attributes(tmp_path)["labels"]) == {"0": "first.pt", "8": "last.pt"}
    with recorder(tmp_path, plain(), probe, every=10, resume=True) as held:
        held.measure("last.pt", next(batches(1)))
        held.measure("new", next(batches(1)))
    assert json.loads(attributes(tmp_path)["labels"])["9"] == "new"


def test_measuring_in_between_leaves_the_next_rows_update_known(tmp_path):
    loop, probe = plain(), Seen()
    with recorder(tmp_path, loop, probe, every=1) as held:
        held.measure("start", next(batches(1)))
        run(loop, 2, held)
    assert [snapshot.update is None for snapshot in probe.snapshots] == [True, False, False]


def test_the_loss_is_said_beside_the_model(tmp_path):
    def pair(model: nn.Module, batch: Any) -> Tensor:
        return model(batch["x"])

    inputs, targets = next(batches(1))
    given = {"forward": pair, "targets": lambda batch: batch["y"], "loss": "cross_entropy", "ignore_index": 0}
    with Recorder(tmp_path / "one", build(), CROSS_LAYER, every=1, partition="module", **given) as held:
        (found,) = held(0, {"x": inputs, "y": targets})
    assert found.failure == ""
    assert found.row["tokens"] == int((targets != 0).sum())
    objective = Objective(build())
    with pytest.raises(UserError, match="forward= given beside an objective, which has its own"):
        Recorder(tmp_path / "two", objective, CROSS_LAYER, forward=pair)
    Recorder(tmp_path / "three", objective, CROSS_LAYER, partition="module", loss="cross_entropy").close()
    with pytest.raises(UserError, match="wanted the model that is trained .* got dict"):
        Recorder(tmp_path / "four", {}, CROSS_LAYER)


def test_a_folder_that_holds_a_run_is_not_written_to(tmp_path):
    with recorder(tmp_path, plain()):
        pass
    with pytest.raises(
        UserError, match="already holds a run; continue it with resume=True, or give another folder"
    ):
        recorder(tmp_path, plain())
    with recorder(tmp_path, plain(), resume=True), recorder(tmp_path / "new", plain(), resume=True):
        assert (tmp_path / "new" / "log.zarr").is_dir()
    with recorder(tmp_path, plain(), beside=True) as held:
        assert held.folder == tmp_path.with_name(f"{tmp_path.name}-2")
    with pytest.raises(UserError, match="was recorded differently"):
        recorder(tmp_path, plain(), {"cross_layer": {"sequences": 7}}, resume=True)


def test_a_probe_object_is_taken_as_it_is(tmp_path):
    loop, probe = plain(), CrossLayerProbe(CrossLayerRecipe(sequences=8, method="products", samples=2))
    with recorder(tmp_path, loop, [probe], every=None) as held:
        assert [held.due(step) for step in range(4)] == [["cross_layer"], [], [], ["cross_layer"]]
        (found,) = held(0, next(batches(1)))
    assert found.failure == ""


def test_the_report_of_such_a_run_says_what_it_has_and_what_not(tmp_path):
    from hessprobe.report.page import write_report

    loop = plain()
    with recorder(tmp_path, loop) as held:
        run(loop, 3, held)
    page = write_report(tmp_path).read_text()
    assert "holds no table &#39;train&#39;" in page
    assert (
        "every.cross_layer" not in page and "cross_layer.every" in page
    )  # the provenance shows what was asked for
