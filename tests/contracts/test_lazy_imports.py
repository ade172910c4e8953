"""What is not needed is not imported: by the package, by the command line, by the side that reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.runs import write_run

pytestmark = pytest.mark.processes


HEAVY = ("torch", "xarray", "zarr", "numpy", "pandas", "plotly", "matplotlib", "pydantic", "curvlinops")


def python(code: str, folder: Path | None = None) -> str:
    """Returns what a fresh interpreter prints; fails with what it complains about."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["hessprobe", "hessprobe.cli", "hessprobe.errors"])
def test_nothing_heavy_comes_with(module):
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    assert python(code) == ""


def test_a_recipe_is_checked_without_torch_and_xarray():
    code = (
        "import sys; from hessprobe.recipe import build_recipe, read_recipe; build_recipe(read_recipe('nano'));"
        "print(*[name for name in ('torch', 'xarray', 'zarr') if name in sys.modules])"
    )
    assert python(code) == ""


def test_every_public_name_exists_and_is_listed():
    code = (
        "import hessprobe as hp; found = [getattr(hp, name) for name in hp.__all__];"
        "assert set(hp.__all__) <= set(dir(hp)); assert set(hp._HOMES) == set(hp.__all__); print(len(found))"
    )
    assert int(python(code)) > 10


def test_a_name_that_does_not_exist_is_an_attribute_error():
    assert python("import hessprobe as hp; print(hasattr(hp, 'open_runs'))") == "False"


def test_logs_are_read_analysed_and_reported_with_torch_absent(tmp_path):
    folder = write_run(tmp_path / "run")
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "curvlinops", "backpack", "pytorch_optimizer")))  # import raises
from pathlib import Path
import hessprobe as hp
import hessprobe.analysis, hessprobe.instruments.cross_layer.pictures, hessprobe.store
from hessprobe.report.page import write_report
from hessprobe.report.terminal import show
from rich.console import Console
log = hp.open_run({str(folder)!r})
print(log["cross_layer"]["coupling"].sel(block="block.1").shape[0])
show(Path({str(folder)!r}), Console(file=sys.stderr))
assert "<html" in write_report(Path({str(folder)!r})).read_text()
"""
    assert int(python(code)) > 0
