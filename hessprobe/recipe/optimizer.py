"""The recipe of one outer step: which optimizer, on how much data, and which combinations exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from hessprobe.schema.optimizers import ENTRIES, inner_order
from hessprobe.schema.section import Positive, Section

_FIRST_ORDER = tuple(name for name in inner_order() if ENTRIES[name].inner_learning_rate)
# What solves the inner problem of which Gauss-Newton: conjugate gradients need a quadratic one.
GAUSS_NEWTON: dict[str, tuple[str, ...]] = {
    "full_gn": (*_FIRST_ORDER, "cg"),
    "layerwise_gn": (*_FIRST_ORDER, "cg"),
    "prox_linear": _FIRST_ORDER,
}
OPTIMIZERS: tuple[str, ...] = (*GAUSS_NEWTON, *ENTRIES)
if TYPE_CHECKING:
    OptimizerName = InnerSolver = str
else:
    OptimizerName = Literal[OPTIMIZERS]
    InnerSolver = Literal[GAUSS_NEWTON["full_gn"]]
_EXISTING = (
    f"full_gn and layerwise_gn, each with inner_solver {', '.join(_FIRST_ORDER)} or cg; prox_linear with structure full "
    f"or layerwise and inner_solver {', '.join(_FIRST_ORDER[:-1])} or {_FIRST_ORDER[-1]}; {', '.join(ENTRIES)} without a "
    "structure"
)


class OptimizerRecipe(Section):
    """One outer step reads `minibatches` x `sequences` sequences, whatever the optimizer.

    batch: sequences of an outer batch, another way to say `minibatches`: batch / sequences.
    structure: of prox_linear, "full" or "layerwise". None is what the optimizer's name says.
    learning_rate: of the inner steps for Gauss-Newton. None takes the default of the optimizer.
    learning_rate_warmup: steps over which a baseline's learning rate rises, after the steps of the warm-up.
    inner_steps: of one Gauss-Newton step, over the minibatches in turn. None takes one each.
    damping: multiple of the identity added to Gauss-Newton's or K-FAC's matrix. None takes the optimizer's default.
    cg_iterations, cg_tolerance: of the inner solver "cg". None takes its default.
    refresh: steps between two preconditioners of soap, shampoo, sophia, kfac. None takes the optimizer's default.
    line_search_grid: how many step sizes 2^(-i/2). None takes 5 for full and 10 for layerwise, as the study does.
    line_search_minibatches: fresh minibatches that judge step sizes. None takes as many as `minibatches`, as the
    reference study does.
    warmup_steps: outer steps of AdamW (a step a minibatch) before the optimizer proper.
    """

    name: OptimizerName = "full_gn"
    minibatches: Positive = 8
    sequences: Positive = 32
    batch: Positive | None = None
    structure: Literal["full", "layerwise"] | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    learning_rate_warmup: int = Field(default=0, ge=0)
    schedule: Literal["global-cosine", "inner-cosine", "constant"] = "global-cosine"
    inner_solver: InnerSolver = "muon"
    inner_steps: Positive | None = None
    damping: float | None = Field(default=None, ge=0)
    cg_iterations: Positive | None = None
    cg_tolerance: float | None = Field(default=None, gt=0, lt=1)
    refresh: Positive | None = None
    clip: float = Field(default=1.0, ge=0, description="greatest gradient norm; 0 does not clip")
    line_search_grid: int | None = None
    line_search_minibatches: Positive | None = None
    warm_start: bool = True
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=1, ge=0)
    warmup_learning_rate: float = Field(default=3e-3, gt=0)

    @property
    def is_gauss_newton(self) -> bool:
        """Whether an outer step is an inner solve and a line search."""
        return self.name in GAUSS_NEWTON

    @property
    def layerwise(self) -> bool:
        """Whether every block is solved on its own."""
        return self.name == "layerwise_gn" or self.structure == "layerwise"

    @property
    def step_sizes(self) -> int:
        """The number of step sizes that the line search tries."""
        return self.line_search_grid or (10 if self.layerwise else 5)

    @property
    def searched(self) -> int:
        """The number of minibatches the line search reads; 0 where there is none."""
        return (self.line_search_minibatches or self.minibatches) if self.is_gauss_newton else 0

    @model_validator(mode="before")
    @classmethod
    def _batch_sets_minibatches(cls, values: Any) -> Any:
        batch = values.get("batch") if isinstance(values, dict) else None
        if not isinstance(batch, int) or batch < 1:
            return values
        sequences = values.get("sequences", 32)
        if not isinstance(sequences, int) or sequences < 1:
            return values
        if batch % sequences:
            near = max(batch // sequences, 1) * sequences
            raise ValueError(
                f"batch = {batch} does not divide into minibatches of sequences = {sequences}; "
                f"wanted a multiple, such as {near} or {near + sequences}"
            )
        if values.get("minibatches", batch // sequences) != batch // sequences:
            raise ValueError(
                f"batch = {batch} is {batch // sequences} minibatches of {sequences} sequences, but minibatches = "
                f"{values['minibatches']}; give one of the two"
            )
        return {**values, "minibatches": batch // sequences}

    @field_validator("line_search_grid", mode="before")
    @classmethod
    def _grid_holds_a_step_size(cls, given: Any) -> Any:
        if given in ("", [], ()) or (isinstance(given, int) and given < 1):
            raise ValueError(
                "the line search needs at least 1 step size; leave it out for 5 (full) or 10 (layerwise)"
            )
        return given

    @model_validator(mode="after")
    def _combination_exists(self) -> OptimizerRecipe:
        wrong = ""
        if self.is_gauss_newton and self.inner_solver not in GAUSS_NEWTON[self.name]:
            wrong = f"{self.name} with inner_solver {self.inner_solver}"
        own = {"full_gn": "full", "layerwise_gn": "layerwise", "prox_linear": self.structure}.get(self.name)
        if self.structure not in (None, own):
            wrong = f"{self.name} with structure {self.structure}"
        if self.is_gauss_newton and self.inner_solver == "cg" and self.inner_steps is not None:
            raise ValueError(
                "inner_steps with inner_solver cg: conjugate gradients read the whole outer batch in every iteration; "
                "bound them with cg_iterations"
            )
        if self.name == "kfac" and self.damping == 0:
            raise ValueError("damping = 0 with kfac: its factors have no inverse; wanted more than 0")
        if self.is_gauss_newton and self.learning_rate_warmup:
            raise ValueError(
                f"learning_rate_warmup with {self.name}: the line search bounds its first steps; leave it at 0"
            )
        if wrong:
            raise ValueError(f"there is no {wrong}; there are {_EXISTING}")
        return self
