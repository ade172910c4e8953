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
from hessprobe.instruments.preconditioner.figures import preconditioner_drawings
from hessprobe.instruments.preconditioner.findings import preconditioner_findings
from hessprobe.report.figure_set import save_drawings


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
    run = analysis.load_run(path)
    table = analysis.require_table(run, "preconditioner")
    print(f"{path}")
    for finding in preconditioner_findings(table):
        print(f"  {finding.sentence} ({finding.basis})")
    print_series(analysis.cross_layer_pays(table))
    found = save_drawings(preconditioner_drawings(run), out, prefix=label)
    for written in found.written:
        print(f"  wrote {written}")
    for name, reason in found.left_out.items():
        print(f"  no figure {name}: {reason}")


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
