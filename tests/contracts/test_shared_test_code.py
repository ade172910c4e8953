"""What several test modules need stands in a module of its own, so that every test file can be run, moved and read alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]


def is_test_module(dotted: str) -> bool:
    return dotted.rpartition(".")[2].startswith("test_")


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and the dotted name of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            # `from tests.report import test_page` imports a module too.
            yield from ((node.lineno, alias.name) for alias in node.names if is_package(node.module))


def is_package(module: str | None) -> bool:
    return module is None or (TESTS.parent / module.replace(".", "/")).is_dir()


def test_nothing_is_imported_from_a_test_module():
    files = sorted(TESTS.rglob("*.py"))
    wrong = [
        f"{file.relative_to(TESTS.parent)}:{line} imports {name}: move what is shared into a module beside it"
        for file in files
        for line, name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if is_test_module(name)
    ]
    assert not wrong, "\n".join(wrong)
    assert len(files) > 150


def test_every_way_to_import_one_is_seen():
    code = (
        "import tests.report.test_page\nfrom tests.report import test_page\nfrom .test_page import facts\n"
        "from tests.report.test_page import facts\nfrom . import test_page\ndef inside():\n    from .test_page import facts"
    )
    assert {line for line, name in imported(ast.parse(code)) if is_test_module(name)} == {1, 2, 3, 4, 5, 7}
