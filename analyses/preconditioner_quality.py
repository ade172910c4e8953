"""How near do practical preconditioners come to layerwise Gauss-Newton, and when does curvature between layers pay?

python analyses/preconditioner_quality.py runs/nano --out figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import xarray as xr

from hessprobe import analysis
from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.answers import PreconditionerAnswers
from hessprobe.instruments.preconditioner.findings import findings
from hessprobe.instruments.preconditioner.pictures import pictures
from hessprobe.pictures import matplotlib_pen
from hessprobe.reading.labelled import Labelled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the figures go")
    given = parser.parse_args(arguments)
    try:
        for path, label in zip(given.runs, labels(given.runs), strict=True):
            study(path, given.out, label)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def study(path: Path, out: Path, label: str) -> None:
    """Draws one run's figures on preconditioners, prints its findings, the headline series and the files written."""
    answers = PreconditionerAnswers(analysis.require_table(analysis.load_run(path), "preconditioner"))
    print(f"{path}")
    for finding in findings(answers):
        print(f"  {finding.sentence} ({finding.basis})")
    print_series(analysis.cross_layer_pays(answers.table))
    for picture in pictures([Labelled(label=label, answers=answers, compared=answers)]):
        if picture.where == "page":
            continue
        try:
            figure = matplotlib_pen.draw(picture)
        except UserError as error:
            print(f"  no figure {picture.name}: {error}")
        else:
            for written in matplotlib_pen.save(figure, out, f"{label}{picture.name}"):
                print(f"  wrote {written}")


def print_series(pays: xr.Dataset) -> None:
    """Prints the held-out decrease of layerwise over full Gauss-Newton, by damping and curvature batch."""
    for i, damping in enumerate(pays["damping"].values):
        each = pays.isel(damping=i)
        numbers = [
            f"{size}: {ratio:.3f} ± {stderr:.3f}"
            for size, ratio, stderr in zip(
                pays["curvature_sequences"].values, each["ratio"].values, each["stderr"].values, strict=True
            )
            if np.isfinite(ratio)
        ]
        print(f"  damping {damping:g}, layerwise over full by curvature sequences  {'  '.join(numbers)}")


def labels(runs: list[Path]) -> list[str]:
    """Returns what each run's file names begin with: nothing for one run, else its folder's own name."""
    if len(runs) == 1:
        return [""]
    names = [run.resolve().name for run in runs]
    return [f"{name}-" if names.count(name) == 1 else f"{name}-{i}-" for i, name in enumerate(names)]


if __name__ == "__main__":
    sys.exit(main())
