"""Harmlessness: what measuring must leave alone. Weights bit for bit, memory, time of idle steps, runs that are killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessprobe.any_loop.recorder import Recorder
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.validation.children import ALONE, COMMAND_LINE, Child, train_words, write_text
from hessprobe.validation.figures import Figure, check, failure, holds, measured, skipped
from hessprobe.validation.modes import deterministic
from hessprobe.validation.rows import OPTIONS
from hessprobe.validation.runner import Bench
from hessprobe.validation.timing import bytes_alive, forget, synchronize

STEPS, EVERY = 50, 30
# Microseconds of a call that is not due. A busy machine's are its scheduler's, so the shrunken run allows more.
NOT_DUE = {False: 10.0, True: 50.0}
CALLS, TRIES = 500, 20
LONGEST = 150.0  # seconds for a child: one that hangs must not take the other stages' time
CHECKPOINT = Path("checkpoint") / "state.pt"


def harmlessness(bench: Bench) -> Iterator[Figure]:
    """Yields the figures of a loop, probed and not, and of runs that were killed."""
    yield from _loops(bench)
    yield from _idle(bench)
    try:
        yield from _killed(bench)
    except (TimeoutError, RuntimeError, OSError) as error:
        yield failure("kill -9 and resume", error)


def _model(device: torch.device) -> nn.Module:
    config = DecoderConfig(layers=2, width=32, feedforward=64, heads=2, vocabulary=64, context=32)
    return Decoder(config, generator=torch.Generator().manual_seed(0)).to(device)


def _trained(bench: Bench, folder: Path | None) -> tuple[list[np.ndarray], list[str]]:
    """Returns weights and optimizer state after STEPS steps, and why rows failed: no tensors, which are counted."""
    model = _model(bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = None
    if folder is not None:
        recorder = Recorder(folder, model, dict(OPTIONS), every=EVERY, optimizer=optimizer)
    reasons = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 64, (8, 33), generator=generator).to(bench.device)
        batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()
        optimizer.step()
        if recorder is not None:
            reasons += [f"{m.probe}: {m.failure}" for m in recorder(step, batch) if m.failure]
            if not recorder.active:
                reasons.append("recording has stopped")
    if recorder is not None:
        recorder.close()
    states = [
        x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)
    ]  # moments and step counts
    return [p.detach().cpu().numpy().copy() for p in (*model.parameters(), *states)], reasons


def _loops(bench: Bench) -> Iterator[Figure]:
    with deterministic():
        bare, _ = _trained(bench, None)
        again, _ = _trained(bench, None)
        before = bytes_alive(bench.device)
        probed, reasons = _trained(bench, bench.folder / "probed")
        forget(bench.device)
        after = bytes_alive(bench.device)
    same = all(np.array_equal(a, b) for a, b in zip(bare, again, strict=True))
    yield holds(f"{STEPS} steps twice without probes: weights the same bit for bit", same)
    rows = len(range(0, STEPS, EVERY)) * len(OPTIONS)
    same = all(np.array_equal(a, b) for a, b in zip(bare, probed, strict=True))
    yield holds(
        f"{STEPS} steps, {rows} rows of all instruments: weights and optimizer the same bit for bit", same
    )
    yield check(
        "rows that failed meanwhile", len(reasons), 0, "rows", note="; ".join(sorted(set(reasons)))[:300]
    )
    # What libraries keep once they have started (workspaces) is no leak; a held copy of theta for each row would be.
    grown = max(0.0, after - before) / sum(x.nbytes for x in bare)
    yield check("memory held after the recorder is closed", grown, 1.0, "of weights and optimizer")


def _idle(bench: Bench) -> Iterator[Figure]:
    model = _model(bench.device)
    recorder = Recorder(bench.folder / "idle", model, ["cross_layer"], every=[0])
    batch = (torch.zeros(1, 4, dtype=torch.long, device=bench.device),) * 2
    spent, step = [], 1
    for _ in range(TRIES):
        synchronize(bench.device)
        began = time.perf_counter()
        for _ in range(CALLS):
            recorder(step, batch)
            step += 1
        synchronize(bench.device)
        spent.append((time.perf_counter() - began) / CALLS * 1e6)
    recorder.close()
    yield check(
        "a recorder's call that is not due, fastest of 20 tries",
        min(spent),
        NOT_DUE[bench.small],
        "microseconds",
    )
    yield measured("a recorder's call that is not due, median", sorted(spent)[TRIES // 2], "microseconds")


def _killed(bench: Bench) -> Iterator[Figure]:
    """A run of the command line is killed at its second checkpoint and resumed, another one is not."""
    left = min(bench.budget.left, LONGEST)
    if left < 20:
        yield skipped("kill -9 and resume", f"{left:.0f} s are left, and it takes 20")
        return
    steps, device = 12, str(bench.device)
    text = write_text(bench.folder / "text.txt")
    whole, cut = bench.folder / "whole", bench.folder / "cut"

    def started(folder: Path, *more: str) -> Child:
        log = bench.folder / f"{folder.name}{'-resumed' * bool(more)}.log"
        return Child(ALONE, COMMAND_LINE, train_words(folder, text, device, steps, *more), log)

    children = [started(cut), started(whole)]
    try:
        if children[0].wait_for(cut / CHECKPOINT, left):
            first = (cut / CHECKPOINT).stat().st_mtime_ns
            while children[0].process.poll() is None and (cut / CHECKPOINT).stat().st_mtime_ns == first:
                time.sleep(0.005)
        status = children[0].kill()
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the run to be killed ended with {status}: {children[0].last_words}")
        reached = _state(cut)["step"]
        children.append(started(cut, "--resume"))
        children[1].succeeded(left)
        children[2].succeeded(left)
    finally:
        for child in children:
            if child.process.poll() is None:
                child.kill()
    note = f"killed after {reached} of {steps} steps" if status else "it ended before it could be killed"
    one, other = _state(whole)["parameters"], _state(cut)["parameters"]
    yield holds(
        "hessprobe train, kill -9, --resume: weights as of a run never cut off", torch.equal(one, other), note
    )


def _state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / CHECKPOINT, weights_only=True, map_location="cpu")
