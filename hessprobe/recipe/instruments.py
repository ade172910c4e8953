"""The sections of the instruments: what each probe measures, how often, and how much it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hessprobe.schema.section import Positive, Section

Preset = Literal["light", "standard", "deep"]
AboveZero = Annotated[float, Field(gt=0)]

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
PRECONDITIONER_PRESETS: dict[str, dict[str, Any]] = {
    "standard": {
        "curvature_sequences": (32, 64, 128, 256), "held_out_sequences": 256, "draws": 2,
        "dampings": (0.1, 0.01, 0.001), "cg_iterations": 60, "condition_steps": 20,
    },
    "deep": {
        "curvature_sequences": (64, 128, 256, 512), "held_out_sequences": 512, "draws": 4,
        "dampings": (0.1, 0.01, 0.001), "cg_iterations": 200, "condition_steps": 40,
    },
}  # fmt: skip
# Built into the preconditioner probe, in the order of its table. "update" is the step the run really took.
CANDIDATES = (
    "gradient", "update", "adam", "sophia", "muon", "shampoo", "soap", "kfac", "ekfac", "diagonal_gn",
    "layerwise_gn", "full_gn",
)  # fmt: skip


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
        return _filled(given, GN_HESSIAN_PRESETS)

    @field_validator("alphas")
    @classmethod
    def _alphas_rise(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        _check_rising("alphas", given)
        return given


class PreconditionerRecipe(Section):
    """The probe of how much of the damped Gauss-Newton decrease each preconditioner reaches.

    preset: sets what is not given: light, standard, deep.
    curvature_sequences: sizes of the nested batches that candidates are built on; the last is "the" batch.
    held_out_sequences: on which they are judged, unseen by every candidate; in `folds` groups for the errors.
    draws: how often it is all done again with other curvature batches, for errors over them.
    dampings: mu of the candidates and of the judgement alike; the first is that of block-by-block quantities.
    candidates: names of CANDIDATES, or "package.module:function" with function(gradient (p,), snapshot) -> direction (p,).
    groups: numbers of contiguous groups of blocks, each a candidate `grouped_gn_N` between layerwise and full.
    groupings: groups of blocks by name, each a candidate `grouped_gn_NAME`.
    condition_steps: Lanczos steps for condition numbers and Ritz values of linear candidates; 0 leaves them out.
    """

    every: Positive = 9
    preset: Preset = "light"
    curvature_sequences: tuple[Positive, ...] = Field(default=(16, 32, 64), min_length=1)
    held_out_sequences: Positive = 64
    folds: int = Field(default=16, ge=2)
    draws: Positive = 1
    dampings: tuple[AboveZero, ...] = Field(default=(0.1, 0.03), min_length=1)
    candidates: tuple[str, ...] = Field(default=CANDIDATES, min_length=1)
    groups: tuple[Positive, ...] = ()
    groupings: dict[str, tuple[tuple[str, ...], ...]] = {}
    cg_iterations: Positive = 20
    cg_tolerance: float = Field(default=0.01, gt=0, lt=1)
    condition_steps: int = Field(default=0, ge=0)
    memory_mib: Positive | None = None

    @property
    def sequences(self) -> int:
        """All sequences a row reads: every draw's largest curvature batch, and the held-out ones."""
        return self.draws * self.curvature_sequences[-1] + self.held_out_sequences

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates as the table names them, groupings included."""
        grouped = (
            *(f"grouped_gn_{n}" for n in self.groups),
            *(f"grouped_gn_{name}" for name in self.groupings),
        )
        own = tuple(dict.fromkeys(name.rpartition(":")[2] for name in self.candidates))
        return (*own, *grouped)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        return _filled(given, PRECONDITIONER_PRESETS)

    @field_validator("curvature_sequences")
    @classmethod
    def _sizes_rise(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        _check_rising("curvature_sequences", given)
        return given

    @field_validator("dampings")
    @classmethod
    def _dampings_differ(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(given)) != len(given):
            raise ValueError("dampings: wanted each once")
        return given

    @field_validator("candidates")
    @classmethod
    def _candidates_exist(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name not in CANDIDATES and ":" not in name:
                raise ValueError(
                    f"candidate {name!r} does not exist; valid: {', '.join(CANDIDATES)}, or your own as "
                    "'package.module:function'"
                )
        return given

    @model_validator(mode="after")
    def _names_differ(self) -> PreconditionerRecipe:
        if len(self.names) != len(self.candidates) + len(self.groups) + len(self.groupings):
            raise ValueError(f"candidates need names of their own: {', '.join(self.names)}")
        return self


def _filled(given: Any, presets: dict[str, dict[str, Any]]) -> Any:
    """Returns a section's values with those of its preset where none was given; an unknown preset is left to the check."""
    if not isinstance(given, dict):
        return given
    preset = presets.get(str(given.get("preset")), {})
    return {**preset, **{key: value for key, value in given.items() if value is not None}}


def _check_rising(name: str, given: Sequence[float]) -> None:
    if list(given) != sorted(set(given)):
        raise ValueError(f"{name}: wanted rising values, each once, got {list(given)}")
