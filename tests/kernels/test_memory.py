"""Memory: what is held stays within the bound, running out divides the passes, and neither changes a single pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hessprobe.errors import UserError
from hessprobe.kernels import division, stream, verification
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.plan import MASKED, ONE_SEQUENCE, Plan, first_plan
from hessprobe.kernels.sequence_gradients import Stretch, within
from hessprobe.kernels.verification import verified_plan
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.kernels.foreign_models import mixture_with_capacity
from tests.kernels.plain import relative, streamed
from tests.kernels.stream_settings import Bare, Mixed, Setting, text, tiny
from tests.models import redraw, seeded

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
OUT_OF_MEMORY = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
    "CPU": RuntimeError(CPU),
}


def peak_bytes(call: Callable[[], object]) -> int:
    """Returns by how much the bytes that torch has allocated rise above their start during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def at_most(model: nn.Module, sequences: int, error: Exception = OUT_OF_MEMORY["CPU"]) -> Iterator[list[int]]:
    """Makes passes with a graph run out of memory beyond so many sequences; yields how many each pass had."""
    sizes: list[int] = []

    def allocate(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            sizes.append(len(inputs[0]))
            if sizes[-1] > sequences:
                raise error

    handle = model.register_forward_hook(allocate)
    yield sizes
    handle.remove()


# -- the bound ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 20_000])
@pytest.mark.parametrize("make", [tiny, lambda: tiny(tied=True), Bare], ids=["fast", "tied", "bare"])
def test_any_bound_gives_the_same_kernels(make, memory):
    setting = Setting(redraw(make(), seeded(1)))
    plan = setting.plan()
    along = torch.randn(setting.partition.size, generator=seeded(4), dtype=torch.float64)
    arguments = (setting.objective, setting.batches, setting.partition, setting.cotangents, plan)
    free = streamed(*arguments, along={"v": along})
    bound = streamed(*arguments, along={"v": along}, memory=memory)
    assert relative(bound.kernel, free.kernel) < 1e-12
    assert relative(bound.alignment["v"], free.alignment["v"]) < 1e-12
    assert relative(bound.kernel, setting.truth()) < 1e-11


@pytest.mark.parametrize("how", [ONE_SEQUENCE, MASKED])
@pytest.mark.parametrize("memory", [0, 9_000])
def test_any_bound_gives_the_same_kernels_without_fast_paths(how, memory):
    setting = Setting(tiny())
    assert relative(setting.kernel(how, memory=memory), setting.truth()) < 1e-11


def passes_of(setting: Setting, plan: Plan, memory: int, **options: int) -> tuple[int, float]:
    """Returns how often the first micro-batch ran forward under a bound, and the gradients that were counted."""
    calls: list[int] = []
    handle = setting.model.register_forward_hook(lambda *_: calls.append(1))
    gathered = stream.Stream(setting.objective, setting.partition, plan, theta=None, memory=memory, **options)
    gathered.run(
        setting.objective.counted(list(setting.batches)), len(setting.cotangents.drawn[0]), setting.cotangents
    )
    handle.remove()
    return len(calls) // len(setting.batches), gathered.gradients


def test_a_smaller_bound_costs_more_passes_and_says_so():
    setting = Setting(tiny())
    plan = setting.plan()
    once, forever = passes_of(setting, plan, 2**31), passes_of(setting, plan, 0)
    assert once == (1, pytest.approx(5 / 3))  # forward, and twice backward for each of two rounds
    assert forever[0] == len(plan.taps)
    # Forward and the activations' backward each time; the weights' gradients once in all.
    assert forever[1] == pytest.approx(len(plan.taps) * (1 + 2) / 3 + 2 / 3)


def test_one_round_of_one_batch_holds_nothing_and_takes_one_pass_under_any_bound():
    setting = Setting(tiny(), text((4, 5)), rounds=1)
    assert passes_of(setting, setting.plan(), 0)[0] == 1


class Wide(nn.Module):
    """Nearly all of it one bare matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, width), nn.Linear(width, 6)
        self.matrix = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x) @ self.matrix))


@pytest.mark.parametrize("share", [1, 4, 10])
def test_the_fallback_stays_within_the_bound(share):
    """24 sketches of 40,000 entries in float64 are 7.7 MB: a bound of 1/share of that holds, in share pieces."""
    setting = Setting(redraw(Wide(200), seeded(1)), text((12, 3)))
    plan = setting.plan()
    assert plan.fallback == ("matrix",)
    gradient, everything = 8 * 200**2, 24 * 8 * 200**2
    bound = everything // share
    setting.kernel(plan)  # what torch sets up once
    peak = peak_bytes(lambda: setting.kernel(plan, memory=bound))
    # Beside what is held: the matrix's gradient of one sequence, its leaf, and the passes' activations.
    assert 0.9 * bound < peak < bound + 3 * gradient
    # A pass for the other parameters; then for each piece one to draw the cotangents, and one a sequence.
    assert passes_of(setting, plan, bound)[0] == 1 + share * (1 + 12)


def test_held_inputs_and_gradients_stay_within_the_bound():
    model = tiny(layers=4, width=32, feedforward=64)
    setting = Setting(model, text((8, 4), (8, 8), (8, 8)), rounds=3, by="layer")  # the first one is shorter
    alone = Setting(model, setting.batches[1:2], rounds=1, by="layer")  # holds nothing for others
    plan = setting.plan()
    setting.kernel(plan)
    free, one_pass = (peak_bytes(lambda s=s: s.kernel(plan)) for s in (setting, alone))
    kernels = len(setting.partition) * 72**2 * 8
    bound = free // 8
    peak = peak_bytes(lambda: setting.kernel(plan, memory=bound))
    assert peak < kernels + bound + one_pass < 0.5 * free


@pytest.mark.parametrize("entries", [0, 1, 3, 4, 9, 100])
@pytest.mark.parametrize("least", [0, 1, 3])
def test_stretches_are_taken_in_order_and_none_is_lost(entries, least):
    left = [Stretch(name=name, start=0, stop=size) for name, size in (("a", 4), ("b", 2), ("c", 5))]
    everything = [(stretch.name, i) for stretch in left for i in range(stretch.start, stretch.stop)]
    seen: list[tuple[str, int]] = []
    for _ in range(20):
        before = len(left)
        taken, left = within(entries, left, least=least)
        assert sum(stretch.size for stretch in taken) <= max(least, entries)
        assert taken or not least or not before
        seen += [(stretch.name, i) for stretch in taken for i in range(stretch.start, stretch.stop)]
    assert seen == everything[: len(seen)]
    assert (seen == everything) == (least > 0 or entries >= 5)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [0, 10_000])
def test_what_goes_to_the_host_comes_back_the_same(memory):
    setting = Setting(tiny(layers=2, tied=True))
    wanted = setting.kernel()
    setting.model.cuda()
    setting.batches = [(x.cuda(), y.cuda()) for x, y in setting.batches]
    assert relative(setting.kernel(memory=memory).cpu(), wanted) < 1e-10


# -- out of memory -----------------------------------------------------------------------------------------


def measured(setting: Setting, plan: Plan, seed: int = 3, **options: Any) -> LayerKernels:
    settings = {"rounds": 2, "generator": seeded(seed), "plan": plan} | options
    return layer_kernels(setting.objective, setting.batches, setting.partition, **settings)


@pytest.mark.parametrize(
    ("kind", "device", "tied"),
    [("sampled", "GPU", True), ("sampled", "CPU", False), ("sign", "CPU", True), ("empirical", "GPU", False)],
)
def test_fewer_sequences_at_once_give_the_same_sketches(kind, device, tied):
    setting = Setting(tiny(tied=tied), text((7, 4), (3, 5)))
    plan = setting.plan()
    along = {"v": torch.randn(setting.partition.size, generator=seeded(4), dtype=torch.float64)}
    generator, again = seeded(3), seeded(3)
    wanted = measured(setting, plan, cotangent=kind, along=along, generator=generator)
    with at_most(setting.model, 2, OUT_OF_MEMORY[device]) as sizes:
        found = measured(setting, plan, cotangent=kind, along=along, generator=again)
    assert [size for size in sizes if size > 2] == [7, 3]  # 7 sequences at once; 3 and 4; at most 2
    assert wanted.division == 1 and found.division == 4
    assert relative(found.kernel, wanted.kernel) < 1e-11
    assert relative(found.alignment["v"], wanted.alignment["v"]) < 1e-11
    assert torch.equal(found.sequence, wanted.sequence) and torch.equal(found.round, wanted.round)
    assert torch.equal(generator.get_state(), again.get_state())  # the next row is the same, too
    with at_most(setting.model, 2) as sizes:
        measured(setting, plan, cotangent=kind, division=found.division)
    assert max(sizes) == 2, "the next call begins where this one ended"


def test_squared_error_divides_the_same_way():
    model = redraw(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seeded(1))
    x, y = torch.randn(2, 6, 3, generator=seeded(2), dtype=torch.float64)
    setting = Setting(model, [(x, y[:, :2].contiguous())], loss="squared_error")
    plan = setting.plan()
    wanted = measured(setting, plan)
    with at_most(model, 3):
        assert relative(measured(setting, plan).kernel, wanted.kernel) < 1e-11


def test_less_is_held_where_that_is_what_does_not_fit(monkeypatch):
    setting = Setting(tiny())
    plan = setting.plan()
    wanted = measured(setting, plan)
    held: dict[int, int] = {}
    keep = stream._Sweep._kept

    def allocate(self: Any, tensor: Tensor) -> Tensor:
        held[id(self)] = held.get(id(self), 0) + tensor.nbytes
        if held[id(self)] > 6_000:
            raise OUT_OF_MEMORY["CPU"]
        return keep(self, tensor)

    monkeypatch.setattr(stream._Sweep, "_kept", allocate)
    found = measured(setting, plan, memory=16_000)
    assert found.division > 1 and found.gradients > 1.5 * wanted.gradients
    assert relative(found.kernel, wanted.kernel) < 1e-11


@pytest.mark.parametrize("device", OUT_OF_MEMORY)
def test_what_never_fits_is_refused_with_the_bound_and_the_way_out(device):
    setting = Setting(tiny(), text((3, 4)))
    plan = setting.plan()
    before = {name: p.clone() for name, p in setting.model.named_parameters()}
    words = r"out of memory: 6 sketches .* one sequence at a time .* 1/64 of memory=6,400; measure fewer .*\(.*allocate"
    with at_most(setting.model, 0, OUT_OF_MEMORY[device]) as sizes, pytest.raises(UserError, match=words):
        measured(setting, plan, memory=6_400)
    assert sizes == [3, 1, 1, 1, 1, 1, 1]
    assert all(torch.equal(before[name], p) for name, p in setting.model.named_parameters())
    assert relative(setting.kernel(plan), setting.truth()) < 1e-11  # and it can go on


def test_other_errors_are_not_tried_again():
    setting = Setting(tiny(), text((3, 4)))
    plan = setting.plan()
    with (
        at_most(setting.model, 0, RuntimeError("no kernel for this device")) as sizes,
        pytest.raises(RuntimeError, match="no kernel"),
    ):
        measured(setting, plan)
    assert sizes == [3]


def _opaque() -> tuple[nn.Module, Any, dict[str, Any]]:
    model, (batch,) = tiny(), text((4, 4))

    class Opaque:
        inputs, labels = batch

    return model, Opaque(), {"forward": lambda m, b: m(b.inputs), "targets": lambda b: b.labels}


def _mixed() -> tuple[nn.Module, Any, dict[str, Any]]:
    return redraw(Mixed(), seeded(1)), text((4, 4))[0], {}


def _capacity() -> tuple[nn.Module, Any, dict[str, Any]]:
    found = mixture_with_capacity()
    return found.model, found.batches[0], {}


@pytest.mark.parametrize("make", [_opaque, _mixed, _capacity])
def test_sequences_that_need_each_other_are_refused_rather_than_measured_apart(make):
    """Three or four sequences; with fewer the outputs are others, or there is no way to take them apart."""
    model, batch, options = make()
    objective = Objective(model, **options)
    partition = Partition.of(model, "parameter")
    plan = verified_plan(objective, batch, partition)
    limit = 2 * (batch[0].shape[1] if isinstance(batch, tuple) else 4)

    def allocate(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and inputs[0].numel() > limit:
            raise OUT_OF_MEMORY["CPU"]

    handle = model.register_forward_hook(allocate)
    with pytest.raises(UserError, match="its sequences depend on each other"):
        layer_kernels(objective, batch, partition, rounds=2, generator=seeded(0), plan=plan)
    handle.remove()


def test_a_plan_is_verified_with_fewer_sequences_where_all_do_not_fit():
    setting = Setting(tiny(tied=True), text((8, 4)))
    wanted = setting.plan()
    with at_most(setting.model, 3) as sizes:
        found = setting.plan()
    assert max(sizes) == 8 and next(size for size in sizes if size <= 3) == 2
    assert found.fallback == wanted.fallback and found.how == wanted.how == ONE_SEQUENCE
    assert {t.names["weight"] for t in found.taps} == {t.names["weight"] for t in wanted.taps}
    with (
        at_most(setting.model, 1),
        pytest.raises(UserError, match=r"out of memory while .* 2 sequences: measure"),
    ):
        setting.plan()


def test_running_out_of_memory_is_no_proof_against_single_sequences(monkeypatch):
    """An allocation that fails in the fallback's own trial is tried again, not taken for disagreement."""
    setting, real, tried = Setting(tiny(tied=True), text((4, 4))), verification.sequence_gradients, []

    def once(*arguments: Any, **options: Any) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise OUT_OF_MEMORY["GPU"]
        real(*arguments, **options)

    monkeypatch.setattr(verification, "sequence_gradients", once)
    assert setting.plan().how == ONE_SEQUENCE and len(tried) == 2


def test_the_plan_is_made_on_the_longest_sequence_of_all_micro_batches():
    """A first micro-batch without targets would prove anything."""
    empty, full = text((3, 4), (3, 4))
    setting = Setting(redraw(Mixed(), seeded(1)), [(empty[0], torch.full_like(empty[1], -100)), full])
    assert "body.weight" not in first_plan(setting.objective, setting.partition).fallback
    assert "body.weight" in verified_plan(setting.objective, setting.batches, setting.partition).fallback


def test_a_call_that_starts_divided_needs_no_failure():
    setting = Setting(tiny(), text((5, 4)))
    plan = setting.plan()
    found = measured(setting, plan, division=2)
    assert found.division == 2 and relative(found.kernel, measured(setting, plan).kernel) < 1e-11


def test_parts_cover_each_micro_batch_in_order():
    batches = text((5, 3), (2, 4))
    objective = Setting(tiny(), batches).objective
    shares = objective.share(batches)
    for times in (1, 2, 3, 5, 64):
        parts = division._parts(objective, shares, times, [[5, 2]])
        for number, batch in enumerate(batches):
            mine = [part for part in parts if part.number == number]
            assert torch.equal(torch.cat([part.batch[0] for part in mine]), batch[0])
            assert [part.start for part in mine] == [0, *[part.stop for part in mine[:-1]]]
            assert max(part.stop - part.start for part in mine) <= -(-5 // times)


def test_main_memory_takes_the_excess_up_to_its_own_bound(monkeypatch):
    """As from a GPU: what is put by is counted, and its bound holds whatever the passes would hold."""
    setting = Setting(tiny(layers=3), text((4, 6), (4, 6)), rounds=2)
    plan, put = setting.plan(), []

    def noted(tensor: Tensor) -> Tensor:
        put.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(stream, "put_by", noted)
    truth = setting.truth()
    everything = setting.kernel(plan, memory=0, host_memory=2**31)
    assert put and relative(everything, truth) < 1e-11
    once = sum(put)
    put.clear()
    bound = once // 3
    assert relative(setting.kernel(plan, memory=0, host_memory=bound), truth) < 1e-11
    assert sum(put) > bound  # over several sweeps, none of which holds more
    assert passes_of(setting, plan, 0, host_memory=2**31)[0] == 1
    assert 1 < passes_of(setting, plan, 0, host_memory=bound)[0] < len(plan.taps)
