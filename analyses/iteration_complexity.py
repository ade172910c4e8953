"""How many steps does each method need to reach a loss? Figures and findings of a study's runs.

python analyses/iteration_complexity.py runs/iteration_complexity --target 2.2 --out figures
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hessprobe.comparison.compared import compare
from hessprobe.comparison.findings import comparison_findings
from hessprobe.comparison.pictures import save_figures
from hessprobe.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one that contains runs"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the figures go")
    parser.add_argument(
        "--target",
        type=float,
        help="held-out loss, nats per token (default: the lowest that every run reached)",
    )
    given = parser.parse_args(arguments)
    try:
        comparison = compare(given.runs, given.target)
        written = save_figures(comparison, given.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"target {comparison.target:.6g} nats per token, {comparison.target_basis}")
    for finding in comparison_findings(comparison):
        print(f"  {finding.sentence} ({finding.basis})")
    for caution in comparison.cautions:
        print(f"  note: {caution}")
    for path in written:
        print(f"  wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
