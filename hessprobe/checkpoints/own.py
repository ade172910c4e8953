"""Checkpoints of hessprobe's own runs: model, data and instruments' settings come from the run's recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hessprobe.checkpoints.series import Reader, check_probes, recipe_of
from hessprobe.errors import UserError
from hessprobe.machine.devices import pick_device
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe, build_recipe, read_recipe
from hessprobe.training.builds import RECIPE_FILE, build_model, decoder_config, open_corpus
from hessprobe.training.checkpoint import DAMAGED, FILE, CheckpointFile, checkpoint_file


def own_checkpoint(given: str) -> Path | None:
    """Returns the checkpoint's file where a run's folder, its checkpoint folder or such a file is given; else None.

    Raises:
        UserError: a run that has saved no checkpoint yet.
    """
    path = Path(os.path.expanduser(given))
    if path.is_file():
        return path
    if (path / "log.zarr").is_dir() or checkpoint_file(path).is_file():
        if not checkpoint_file(path).is_file():
            raise UserError(f"the run {given} holds no checkpoint/{FILE}: it has saved none yet")
        return checkpoint_file(path)
    return path / FILE if (path / FILE).is_file() else None


class OwnCheckpoints:
    """A series of own runs' checkpoints.

    Args:
        files: see `own_checkpoint`.
        given: as they were given.
        settings, data, sequences: see `recipe_of`.
        context: tokens in a sequence; default: the model's context.

    Each is measured on the batch that its run would have measured at that step.
    """

    def __init__(
        self,
        files: Sequence[Path],
        given: Sequence[str],
        settings: Sequence[str],
        *,
        data: str | None,
        sequences: int | None,
        context: int | None,
    ) -> None:
        self.names = list(given)
        stored = [_recipe_beside(file) for file in files]
        self.config = decoder_config(stored[0])
        for name, recipe in zip(given, stored, strict=True):
            if (config := decoder_config(recipe)) != self.config:
                raise UserError(
                    f"{given[0]} and {name} hold different models, and a series is of one: {config} there, {self.config} "
                    "here. Measure them one by one, and compare with hessprobe report RUN RUN"
                )
        values = stored[0].model_dump(exclude_none=True, exclude={"study"})
        values |= {"name": f"{stored[0].name}-probe", "loggers": ()}
        self.recipe = recipe_of(values, settings, data=data, sequences=sequences)
        check_probes(self.recipe)
        self.context = context or self.config.context
        if not 1 <= self.context <= self.config.context:
            raise UserError(
                f"--context {context}: this model reads 1 to {self.config.context:,} tokens at a time"
            )
        self.vocabulary = self.config.vocabulary
        self._files = [_opened(file, name) for file, name in zip(files, given, strict=True)]
        self._origins: dict[int, dict[str, Any]] = {}
        self.reads = [file.step for file in self._files]
        self.known: list[int | None] = list(self.reads)

    def reader(self) -> Reader:
        model = self.recipe.model.model_copy(update={"context": self.context})
        return open_corpus(self.recipe.model_copy(update={"model": model}))

    def model(self) -> nn.Module:
        model = build_model(self.recipe, pick_device("cpu"))
        self.place(0, model)
        return model

    def objective(self, model: nn.Module) -> Objective:
        return Objective(model)

    def place(self, number: int, model: nn.Module) -> None:
        partition, path = Partition.of(model, self.recipe.partition), str(self._files[number].path)
        start = self._files[number].start(path, partition, repr(path))
        partition.assign(model, start.parameters)
        self._origins[number] = start.origin

    def origin(self, number: int) -> dict[str, Any]:
        return self._origins[number]

    def described(self) -> dict[str, Any]:
        return self.recipe.model.model_dump(mode="json", exclude_none=True)


def _recipe_beside(file: Path) -> Recipe:
    """Returns the recipe of the run that a checkpoint lies in."""
    for folder in (file.parent.parent, file.parent):
        if (folder / RECIPE_FILE).is_file():
            return build_recipe(read_recipe(folder / RECIPE_FILE))
    raise UserError(
        f"{file} lies in no run's folder (there is no {RECIPE_FILE} beside its folder), so its model and data are not "
        f"known: give RUN or RUN/checkpoint/{FILE}; of transformers give the folder, not a file in it; of any other code "
        "say which model it is, --model module:function"
    )


def _opened(file: Path, given: str) -> CheckpointFile:
    try:
        return CheckpointFile(file)
    except DAMAGED as error:
        raise UserError(
            f"{given}: {file} is no checkpoint of hessprobe, or it is damaged; give a run's folder or its "
            f"checkpoint/{FILE}, or --model module:function for a file of another code"
        ) from error
