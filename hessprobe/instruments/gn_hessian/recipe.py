"""The settings of the probe of the Gauss-Newton matrix against the Hessian."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from hessprobe.schema.presets import AboveZero, Preset, check_rising, filled
from hessprobe.schema.section import Positive, Section

# What a preset changes from the light one, which the sections' own defaults are; a value given beside it wins.
GN_HESSIAN_PRESETS: dict[str, dict[str, Any]] = {
    "standard": {
        "sequences": 64, "samples": 12, "block_samples": 4, "lanczos_steps": 20, "lanczos_probes": 2,
        "alphas": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0), "cg_iterations": 30,
    },
    "deep": {
        "sequences": 256, "samples": 32, "block_samples": 8, "lanczos_steps": 48, "lanczos_probes": 4,
        "alphas": (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0), "cg_iterations": 80,
    },
}  # fmt: skip


class GNHessianRecipe(Section):
    """The probe of the Gauss-Newton matrix against the Hessian.

    preset: sets what is not given: light (some 200 gradients of 16 sequences for six blocks), standard (500 of 64), deep
    (2,000 of 256).
    samples: probes for norms and traces of the whole matrices; block_samples: for each diagonal block.
    lanczos_steps, lanczos_probes: length and number of the Lanczos runs behind Ritz values and densities.
    density_blocks: blocks whose own densities are wanted, at the same cost each.
    alphas: step lengths of the model-error ladder, as multiples of the direction.
    damping, cg_iterations, cg_tolerance: of the Gauss-Newton step that is one of the directions.
    memory_mib: what a chunk of products may take beside the model; None takes 512.
    """

    every: Positive = 6
    preset: Preset = "light"
    sequences: Positive = 16
    samples: int = Field(default=6, ge=2)
    block_samples: int = Field(default=2, ge=2)
    lanczos_steps: int = Field(default=8, ge=2)
    lanczos_probes: Positive = 2
    density_blocks: tuple[str, ...] = ()
    alphas: tuple[AboveZero, ...] = Field(default=(0.25, 0.5, 1.0, 2.0), min_length=1)
    damping: float = Field(default=0.1, gt=0)
    cg_iterations: Positive = 10
    cg_tolerance: float = Field(default=0.01, gt=0, lt=1)
    memory_mib: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        return filled(given, GN_HESSIAN_PRESETS)

    @field_validator("alphas")
    @classmethod
    def _alphas_rise(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        check_rising("alphas", given)
        return given
