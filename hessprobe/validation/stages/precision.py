"""The precision of every stored quantity: each variable of each instrument's row beside the same row in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hessprobe.validation.figures import Figure, check, failure, measured, skipped
from hessprobe.validation.modes import BFLOAT16, FLOAT32, precisions
from hessprobe.validation.rows import INSTRUMENTS, OPTIONS, compared, row_of, unmatched
from hessprobe.validation.runner import Bench

# What has no solver, no small difference and no bfloat16 of its own (Muon's) in it must be as good as float32 is.
STEADY = {
    "cross_layer.loss", "cross_layer.fro2", "cross_layer.gradient_norm2", "gn_hessian.loss", "gn_hessian.fro2",
    "gn_hessian.trace", "preconditioner.loss", "preconditioner.optimal_decrease",
}  # fmt: skip
LIMIT = 1e-3


def precision(bench: Bench) -> Iterator[Figure]:
    """Yields a measurement for every variable, and a check of the steady ones in float32."""
    for instrument in INSTRUMENTS:
        truth = row_of(instrument, OPTIONS[instrument], torch.device("cpu"), "float64")
        for how in precisions(bench.device):
            words = "bfloat16 autocast" if how == BFLOAT16 else how
            try:
                row = row_of(instrument, OPTIONS[instrument], bench.device, how)
            except Exception as error:
                name = f"{instrument} in {words}"
                # A model may refuse to be differentiated twice in half precision; in float32 it must not.
                yield skipped(name, str(error)[:300]) if how == BFLOAT16 else failure(name, error)
                continue
            for variable, gap in compared(row, truth, strict=False).items():
                name = f"{instrument}.{variable} in {words}"
                lost = unmatched(row, truth, variable)
                note = f"{lost} entries are a number in one of the two alone" if lost else ""
                if how == FLOAT32 and f"{instrument}.{variable}" in STEADY:
                    yield check(name, gap, LIMIT, "relative", note=note)
                else:
                    yield measured(name, gap, "relative", note)
            gap = float(row["symmetry_gap"])
            yield measured(f"{instrument}.symmetry_gap in {words}, itself", gap, "relative")
