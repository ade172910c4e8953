"""One row of an instrument on a small model, in any precision on any device, and how far two rows are apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessprobe.measuring.row_recorder import build_probes
from hessprobe.measuring.snapshots import Snapshots
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import build_recipe
from hessprobe.validation.modes import BFLOAT16, Autocast, matmuls

INSTRUMENTS = ("cross_layer", "gn_hessian", "preconditioner")
# Small enough for seconds on one core, and every variable is still there.
OPTIONS: dict[str, dict[str, Any]] = {
    "cross_layer": {"sequences": 8, "rounds": 2},
    "gn_hessian": {"sequences": 4, "samples": 2, "lanczos_steps": 3, "lanczos_probes": 1, "cg_iterations": 3},
    "preconditioner": {
        "curvature_sequences": [4], "held_out_sequences": 4, "folds": 2, "dampings": [0.1], "cg_iterations": 3,
    },
}  # fmt: skip
CONFIG = DecoderConfig(layers=2, width=16, feedforward=32, heads=2, vocabulary=32, context=16)
# Clocks, counts, and what is rounding itself.
_NOT_COMPARED = (
    "seconds", "peak_memory", "gradient_equivalents", "tokens", "sequences", "damping", "fold_tokens", "symmetry_gap",
)  # fmt: skip


def row_of(
    instrument: str, options: Mapping[str, Any], device: torch.device, precision: str = "float32"
) -> dict[str, Any]:
    """Returns one row of an instrument on a small decoder; the same model, batch and seed for every device and precision.

    Args:
        precision: "float64", "float32", "TF32", or "bfloat16": a model whose forward pass runs under autocast.
    """
    dtype = torch.float64 if precision == "float64" else torch.float32
    model: nn.Module = Decoder(CONFIG, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    if precision == BFLOAT16:
        model = Autocast(model)
    recipe = build_recipe({"probes": [instrument], instrument: dict(options)})
    (probe,) = build_probes(recipe)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(
        0, CONFIG.vocabulary, (probe.sequences, CONFIG.context + 1), generator=generator
    ).to(device)
    partition = Partition.of(model)
    theta = partition.vector(model)
    update = 0.01 * torch.randn(partition.size, generator=torch.Generator().manual_seed(3))
    batches = [(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())]
    snapshots = Snapshots(objective=Objective(model), partition=partition, seed=0)
    snapshot = snapshots.take(0, batches, update=update.to(theta))
    with matmuls(precision):
        return dict(probe.measure(snapshot))


def compared(found: Mapping[str, Any], wanted: Mapping[str, Any], *, strict: bool = True) -> dict[str, float]:
    """Returns |found - wanted| / |wanted| of every numeric variable that both rows hold, clocks and counts left out.

    Entries that are NaN in both do not count; where `wanted` is zero the difference itself is returned.

    Args:
        strict: whether an entry that is a number in one row alone makes its variable's difference infinite, or is left out.
    """
    gaps = {}
    for name, value in wanted.items():
        a, b = _numbers(found.get(name)), _numbers(value)
        if name in _NOT_COMPARED or a is None or b is None:
            continue
        there = np.isfinite(a) & np.isfinite(b) if a.shape == b.shape else np.zeros(0, dtype=bool)
        if a.shape != b.shape or (strict and unmatched(found, wanted, name)):
            gaps[name] = float("inf")
        elif there.any():
            size, gap = np.linalg.norm(b[there]), np.linalg.norm(a[there] - b[there])
            gaps[name] = float(gap / size) if size else float(gap)
    return gaps


def unmatched(found: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> int:
    """Returns how many entries of a variable are a number in one of two rows alone."""
    a, b = _numbers(found[name]), _numbers(wanted[name])
    assert a is not None and b is not None
    return int((np.isfinite(a) != np.isfinite(b)).sum())


def _numbers(value: Any) -> np.ndarray | None:
    if isinstance(value, Tensor):
        return value.detach().double().cpu().numpy()
    found = np.asarray(value) if value is not None else np.zeros(0, dtype="U1")
    return found.astype(np.float64) if found.dtype.kind in "fiub" else None
