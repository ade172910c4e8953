"""The sections of a recipe but the optimizer's and the study's, and the recipe itself."""

from __future__ import annotations

from typing import Literal, get_args

import tomli_w
from pydantic import Field, model_validator

from hessprobe.recipe.optimizer import OptimizerRecipe
from hessprobe.recipe.section import Positive, Section
from hessprobe.recipe.study import StudyRecipe

ProbeName = Literal["cross_layer"]
PROBES: tuple[str, ...] = get_args(ProbeName)


class ModelRecipe(Section):
    """The decoder: a named size, or that size with some of its numbers changed."""

    size: Literal["nano", "45M", "150M"] = "nano"
    layers: Positive | None = None
    width: Positive | None = None
    feedforward: Positive | None = None
    heads: Positive | None = None
    vocabulary: Positive | None = None
    context: Positive | None = None
    mlp: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    tied: bool = False


class DataRecipe(Section):
    """The text: "stdlib" (Python's own sources), a text file or folder, token shards, or "hub:OWNER/NAME/CONFIG".

    tokenizer: of text. None reads bytes; a tokenizer.json; a name on the Hugging Face Hub such as "t5-base"; or
    "bpe:4096", byte pairs learned from the training text itself. A hub source needs one of the middle two.
    end_of_text: the token put between documents. None looks for the usual ones (</s>, <|endoftext|>, ...).
    held_out_fraction: of a local text; a hub source holds out its split "validation".
    """

    source: str = "stdlib"
    tokenizer: str | None = None
    end_of_text: str | None = None
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    held_out_sequences: Positive = 256


class TrainingRecipe(Section):
    """How long, and how often to look and to save.

    stop_at: held-out loss (nats per token) at which the run ends early; looked at every `evaluate_every` steps.
    start_from: a run's folder or checkpoint file whose parameters are the initial weights, and whose data the run
    goes on with. The optimizer starts afresh; set optimizer.warmup_steps to 0 unless it shall warm up again.
    """

    steps: Positive = 18
    stop_at: float | None = Field(default=None, gt=0)
    start_from: str | None = None
    evaluate_every: Positive = 1
    checkpoint_every: Positive = 1
    threads: int = Field(default=0, ge=0, description="torch CPU threads; 0 leaves torch's own choice")


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
    def most_rounds(self) -> int:
        """The most rounds a row can take."""
        return self.rounds if self.coupling_error is None else max(self.rounds, self.max_rounds)

    @model_validator(mode="after")
    def _batch_needs_rounds(self) -> CrossLayerRecipe:
        if self.quantity == "batch" and self.rounds < 2:
            raise ValueError("quantity 'batch' needs pairs of rounds: set rounds to 2 or more")
        return self


class Recipe(Section):
    """Everything a run depends on. Two runs of one recipe on one machine give the same weights, bit for bit.

    With a `study` it is many runs, see StudyRecipe.
    """

    name: str = "nano"
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    partition: Literal["layer", "module", "parameter"] = "layer"
    probes: tuple[ProbeName, ...] = ()
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    training: TrainingRecipe = TrainingRecipe()
    cross_layer: CrossLayerRecipe = CrossLayerRecipe()
    study: StudyRecipe | None = None

    def to_toml(self) -> str:
        """Returns the recipe as TOML, every value written out but those left to defaults elsewhere (None)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
