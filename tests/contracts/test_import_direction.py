"""Imports point one way: each stage knows only those before it, and the command line loads nothing by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "hessprobe"

# Stage -> the stages it may import; `errors` is open to all. A stage is a folder or file of the package; an instrument's
# folder has three: what it declares, what measures, and what reads.
ALLOWED: dict[str, str] = {
    "errors": "",
    "schema": "",
    "machine": "",
    "text": "machine",
    "models": "text",
    "problem": "machine",
    "curvature": "problem machine",
    "estimation": "curvature problem machine",
    "kernels": "problem estimation machine",
    "optimization": "schema problem curvature machine",
    "store": "schema",
    "reading": "store",
    "pictures": "reading store",
    "instruments": "schema",
    "instruments/declared": "schema instruments",
    "instruments/measure": "schema instruments instruments/declared problem machine curvature estimation kernels "
    "optimization",
    "instruments/reading": "schema instruments instruments/declared reading pictures store",
    "recipe": "schema instruments instruments/declared",
    "measuring": "instruments instruments/measure recipe schema store machine problem optimization",
    "training": "measuring instruments instruments/declared instruments/measure recipe schema store models "
        "text problem curvature optimization machine",
    "any_loop": "measuring instruments instruments/measure recipe schema store problem optimization machine",
    "checkpoints": "measuring instruments instruments/measure recipe schema store models text problem "
        "optimization machine training/checkpoint training/builds",
    "integrations": "any_loop measuring",
    "report": "instruments instruments/declared reading pictures store",
    "comparison": "schema report reading pictures store",
    # Looks at everything, and only the command line knows it (see the test below).
    "validation": "recipe problem curvature kernels estimation optimization store instruments "
        "instruments/declared instruments/measure measuring training any_loop report models text machine",
}  # fmt: skip
# File -> what it imports beyond its stage's row.
BEYOND: dict[str, set[str]] = {
    # The decoder's own RMSNorm has a fast path as torch's has.
    "kernels/features.py": {"models"},
    # Types alone: an instrument in one file is read where there is no torch.
    "instruments/probe.py": {"instruments/measure", "problem"},
    # What passes cost is said in one file, which computes nothing.
    "kernels/stream.py": {"curvature"},
}  # fmt: skip
# The doors: lazy names, the command line and `python -m` may reach anything, but see the last two tests.
DOORS = {"__init__", "__main__", "cli", "analysis", "moved", "testing"}
# Where torch is imported at all; everything else runs where there is none.
WITH_TORCH = {
    "machine", "problem", "models", "text", "curvature", "estimation", "kernels", "optimization", "instruments/measure",
    "measuring", "training", "any_loop", "checkpoints", "integrations", "validation",
}  # fmt: skip
DECLARED = {"__init__", "candidates", "headline", "recipe", "table"}


class Import(NamedTuple):
    """One imported module: who imports it, its dotted name, and whether that happens when the file is loaded."""

    file: Path
    line: int
    module: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


def stage_of(file: Path) -> str:
    """Returns the stage of a file of the package, or of the module at this place."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts in (("instruments", "snapshot"), ("instruments", "probe")) or (
        parts[0] == "instruments" and parts[2:3] == ("measure",)
    ):
        return "instruments/measure"
    if parts[0] != "instruments" or len(parts) < 3:
        return parts[0]
    return "instruments/declared" if parts[2] in DECLARED and len(parts) == 3 else "instruments/reading"


def place_of(module: str) -> Path:
    """Returns the file of a module of ours."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(file: Path) -> Iterator[Import]:
    """Yields every import of a file, those inside functions and under TYPE_CHECKING too."""
    package = ("hessprobe", *file.relative_to(PACKAGE).parts[:-1])

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, at_load) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                # `from hessprobe.store import reader` imports a module, `... import open_run` a name.
                inner = f"{module}.{alias.name}"
                yield Import(file, node.lineno, inner if is_module(inner) else module, at_load)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, at_load)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_load and not inside)

    return walk(ast.parse(file.read_text(encoding="utf-8")), True)


def is_module(name: str) -> bool:
    if not name.startswith("hessprobe."):
        return False
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for file in sorted(PACKAGE.rglob("*.py")) for found in imports_of(file))


def allowed(found: Import) -> bool:
    """Tells whether a stage may import a module of ours."""
    if found.module == "hessprobe":
        return False  # the package's lazy names would hide which stage they come from
    here, file = stage_of(found.file), place_of(found.module)
    there = stage_of(file)
    if there == here or there == "errors":
        return not is_of_another_instrument(found.file, file)
    within = "/".join(file.relative_to(PACKAGE).with_suffix("").parts[:2])
    beyond = BEYOND.get(str(found.file.relative_to(PACKAGE)), set())
    return bool({there, within} & ({*ALLOWED[here].split()} | beyond)) and not is_of_another_instrument(
        found.file, file
    )


def is_of_another_instrument(file: Path, imported: Path) -> bool:
    """Tells whether both files lie in instruments' folders, and in different ones."""
    folders = [path.relative_to(PACKAGE).parts for path in (file, imported)]
    inside = all(parts[0] == "instruments" and len(parts) > 2 for parts in folders)
    return inside and folders[0][1] != folders[1][1]


def test_every_stage_imports_only_those_before_it():
    ours = [found for found in all_imports() if found.module.split(".")[0] == "hessprobe"]
    wrong = [str(found) for found in ours if stage_of(found.file) not in DOORS and not allowed(found)]
    assert not wrong, "\n".join(wrong)
    assert len(ours) > 100


def test_only_the_command_line_imports_the_validation():
    others = [
        str(found)
        for found in all_imports()
        if found.module.split(".")[1:2] == ["validation"]
        and stage_of(found.file) not in ("validation", "cli")
    ]
    assert not others, "\n".join(others)


def test_every_folder_and_file_is_a_stage():
    stages = {stage_of(file) for file in PACKAGE.rglob("*.py")} - DOORS
    assert stages <= set(ALLOWED), f"not in DESIGN's order: {stages - set(ALLOWED)}"


def test_torch_appears_nowhere_but_where_something_is_measured_or_trained():
    torches = ("torch", "curvlinops", "backpack", "pytorch_optimizer")
    wrong = [
        str(found)
        for found in all_imports()
        if found.module.split(".")[0] in torches and stage_of(found.file) not in WITH_TORCH | DOORS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("door", sorted(DOORS - {"__main__"}))
def test_the_doors_load_no_stage_until_they_are_used(door):
    """Every file of a door that is a folder counts as that door; its files may load one another.

    The table of optimizers, which --help names, loads nothing further.
    """
    assert door in {stage_of(file) for file in PACKAGE.rglob("*.py")}
    wrong = [
        str(found)
        for found in all_imports()
        if stage_of(found.file) == door and found.at_load and found.module.split(".")[0] == "hessprobe"
        if found.module.split(".")[1:2] not in (["errors"], ["moved"], [door])
        if found.module != "hessprobe.schema.optimizers"
    ]
    assert not wrong, "\n".join(wrong)


def check_no_circle(graph: dict[str, set[str]]) -> None:
    """Fails with the circle, if there is one."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_modules_import_each_other_in_a_circle_when_loaded():
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        name = ".".join(("hessprobe", *found.file.relative_to(PACKAGE).with_suffix("").parts))
        if found.at_load and is_module(found.module):
            graph.setdefault(name.removesuffix(".__init__"), set()).add(found.module)
    check_no_circle(graph)


def test_no_stages_import_each_other_in_a_circle_at_all():
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        here = stage_of(found.file)
        if str(found.file.relative_to(PACKAGE)) in BEYOND:
            continue
        if (
            is_module(found.module)
            and here not in DOORS
            and (there := stage_of(place_of(found.module))) != here
        ):
            graph.setdefault(here, set()).add(there)
    check_no_circle(graph)
