"""Checkpoints of one model to be measured one after the other: what they are, where they stand on the step axis, their data.

Own runs are in own.py, transformers' models in pretrained.py, anybody's weights in state_dicts.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from hessprobe.errors import UserError
from hessprobe.problem.objective import Batch, Objective
from hessprobe.recipe import PROBES, Recipe, build_recipe

# What a measurement takes from a recipe; the rest is about training, or is the checkpoint's to say.
MEASURED_WITH = ("name", "seed", "device", "partition", "probes", "loggers", "data", "training", *PROBES)


class Reader(Protocol):
    """Where batches come from: a corpus, or one made into masked or labelled batches."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON-able facts about the origin."""
        ...

    def batch(self, *, seed: int, step: int, sequences: int, stream: str) -> Batch | list[Batch]:
        """Returns a batch or micro-batches, a pure function of its arguments."""
        ...


class CheckpointSeries(Protocol):
    """Checkpoints of one model.

    Attributes:
        recipe: with what they are measured, on what.
        names: of the checkpoints, as given.
        known: the training step of each, None where nothing says it.
        reads: the step whose batch each is measured on.
        vocabulary: of the model.
    """

    recipe: Recipe
    names: list[str]
    known: list[int | None]
    reads: list[int]
    vocabulary: int

    def reader(self) -> Reader:
        """Returns the data."""
        ...

    def model(self) -> nn.Module:
        """Returns the model with the first checkpoint's weights, on the CPU."""
        ...

    def objective(self, model: nn.Module) -> Objective:
        """Returns the model and its loss."""
        ...

    def place(self, number: int, model: nn.Module) -> None:
        """Puts a checkpoint's weights into the model."""
        ...

    def origin(self, number: int) -> dict[str, Any]:
        """Returns JSON-able facts about a checkpoint whose weights have been put into the model."""
        ...

    def described(self) -> dict[str, Any]:
        """Returns the model as the log's recipe keeps it."""
        ...


def steps_of(known: Sequence[int | None]) -> tuple[list[int], str]:
    """Returns each checkpoint's place on the step axis, and in words why they were counted, where they had to be."""
    own = [step for step in known if step is not None]
    if len(set(own)) == len(known):
        return own, ""
    counted = list(range(len(known)))
    if len(known) == 1:
        return counted, ""
    why = "not every checkpoint says its step" if len(own) < len(known) else "checkpoints share a step"
    return counted, f"{why}, so they are counted 0 .. {len(known) - 1}"


def recipe_of(
    values: Mapping[str, Any], settings: Sequence[str], *, data: str | None, sequences: int | None
) -> Recipe:
    """Returns the recipe of a measurement: values, what flags say, then settings.

    Raises:
        UserError: see `build_recipe`; a setting that no measurement has a use for.
    """
    for setting in settings:
        section = setting.partition("=")[0].strip().partition(".")[0]
        if section in Recipe.model_fields and section not in MEASURED_WITH:
            raise UserError(
                f"--set {setting}: nothing is trained here, and the model is the checkpoint's; of a recipe, measuring "
                f"takes {', '.join(MEASURED_WITH)}"
            )
    flags = [] if data is None else [f"data.source={json.dumps(data)}"]
    if sequences is not None:
        if sequences < 4:
            raise UserError(f"--sequences {sequences}: a row needs at least 4, for its errors")
        sizes = [sequences // 4, sequences // 2, sequences]
        flags += [
            f"cross_layer.sequences={sequences}",
            f"gn_hessian.sequences={sequences}",
            f"preconditioner.curvature_sequences={sizes}",
            f"preconditioner.held_out_sequences={sequences}",
            f"preconditioner.folds={min(16, sequences)}",
        ]
    # Values of a stored recipe are all written out and would win over a preset that is asked for now.
    fresh = {name for name in PROBES if any(s.startswith(f"{name}.preset") for s in settings)}
    kept = {key: value for key, value in values.items() if key not in fresh}
    return build_recipe(kept, [*flags, *settings])


def check_probes(recipe: Recipe) -> None:
    """Raises a UserError where a recipe names no instrument."""
    if not recipe.probes:
        raise UserError(f"no --probe given: nothing would be measured; valid: {', '.join(PROBES)}")


def put_parameters(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights and buffers by name into the model.

    Raises:
        UserError: of another model.
    """
    own = model.state_dict()
    for name in {**own, **weights}:
        shapes = [tuple(w[name].shape) if name in w else "absent" for w in (own, weights)]
        if shapes[0] != shapes[1]:
            raise UserError(f"another model than the first: {name} is {shapes[0]} there and {shapes[1]} here")
    model.load_state_dict(weights)
