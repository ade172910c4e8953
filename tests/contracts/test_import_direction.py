"""Imports point one way: each stage knows only those before it, and the command line loads nothing by itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "hessprobe"

# Stage -> the stages it may import; `errors` is open to all. None: every one of them.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "recipe": set(),
    "machine": set(),
    "problem": {"recipe", "machine"},
    "curvature": {"problem"},
    "kernels": {"problem"},
    "estimation": {"curvature", "kernels"},
    "optimization": {"problem", "curvature", "machine"},
    "store": set(),
    "probes": {"recipe", "machine", "problem", "curvature", "kernels", "estimation", "optimization", "store.schema"},
    "training": {"recipe", "problem", "curvature", "kernels", "estimation", "optimization", "probes",
                 "store.schema", "store.writer"},
    "integrations": {"training", "probes"},
    "analysis": {"store"},
    "report": {"analysis", "store"},
    # Looks at everything, and only the command line knows it (see the test below).
    "validation": {"recipe", "problem", "curvature", "kernels", "estimation", "optimization", "store", "probes", "training",
                   "analysis", "report"},
}  # fmt: skip
# Where the code goes beyond that: LayerKernels hands out Estimates and shares coupling's formula. Estimation knows
# nothing of kernels in turn, so there is still one direction (the test on circles).
BEYOND = {"kernels": {"estimation", "curvature.cost"}}
# The doors: lazy names, the command line and `python -m` may reach anything, but see the last two tests.
DOORS = {"__init__", "__main__", "cli"}
WITHOUT_TORCH = ("errors", "recipe", "store", "analysis", "report")


class Import(NamedTuple):
    """One imported module: who imports it, its dotted name, and whether that happens when the file is loaded."""

    file: Path
    line: int
    module: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


def stage_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
    parts = found.module.split(".")[1:]
    here = stage_of(found.file)
    if not parts:
        return False  # the package's lazy names would hide which stage they come from
    if parts[0] in ("errors", here):
        return True
    return bool({parts[0], ".".join(parts[:2])} & (ALLOWED[here] | BEYOND.get(here, set())))


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


@pytest.mark.parametrize("stage", WITHOUT_TORCH)
def test_the_reading_side_names_no_torch(stage):
    torches = ("torch", "curvlinops", "backpack", "pytorch_optimizer")
    wrong = [
        str(found)
        for found in all_imports()
        if stage_of(found.file) == stage and found.module.split(".")[0] in torches
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("door", sorted(DOORS - {"__main__"}))
def test_the_doors_load_no_stage_until_they_are_used(door):
    loaded = {
        found.module
        for found in all_imports()
        if found.file == PACKAGE / f"{door}.py" and found.at_load and found.module.startswith("hessprobe")
    }
    assert loaded <= {"hessprobe.errors"}


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
        here, there = stage_of(found.file), found.module.split(".")
        if there[0] == "hessprobe" and here not in DOORS and there[1:2] != [here]:
            graph.setdefault(here, set()).update(there[1:2])
    check_no_circle(graph)
