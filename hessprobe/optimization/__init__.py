"""Steps: from a batch of data to new parameters, by Gauss-Newton or by a baseline. Public as `hessprobe.optim`.

The public names load when first used, so that importing one stage does not cost the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hessprobe.optimization.baselines import FirstOrderOptimizer
    from hessprobe.optimization.gauss_newton import GaussNewton
    from hessprobe.optimization.inner_problem import GaussNewtonSettings
    from hessprobe.optimization.report import StepReport

_HOMES = {
    "FirstOrderOptimizer": "baselines",
    "GaussNewton": "gauss_newton",
    "GaussNewtonSettings": "inner_problem",
    "StepReport": "report",
}
__all__ = ["FirstOrderOptimizer", "GaussNewton", "GaussNewtonSettings", "StepReport"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f"hessprobe.optimization.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hessprobe.optimization' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
