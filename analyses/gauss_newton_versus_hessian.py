"""How far is the Gauss-Newton matrix from the Hessian, where, and which of its approximations costs a step more?

python analyses/gauss_newton_versus_hessian.py runs/nano --out figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hessprobe import analysis
from hessprobe.errors import UserError
from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.findings import findings
from hessprobe.instruments.gn_hessian.pictures import pictures
from hessprobe.pictures.matplotlib_pen import draw, save
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
    """Draws one run's figures, prints its findings on Gauss-Newton against Hessian and the files written."""
    answers = GNHessianAnswers(analysis.require_table(analysis.load_run(path), "gn_hessian"))
    print(f"{path}")
    for finding in findings(answers):
        print(f"  {finding.sentence} ({finding.basis})")
    for picture in pictures([Labelled(label=label, answers=answers, compared=answers)]):
        if picture.where == "page":
            continue
        try:
            for written in save(draw(picture), out, f"{label}{picture.name}"):
                print(f"  wrote {written}")
        except UserError as reason:
            print(f"  no figure {picture.name}: {reason}")


def labels(runs: list[Path]) -> list[str]:
    """Returns what each run's file names begin with: nothing for one run, else its folder's own name."""
    if len(runs) == 1:
        return [""]
    names = [run.resolve().name for run in runs]
    return [f"{name}-" if names.count(name) == 1 else f"{name}-{i}-" for i, name in enumerate(names)]


if __name__ == "__main__":
    sys.exit(main())
