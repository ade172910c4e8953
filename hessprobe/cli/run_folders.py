"""Which folder under runs/ a command writes or goes on with, and the recipe that a run's log keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hessprobe.errors import UserError

if TYPE_CHECKING:
    from hessprobe.recipe import Recipe


def free_folder(name: str) -> Path:
    """Returns runs/NAME, or the first of NAME-2, NAME-3, ... under runs/ that holds no run, nor runs."""
    wanted = Path("runs") / name
    number, folder = 1, wanted
    while (folder / "log.zarr").exists() or (folder / "recipe.toml").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def latest_run(recipe: str) -> Path:
    """Returns the newest run of a recipe under runs/."""
    name = Path(recipe).stem
    found = [f for f in Path("runs").glob(f"{name}*") if (f / "log.zarr").exists()]
    if not found:
        raise UserError(f"--resume: no run of {name} under runs/; name its folder with --out")
    return max(found, key=lambda f: (f / "log.zarr").stat().st_mtime)


def stored_recipe(folder: Path) -> Recipe:
    """Returns the recipe that a run was started with, from its log, which is whole from its first instant."""
    import json

    from hessprobe.recipe import build_recipe
    from hessprobe.store.log import find_log

    if not (folder / "log.zarr").is_dir():
        raise UserError(f"--resume: {folder} holds no run; leave out --resume to start one")
    _, attributes = find_log(folder)
    if "checkpoints" in attributes:
        raise UserError(
            f"--resume: {folder} holds checkpoints measured by hessprobe probe, and no training to go on with"
        )
    return build_recipe(json.loads(attributes["recipe"]))
