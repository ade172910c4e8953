"""A run as checked data: what is trained, on what, how, and what is measured. TOML files and --set a.b=c make one.

No torch here, so that a mistake in a recipe is answered at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hessprobe.errors import UserError, unknown_name

OptimizerName = Literal["full_gn", "adamw"]
ProbeName = Literal["cross_layer"]
OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
PROBES: tuple[str, ...] = get_args(ProbeName)
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecipe(_Section):
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


class DataRecipe(_Section):
    """The text: "stdlib" (Python's own sources), a text file or folder, or token shards."""

    source: str = "stdlib"
    held_out_fraction: float = Field(default=0.05, gt=0, lt=1)
    held_out_sequences: Positive = 256


class OptimizerRecipe(_Section):
    """One outer step reads `minibatches` x `sequences` sequences, whatever the optimizer.

    learning_rate: of the inner steps for Gauss-Newton. None takes the default of the optimizer.
    line_search_minibatches: fresh minibatches that judge step sizes. None takes as many as `minibatches`, as the
    reference study does.
    warmup_steps: outer steps of AdamW (a step a minibatch) before the optimizer proper.
    """

    name: OptimizerName = "full_gn"
    minibatches: Positive = 8
    sequences: Positive = 32
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["global-cosine", "inner-cosine", "constant"] = "global-cosine"
    inner_solver: Literal["muon", "adamw"] = "muon"
    clip: float = Field(default=1.0, ge=0, description="greatest gradient norm; 0 does not clip")
    line_search_grid: Positive = 5
    line_search_minibatches: Positive | None = None
    warm_start: bool = True
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=1, ge=0)
    warmup_learning_rate: float = Field(default=3e-3, gt=0)


class TrainingRecipe(_Section):
    """How long, and how often to look and to save."""

    steps: Positive = 18
    evaluate_every: Positive = 1
    checkpoint_every: Positive = 1
    threads: int = Field(default=0, ge=0, description="torch CPU threads; 0 leaves torch's own choice")


class CrossLayerRecipe(_Section):
    """The probe of cross-layer coupling.

    method: "kernels" (every pair of layers from `rounds` backward passes) or "products" (the reference estimator,
    layers x samples Gauss-Newton products). quantity: "population" or "batch", see LayerKernels.block_norms.
    matrix: whose blocks; the Hessian and the residual H - G have no kernel form, so they take products.
    jacobi_damping: mu of jacobi_radius.
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


class Recipe(_Section):
    """Everything a run depends on. Two runs of one recipe on one machine give the same weights, bit for bit."""

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

    def to_toml(self) -> str:
        """Returns the recipe as TOML, every value written out but those left to defaults elsewhere (None)."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def shipped_recipes() -> tuple[str, ...]:
    """Returns the names of the recipes that come with hessprobe."""
    folder = resources.files("hessprobe") / "recipes"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def read_recipe(source: str | Path) -> dict[str, Any]:
    """Returns the values of a recipe by shipped name or file path, unchecked.

    Raises:
        UserError: no such recipe or file, or a file that is not TOML.
    """
    names = shipped_recipes()
    if str(source) in names:
        return tomllib.loads((resources.files("hessprobe") / "recipes" / f"{source}.toml").read_text())
    path = Path(source)
    if not path.is_file():
        if path.suffix == ".toml" or "/" in str(source):
            raise UserError(f"no recipe file at {path}; shipped recipes: {', '.join(names)}")
        raise unknown_name("recipe", str(source), [*names, "a path to a .toml file"])
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML recipe: {error}") from error


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """Returns the key path and value of `a.b=c`; the value is TOML, or else a plain string.

    Raises:
        UserError: no `=`.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {setting}: wanted key=value, such as --set optimizer.learning_rate=0.01")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip().split("."), value


def build_recipe(values: Mapping[str, Any], settings: Sequence[str] = ()) -> Recipe:
    """Returns the checked recipe of TOML values with `a.b=c` settings on top.

    Raises:
        UserError: an unknown key (the valid ones are listed) or a value out of range.
    """
    merged = _copied(values)
    for setting in settings:
        path, value = parse_setting(setting)
        place = merged
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {setting}: {part!r} is a value, not a section of the recipe")
        place[path[-1]] = value
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise UserError("\n".join(_in_words(problem) for problem in error.errors())) from error


def differences(stored: Recipe, wanted: Recipe) -> list[str]:
    """Returns one line per value in which two recipes differ: `optimizer.learning_rate: 0.02 -> 0.05`."""
    before, after = dict(_leaves(stored.model_dump())), dict(_leaves(wanted.model_dump()))
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _in_words(problem: Any) -> str:
    """Turns one of pydantic's problems into wanted, got, way out."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        where = f" in [{'.'.join(path[:-1])}]" if path[:-1] else ""
        return str(unknown_name(f"recipe key{where}", path[-1], known))
    if path[0] == "probes" and problem["type"] == "literal_error":
        return str(unknown_name("probe", str(problem["input"]), PROBES))
    if key == "optimizer.name" and problem["type"] == "literal_error":
        return str(unknown_name("optimizer", str(problem["input"]), OPTIMIZERS))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"recipe key {key} = {problem['input']!r}: {message}"
