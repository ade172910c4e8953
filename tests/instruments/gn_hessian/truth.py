"""The instrument gn_hessian on a case, beside what the dense matrices say."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hessprobe.instruments.gn_hessian.measure.probe import GNHessianProbe
from hessprobe.instruments.gn_hessian.table import MATRICES
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.recipe import GNHessianRecipe
from tests.cases import Case

SEEDS, DAMPING = 16, 4.0
ALPHAS = (0.01, 0.5, 1.0)


def snapshot_of(case: Case, seed: int = 0) -> Snapshot:
    return Snapshot(
        step=3, objective=case.objective, partition=case.partition, seed=seed,
        parameters=case.partition.vector(case.problem.model), batches=list(case.problem.batches),
        update=0.1 * case.rows(1, seed=9)[0],
    )  # fmt: skip


def probe(**options: Any) -> GNHessianProbe:
    given = {"samples": 2, "lanczos_steps": 2, "lanczos_probes": 1, "alphas": ALPHAS, "damping": DAMPING}
    solve = {"cg_iterations": 300, "cg_tolerance": 1e-12}
    return GNHessianProbe(GNHessianRecipe(**{**given, **solve, **options}))  # type: ignore[arg-type]


@cache
def case_of(name: str) -> Case:
    return Case.of(name)


def matrices(case: Case) -> list[Tensor]:
    return [getattr(case.truth, name) for name in MATRICES]


def truths(case: Case) -> dict[str, Tensor]:
    """Returns what norms, traces and ratios estimate, whole and by block, under the table's names."""
    found: dict[str, Tensor] = {}
    blocks = [[matrix[where, where] for where in case.slices] for matrix in matrices(case)]
    for prefix, each in (("", [[m] for m in matrices(case)]), ("block_", blocks)):
        fro2 = torch.stack([torch.stack([a.square().sum() for a in row]) for row in each])
        overlap = torch.stack([(h * g).sum() for g, h in zip(each[0], each[1], strict=True)])
        found |= {
            f"{prefix}fro2": fro2,
            f"{prefix}trace": torch.stack([torch.stack([a.trace() for a in row]) for row in each]),
            f"{prefix}gn_gap": (fro2[2] / fro2[0]).sqrt(),
            f"{prefix}cosine": overlap / (fro2[0] * fro2[1]).sqrt(),
        }
    return {name: x if name.startswith("block_") else x.squeeze(-1) for name, x in found.items()}
