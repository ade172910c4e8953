"""The settings of the probe of cross-layer coupling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hessprobe.schema.section import Positive, Section


class CrossLayerRecipe(Section):
    """The probe of cross-layer coupling.

    method: "kernels" (every pair of layers from `rounds` backward passes) or "products" (the reference estimator,
    layers x samples Gauss-Newton products). quantity: "population" or "batch", see LayerKernels.block_norms.
    matrix: whose blocks; the Hessian and the residual H - G have no kernel form, so they take products.
    jacobi_damping: mu of jacobi_radius.
    memory_mib: what the kernels' passes, or a chunk of products, may take beside the model; None takes 2048 and 512.
    coupling_error: rounds are doubled until the mean standard error of the coupling is below, or max_rounds reached.
    """

    every: Positive = 3
    method: Literal["kernels", "products"] = "kernels"
    sequences: int = Field(default=64, ge=3)
    rounds: Positive = 1
    cotangent: Literal["sampled", "sign", "empirical"] = "sampled"
    quantity: Literal["population", "batch"] = "population"
    samples: int = Field(default=8, ge=2)
    matrix: Literal["gauss_newton", "hessian", "residual"] = "gauss_newton"
    jacobi_damping: float = Field(default=0.1, gt=0)
    memory_mib: Positive | None = None
    coupling_error: float | None = Field(default=None, gt=0)
    max_rounds: Positive = 8

    @property
    def uses_kernels(self) -> bool:
        """Whether block norms come from layer kernels."""
        return self.method == "kernels" and self.matrix == "gauss_newton"

    @property
    def attempts(self) -> tuple[int, ...]:
        """The rounds a row takes: those it begins with, then twice as many each time until `coupling_error` is met."""
        found, most = [self.rounds], self.most_rounds
        while found[-1] < most:
            found.append(min(2 * found[-1], most))
        return tuple(found)

    @property
    def most_rounds(self) -> int:
        """The most rounds a row can take."""
        return self.rounds if self.coupling_error is None else max(self.rounds, self.max_rounds)

    @model_validator(mode="after")
    def _batch_needs_rounds(self) -> CrossLayerRecipe:
        if self.quantity == "batch" and self.rounds < 2:
            raise ValueError("quantity 'batch' needs pairs of rounds: set rounds to 2 or more")
        return self
