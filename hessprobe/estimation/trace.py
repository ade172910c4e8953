"""tr A from products: Hutchinson (1989), Hutch++ (Meyer et al. 2021) and XTrace (Epperly et al. 2024).

E[v.A v] = tr A for signs v. Hutch++ and XTrace spend part of their products on A's leading range; they come
from curvlinops and give no error of their own, so theirs is the spread over independent repetitions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.estimation.sampling import Estimate, check_samples, rademacher


def hutchinson_trace(operator: CurvatureOperator, samples: int, *, generator: torch.Generator) -> Estimate:
    """Returns tr A with its standard error, which falls as 1/sqrt(samples).

    Cost: `samples` products. Source: Hutchinson 1989.

    Raises:
        UserError: fewer than 2 samples.
    """
    check_samples(samples)
    v = rademacher(samples, operator.size, generator=generator, dtype=operator.dtype, device=operator.device)
    return Estimate.of((v * operator.apply(v)).sum(1))


def hutchpp_trace(
    operator: CurvatureOperator, samples: int, *, repetitions: int = 2, generator: torch.Generator
) -> Estimate:
    """Returns tr A by Hutch++, its error from independent repetitions.

    Cost: `samples * repetitions` products; `samples` a multiple of 3. Source: Meyer et al. 2021, algorithm 1.

    Raises:
        UserError: `samples` is not a positive multiple of 3, or fewer than 2 repetitions.
    """
    if samples < 3 or samples % 3:
        raise UserError(f"hutchpp_trace: samples must be a positive multiple of 3, got {samples}")
    from curvlinops import hutchpp_trace as estimator

    return _repeated(estimator, operator, samples, repetitions, generator)


def xtrace(
    operator: CurvatureOperator, samples: int, *, repetitions: int = 2, generator: torch.Generator
) -> Estimate:
    """Returns tr A by XTrace, its error from independent repetitions.

    Cost: `samples * repetitions` products; `samples` even. Source: Epperly, Tropp, Webber 2024.

    Raises:
        UserError: `samples` is not a positive even number, or fewer than 2 repetitions.
    """
    if samples < 2 or samples % 2:
        raise UserError(f"xtrace: samples must be a positive even number, got {samples}")
    from curvlinops import xtrace as estimator

    return _repeated(estimator, operator, samples, repetitions, generator)


def _repeated(
    estimator: Callable[..., Any],
    operator: CurvatureOperator,
    samples: int,
    repetitions: int,
    generator: torch.Generator,
) -> Estimate:
    check_samples(repetitions)
    if samples >= operator.size:
        raise UserError(
            f"samples must be below p = {operator.size:,}, got {samples}: p products give the trace exactly (to_dense)"
        )
    view = operator.to_curvlinops()
    found: list[Tensor] = []
    seeds = torch.randint(2**62, (repetitions,), generator=generator, device=generator.device).tolist()
    devices = [operator.device] if operator.device.type == "cuda" else []
    for seed in seeds:
        # curvlinops draws from torch's global generator: it is lent ours, and put back.
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)  # noqa: TID251
            found.append(torch.as_tensor(estimator(view, samples), dtype=operator.dtype))
    return Estimate.of(torch.stack(found))
