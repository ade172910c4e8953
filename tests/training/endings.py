"""Do all processes of a run end with 0, on a busy machine too? `python -m tests.training.endings --runs 30` asks torchrun.

Each run trains a tiny decoder in two processes while another process keeps a core busy; 5 to 10 s a run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.training.runs import text_file, tiny

ROOT = Path(__file__).parents[2]
BUSY = "while True: pass"


def ending(folder: Path) -> tuple[int, str]:
    """Returns torchrun's exit status of one run, and what was said: 0 only where both processes ended with 0."""
    flags = [f"--set={setting}" for setting in tiny(text_file(folder))]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "hessprobe", "train"]
    done = subprocess.run(
        [sys.executable, *words, f"--out={folder / 'run'}", "--steps=1", "--optimizer=adamw", *flags],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def main() -> None:
    """Prints how the runs ended; exits 1 unless all ended with 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--busy", type=int, default=1, help="processes that do nothing but keep a core busy")
    given = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(given.busy)]
    found: Counter[int] = Counter()
    try:
        for _ in range(given.runs):
            with tempfile.TemporaryDirectory() as folder:
                status, said = ending(Path(folder))
            found[status] += 1
            if status:
                print(said, file=sys.stderr)
            print(f"ended with {dict(found)}", flush=True)
    finally:
        for process in busy:
            process.kill()
    sys.exit(int(set(found) != {0}))


if __name__ == "__main__":
    main()
