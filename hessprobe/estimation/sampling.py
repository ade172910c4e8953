"""Estimates with their standard errors, and the random probes they come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.machine.devices import sent


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimated quantity and its standard error, in one shape.

    Attributes:
        mean: the estimate.
        stderr: its standard error, from the spread of the samples.
        samples: how many independent samples it comes from.
    """

    mean: Tensor
    stderr: Tensor
    samples: int

    @classmethod
    def of(cls, samples: Tensor) -> Estimate:
        """Returns mean and standard error over the first dimension of (k, ...) independent samples."""
        k = samples.shape[0]
        check_samples(k)
        return cls(mean=samples.mean(0), stderr=samples.std(0) / math.sqrt(k), samples=k)

    @classmethod
    def jackknife(cls, samples: Tensor, statistic: Callable[[Tensor], Tensor]) -> Estimate:
        """Returns a smooth function of a mean, its bias of order 1/k removed (Quenouille 1956, Tukey 1958).

        Args:
            samples: (k, ...) independent samples.
            statistic: from the mean over samples (...) to the quantity, such as a ratio.
        """
        k = samples.shape[0]
        check_samples(k)
        total = samples.sum(0)
        whole = statistic(total / k)
        left_out = torch.stack([statistic((total - sample) / (k - 1)) for sample in samples])
        mean = k * whole - (k - 1) * left_out.mean(0)
        spread = (left_out - left_out.mean(0)).square().sum(0)
        return cls(mean=mean, stderr=(spread * (k - 1) / k).sqrt(), samples=k)


def check_samples(samples: int) -> None:
    """Raises a UserError where there are too few samples for a standard error."""
    if samples < 2:
        raise UserError(f"samples {samples}: a standard error needs at least 2")


def rademacher(
    k: int, p: int, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns (k, p) independent signs, +1 or -1 with equal probability, drawn from the generator.

    The draws happen on the generator's own device, so that a seed means the same numbers everywhere.
    """
    signs = torch.randint(0, 2, (k, p), generator=generator, device=generator.device, dtype=torch.int8)
    return sent(signs, torch.device(device)).to(dtype).mul_(2).sub_(1)


def log_interval(
    mean: Tensor, stderr: Tensor, freedom: Tensor | float, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Returns the ends of an interval for a positive, skewed quantity, mean exp(-+ t stderr / mean).

    By the delta method stderr / mean is the logarithm's error; t is Student's with so many degrees of freedom. Where the
    estimate is not positive the interval is mean -+ t stderr.

    Raises:
        UserError: a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, got {level}")
    quantile = stdtrit(torch.as_tensor(freedom, dtype=torch.float64).cpu().numpy(), (1 + level) / 2)
    spread = torch.as_tensor(quantile, dtype=mean.dtype, device=mean.device) * stderr
    factor = (spread / mean).exp()
    positive = mean > 0
    return torch.where(positive, mean / factor, mean - spread), torch.where(
        positive, mean * factor, mean + spread
    )
