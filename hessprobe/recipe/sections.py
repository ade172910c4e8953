"""What is trained on what, for how long, and the recipe itself; optimizer, instruments and study have their own files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import tomli_w
from pydantic import Field, create_model

from hessprobe.instruments.registry import probed
from hessprobe.recipe.optimizer import OptimizerRecipe
from hessprobe.recipe.study import StudyRecipe
from hessprobe.schema.section import Positive, Section

PROBES: tuple[str, ...] = tuple(probed())
if TYPE_CHECKING:
    ProbeName = str
else:
    ProbeName = Literal[PROBES]
LoggerName = Literal["tensorboard", "wandb"]


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
    probe_share: of training's gradients; a probe that would take more says so before the run.
    """

    steps: Positive = 18
    stop_at: float | None = Field(default=None, gt=0)
    start_from: str | None = None
    evaluate_every: Positive = 1
    checkpoint_every: Positive = 1
    probe_share: float = Field(default=0.5, gt=0)
    threads: int = Field(default=0, ge=0, description="torch CPU threads; 0 leaves torch's own choice")


class RunRecipe(Section):
    """Everything a run depends on but its instruments and its study, see Recipe."""

    name: str = "nano"
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    partition: Literal["layer", "module", "parameter"] = "layer"
    probes: tuple[ProbeName, ...] = ()
    loggers: tuple[LoggerName, ...] = ()
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    training: TrainingRecipe = TrainingRecipe()

    def to_toml(self) -> str:
        """Returns the recipe as TOML, every value written out but those left to defaults elsewhere (None)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


_DOC = """Everything a run depends on. Two runs of one recipe on one machine give the same weights, bit for bit.

    Every instrument has a section of its name.
    loggers: where a few scalars go besides the run's own log; they change nothing in it.
    With a `study` it is many runs, see StudyRecipe.
    """

if TYPE_CHECKING:

    class Recipe(RunRecipe):
        """Everything a run depends on."""

        study: StudyRecipe | None = None

        def __getattr__(self, name: str) -> Any: ...

else:
    Recipe = create_model(
        "Recipe",
        __base__=RunRecipe,
        __module__=__name__,
        __doc__=_DOC,
        **{name: (each.settings, each.settings()) for name, each in probed().items()},
        study=(StudyRecipe | None, None),
    )
