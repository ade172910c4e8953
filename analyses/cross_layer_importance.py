"""Which layers couple, and how much of a step's curvature lies between them? Figures and findings of runs.

python analyses/cross_layer_importance.py runs/nano --out figures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import xarray as xr
from matplotlib.figure import Figure

from hessprobe import analysis
from hessprobe.errors import UserError
from hessprobe.report import figures

Draw = Callable[[xr.DataTree], tuple[Figure, xr.Dataset | xr.DataArray]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the figures go")
    parser.add_argument(
        "--step", type=int, help="the step whose coupling is drawn (default: the last measured)"
    )
    given = parser.parse_args(arguments)
    drawings: dict[str, Draw] = {
        "coupling": lambda run: figures.coupling_heatmap(run, given.step),
        "cross_share": figures.cross_share_over_training,
        "loss": figures.loss_curve,
    }
    try:
        for path, label in zip(given.runs, labels(given.runs), strict=True):
            study(path, given.out, label, drawings)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def study(path: Path, out: Path, label: str, drawings: dict[str, Draw]) -> None:
    """Draws one run's figures, prints its findings on cross-layer importance and the files written."""
    run = analysis.load_run(path)
    analysis.require_table(run, "cross_layer")
    print(f"{path}")
    for finding in analysis.findings(run):
        print(f"  {finding.sentence} ({finding.basis})")
    for name, draw in drawings.items():
        if name == "loss" and "train" not in run.children:
            continue  # a run recorded around the user's own loop
        figure, _ = draw(run)
        for written in figures.save(figure, out, f"{label}{name}"):
            print(f"  wrote {written}")


def labels(runs: list[Path]) -> list[str]:
    """Returns what each run's file names begin with: nothing for one run, else its folder's own name."""
    if len(runs) == 1:
        return [""]
    names = [run.resolve().name for run in runs]
    return [f"{name}-" if names.count(name) == 1 else f"{name}-{i}-" for i, name in enumerate(names)]


if __name__ == "__main__":
    sys.exit(main())
