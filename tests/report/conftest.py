"""One stored run and its page, made once for all tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import xarray as xr

from hessprobe.analysis import open_run
from hessprobe.report.page import write_report
from tests.report.runs import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run with seven probed steps, of which one failed and one holds no number."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    return write_run(folder, failed={10: "out of memory: 8 rows need 3.2 GB"}, blank=[15])


@pytest.fixture(scope="session")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a run that stored layer kernels of 24 sequences in 4 rounds, at four probed steps."""
    folder = tmp_path_factory.mktemp("runs") / "sketched"
    return write_run(folder, steps=(0, 10, 20, 30), sketches=(24, 4), failed={20: "out of memory"})


@pytest.fixture(scope="session")
def page(run: Path) -> Path:
    return write_report(run)


@pytest.fixture(scope="session")
def log(run: Path) -> xr.DataTree:
    return open_run(run)


@pytest.fixture
def quick(monkeypatch):
    """Writing PDF embeds fonts and takes half a second a figure; where files are counted, their names are enough."""

    def touched(figure, folder: Path, name: str) -> list[Path]:
        assert figure.axes
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
        for path in paths:
            path.touch()
        return paths

    monkeypatch.setattr("hessprobe.pictures.matplotlib_pen.save", touched)
