"""hessprobe: what curvature does a transformer's training throw away?

The public names load when first used, so that `import hessprobe` costs nothing and reading a log needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hessprobe.moved import keep_old_names

if TYPE_CHECKING:
    from hessprobe import optimization as optim
    from hessprobe.any_loop.recorder import Recorder
    from hessprobe.curvature.gauss_newton import GaussNewton
    from hessprobe.curvature.hessian import Hessian
    from hessprobe.curvature.residual import Residual
    from hessprobe.errors import RunFailed, UserError
    from hessprobe.estimation.block_norms import block_norms
    from hessprobe.estimation.density import SpectralDensity, spectral_density
    from hessprobe.estimation.hessian_trace import hessian_trace
    from hessprobe.estimation.lanczos import lanczos
    from hessprobe.estimation.sampling import Estimate
    from hessprobe.estimation.trace import hutchinson_trace, hutchpp_trace, xtrace
    from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
    from hessprobe.problem.objective import Objective
    from hessprobe.problem.partition import Partition
    from hessprobe.store.reader import open_run

__version__ = "0.1.0"

keep_old_names()

_HOMES = {
    "Estimate": "estimation.sampling",
    "GaussNewton": "curvature.gauss_newton",
    "Hessian": "curvature.hessian",
    "LayerKernels": "kernels.layer_kernels",
    "Objective": "problem.objective",
    "Partition": "problem.partition",
    "Recorder": "any_loop.recorder",
    "Residual": "curvature.residual",
    "RunFailed": "errors",
    "SpectralDensity": "estimation.density",
    "UserError": "errors",
    "block_norms": "estimation.block_norms",
    "hessian_trace": "estimation.hessian_trace",
    "hutchinson_trace": "estimation.trace",
    "hutchpp_trace": "estimation.trace",
    "layer_kernels": "kernels.layer_kernels",
    "lanczos": "estimation.lanczos",
    "open_run": "store.reader",
    "optim": "optimization",
    "spectral_density": "estimation.density",
    "xtrace": "estimation.trace",
}
_MODULES = {"optim"}  # whole stages that are public names
__all__ = [
    "Estimate",
    "GaussNewton",
    "Hessian",
    "LayerKernels",
    "Objective",
    "Partition",
    "Recorder",
    "Residual",
    "RunFailed",
    "SpectralDensity",
    "UserError",
    "block_norms",
    "hessian_trace",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos",
    "layer_kernels",
    "open_run",
    "optim",
    "spectral_density",
    "xtrace",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        home = import_module(f"hessprobe.{_HOMES[name]}")
        return home if name in _MODULES else getattr(home, name)
    raise AttributeError(f"module 'hessprobe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
