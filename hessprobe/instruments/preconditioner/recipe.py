"""The settings of the probe of preconditioners."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from hessprobe.instruments.preconditioner.candidates import BUILT_IN, known_candidates
from hessprobe.schema.presets import AboveZero, Preset, check_rising, filled
from hessprobe.schema.section import Positive, Section

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

# Built into the preconditioner probe, in the order of its table.
CANDIDATES = tuple(BUILT_IN)
GROUPED = "grouped_gn_"  # what names of exact solves by groups of blocks begin with


class PreconditionerRecipe(Section):
    """The probe of how much of the damped Gauss-Newton decrease each preconditioner reaches.

    preset: sets what is not given: light, standard, deep.
    curvature_sequences: sizes of the nested batches that candidates are built on; the last is "the" batch.
    held_out_sequences: on which they are judged, unseen by every candidate; in `folds` groups for the errors.
    draws: how often it is all done again with other curvature batches, for errors over them.
    dampings: mu of the candidates and of the judgement alike; the first is that of block-by-block quantities.
    candidates: names of CANDIDATES or of those that installed packages bring (entry points `hessprobe.candidates`), or
        "package.module:function" with function(gradient (p,), snapshot) -> direction (p,).
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
            *(f"{GROUPED}{n}" for n in self.groups),
            *(f"{GROUPED}{name}" for name in self.groupings),
        )
        own = tuple(dict.fromkeys(name.rpartition(":")[2] for name in self.candidates))
        return (*own, *grouped)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        return filled(given, PRECONDITIONER_PRESETS)

    @field_validator("curvature_sequences")
    @classmethod
    def _sizes_rise(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        check_rising("curvature_sequences", given)
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
            if name not in BUILT_IN and ":" not in name and name not in (known := known_candidates()):
                raise ValueError(
                    f"candidate {name!r} does not exist; valid: {', '.join(known)}, or your own as "
                    "'package.module:function'"
                )
        return given

    @model_validator(mode="after")
    def _names_differ(self) -> PreconditionerRecipe:
        if len(self.names) != len(self.candidates) + len(self.groups) + len(self.groupings):
            raise ValueError(f"candidates need names of their own: {', '.join(self.names)}")
        return self
