"""torchrun and fully_shard with one process: the path that sharded runs take, NCCL on GPUs and gloo on CPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from hessprobe.validation.children import ALONE, COMMAND_LINE, ONE_PROCESS, Child, train_words, write_text
from hessprobe.validation.figures import Figure, check, failure, holds, measured
from hessprobe.validation.runner import Bench

SHARDED = "hessprobe.validation.sharded_loop"
ROW = 1e-4  # relative, of sums in another order
STEPS = 4


def processes(bench: Bench) -> Iterator[Figure]:
    """Yields hessprobe train under torchrun beside a plain run, and a loop under fully_shard."""
    text = write_text(bench.folder / "processes.txt")
    folders = {name: bench.folder / f"processes-{name}" for name in ("plain", "torchrun")}
    launchers = {"plain": ALONE, "torchrun": ONE_PROCESS}
    left = min(150.0, max(5.0, bench.budget.left - 2))
    children = {
        name: Child(
            launchers[name],
            COMMAND_LINE,
            train_words(folder, text, bench.device.type, STEPS),
            bench.folder / f"processes-{name}.log",
        )
        for name, folder in folders.items()
    }
    out = bench.folder / "sharded.json"
    words = [bench.device.type, str(out), str(bench.folder / "sharded")]
    children["fully_shard"] = Child(ONE_PROCESS, SHARDED, words, bench.folder / "processes-fully_shard.log")
    try:
        yield from _torchrun(children, folders, left)
    except (RuntimeError, TimeoutError, OSError) as error:
        yield failure("torchrun hessprobe train", error)
    try:
        children["fully_shard"].succeeded(left)
        found = json.loads(out.read_text(encoding="utf-8"))
    except (RuntimeError, TimeoutError, OSError, ValueError) as error:
        yield failure("fully_shard", error)
    else:
        backend = f"backend {found['backend']}"
        yield holds(
            "fully_shard: weights the same bit for bit with and without a Recorder", found["same"], backend
        )
        yield check(
            "fully_shard: rows that failed",
            len(found["failures"]),
            0,
            "rows",
            note="; ".join(found["failures"]),
        )
        for name, gap in found["gaps"].items():
            yield check(f"fully_shard: {name} beside the model not sharded", gap, ROW, "relative")
        yield measured("fully_shard: seconds of a row", found["seconds"], "s")
    finally:
        for child in children.values():
            if child.process.poll() is None:
                child.kill()


def _torchrun(children: dict[str, Child], folders: dict, left: float) -> Iterator[Figure]:
    for name in folders:
        children[name].succeeded(left)
    one, other = (
        torch.load(folder / "checkpoint" / "state.pt", weights_only=True, map_location="cpu")["parameters"]
        for folder in folders.values()
    )
    gap = float((one - other).norm() / one.norm())
    yield check(
        "torchrun --nproc-per-node 1 hessprobe train beside a plain run: weights", gap, ROW, "relative"
    )
