"""How far is the Gauss-Newton matrix from the Hessian, where, and which of its approximations costs a step more?

python analyses/gauss_newton_versus_hessian.py runs/nano --out figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hessprobe import analysis
from hessprobe.errors import UserError
from hessprobe.instruments.gn_hessian.figures import discrepancy_drawings
from hessprobe.instruments.gn_hessian.findings import discrepancy_findings, discrepancy_trends
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
    """Draws one run's figures, prints its findings on Gauss-Newton against Hessian and the files written."""
    run = analysis.load_run(path)
    table = analysis.require_table(run, "gn_hessian")
    print(f"{path}")
    for finding in [*discrepancy_findings(table), *discrepancy_trends(table)]:
        print(f"  {finding.sentence} ({finding.basis})")
    found = save_drawings(discrepancy_drawings(run), out, prefix=label)
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
