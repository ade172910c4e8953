"""Which layers couple, how much of a step's curvature lies between them, and which should a preconditioner join?

python analyses/cross_layer_importance.py runs/nano --out figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hessprobe import analysis
from hessprobe.errors import UserError
from hessprobe.report.figure_set import save_figures


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
    try:
        for path, label in zip(given.runs, labels(given.runs), strict=True):
            study(path, given.out, label, given.step)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def study(path: Path, out: Path, label: str, step: int | None) -> None:
    """Draws one run's figures, prints its findings on cross-layer importance and the files written."""
    run = analysis.load_run(path)
    table = analysis.require_table(run, "cross_layer")
    groupings = analysis.study_groupings(table)
    print(f"{path}")
    for finding in analysis.findings(run, groupings):
        print(f"  {finding.sentence} ({finding.basis})")
    # A run recorded around the user's own loop holds no table on training.
    found = save_figures(
        run, out, prefix=label, step=step, training="train" in run.children, groupings=groupings
    )
    for written in found.written:
        print(f"  wrote {written}")
    for name, reason in found.left_out.items():
        print(f"  no figure {name}: {reason}")


def labels(runs: list[Path]) -> list[str]:
    """Returns what each run's file names begin with: nothing for one run, else its folder's own name."""
    if len(runs) == 1:
        return [""]
    names = [run.resolve().name for run in runs]
    return [f"{name}-" if names.count(name) == 1 else f"{name}-{i}-" for i, name in enumerate(names)]


if __name__ == "__main__":
    sys.exit(main())
