"""Stored runs for comparisons: held-out losses of one's choice, written by the real store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hessprobe.schema.table import Table, Variable
from hessprobe.store.writer import RunWriter

CONTEXT = 64
COLUMNS = ("loss", "held_out_loss", "tokens", "line_search_tokens", "seconds", "gradient_equivalents")


def write_losses(
    folder: Path,
    losses: Sequence[float],
    *,
    method: str = "full_gn",
    learning_rate: float | None = 0.01,
    seed: int | None = 0,
    minibatches: int = 8,
    sequences: int = 4,
    optimizer: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    sha256: str = "ab12",
    recipe: dict[str, Any] | None = None,
    first_step: int = 0,
    **attributes: Any,
) -> Path:
    """Writes a run whose held-out losses after its steps are `losses` (NaN: not evaluated); returns its folder.

    A step reads minibatches x sequences x 64 tokens, half as many for a Gauss-Newton line search, takes 2 s (AdamW
    1 s) and costs 3 gradients a minibatch (AdamW 1).
    """
    tokens, newton = minibatches * sequences * CONTEXT, method.endswith("_gn")
    settings = {
        "name": folder.name,
        "seed": seed,
        "partition": "layer",
        "model": {"size": "nano", "context": None},
        "data": {"source": "stdlib", "held_out_fraction": 0.05, "held_out_sequences": 256},
        "optimizer": {"name": method, "learning_rate": learning_rate, "minibatches": minibatches,
                      "sequences": sequences} | (optimizer or {}),
        "training": {"steps": len(losses)} | (training or {}),
    } if recipe is None else recipe  # fmt: skip
    root = {
        "name": folder.name, "recipe": json.dumps(settings), "seed": seed, "device": "cpu",
        "data": json.dumps({"source": "text", "sha256": sha256, "tokens": 1000, "held_out_tokens": 50}),
    } | attributes  # fmt: skip
    variables = [Variable(name=n, dims=("step",), units="1", long_name=n, estimator="exact") for n in COLUMNS]
    with RunWriter.create(folder, root) as writer:
        table = Table(name="train", variables=tuple(variables), coordinates={})
        writer.add_table(table, range(first_step, first_step + len(losses)))
        for taken, loss in enumerate(losses, start=1):
            row = {
                "loss": loss,
                "held_out_loss": loss,
                "tokens": float(tokens * taken),
                "line_search_tokens": float(tokens // 2 * taken) if newton else 0.0,
                "seconds": (2.0 if newton else 1.0) * taken,
                "gradient_equivalents": (3.0 if newton else 1.0) * minibatches * taken,
            }
            writer.write("train", first_step + taken - 1, row)
    return folder


def falling(steps: int, after: int | None = None, *, start: float = 5.0, target: float = 2.0) -> list[float]:
    """Returns losses over `after` steps that first are at or below the target after `steps`, the default number of them."""
    slope = (start - target) / (steps - 0.5)
    return [start - slope * taken for taken in range(1, (after or steps) + 1)]


def write_study(root: Path) -> Path:
    """Writes what a study leaves: warm-ups, three methods with sweeps, AdamW at a batch and its double.

    Steps to 2.0: full_gn 10, 11, 12 (seeds 0, 1, 2) at rate 0.02 and 14 at 0.01 and 0.04; layerwise_gn 13, 14, 16;
    adamw 40, 44, 45 at its largest rate 0.03 and never at 0.01; adamw at twice the batch 39, 43, 46; soap with two
    seeds of three.
    """
    for seed in range(3):
        warm = root / "warm-up" / f"seed-{seed}"
        write_losses(warm, [6.0], method="adamw", learning_rate=None, seed=seed)
        start = {"training": {"stop_at": 2.0, "start_from": str(warm), "steps": 60}}

        def run(
            variant: str, rate: float, losses: list[float], seed: int = seed, start: Any = start, **more: Any
        ):
            folder = root / variant / f"learning_rate-{rate}" / f"seed-{seed}"
            write_losses(folder, losses, learning_rate=rate, seed=seed, **start, **more)

        run("full-gn", 0.02, falling((10, 11, 12)[seed]), method="full_gn")
        run("layerwise-gn", 0.02, falling((13, 14, 16)[seed]), method="layerwise_gn")
        run("adamw", 0.03, falling((40, 44, 45)[seed]), method="adamw")
        double = {"method": "adamw", "minibatches": 16}
        run("adamw-double", 0.03, falling((39, 43, 46)[seed]), **double)
        run("soap", 0.01, falling((20, 24, 90)[seed], (20, 24, 60)[seed]), method="soap")
        if seed == 0:
            run("full-gn", 0.01, falling(14), method="full_gn")
            run("full-gn", 0.04, falling(14), method="full_gn")
            run("adamw", 0.01, falling(80, 60), method="adamw")
            run("adamw-double", 0.1, falling(50), **double)
    return root
