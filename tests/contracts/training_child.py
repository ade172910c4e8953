"""A process that starts or resumes a training in a forked child, once per line on stdin: `FOLDER<tab>FLAG...`.

Forking spares each round the import of torch. Lines on stdout: the trainer's pid, then, when it is gone, how it
ended: its exit status, or minus the signal that killed it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

import hessprobe.report.page
import hessprobe.training.loop  # what the command line imports when it trains
from hessprobe.cli import main as command_line
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.optimization.gauss_newton import GaussNewton


def warm_up() -> None:
    """Makes torch import what it imports late: seconds at the first model and the first forward-mode product."""
    config = DecoderConfig(layers=1, width=8, feedforward=8, heads=2, vocabulary=5, context=4)
    model = Decoder(config, generator=torch.Generator().manual_seed(0))
    batch = (torch.zeros(1, 4, dtype=torch.long),) * 2
    optimizer = GaussNewton(model)
    optimizer.step([batch], [batch])


def train(folder: Path, flags: list[str]) -> None:
    """Runs the command line as a user would; what it prints goes to a file beside the run."""
    with open(folder.with_suffix(".out"), "a", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = ["hessprobe", "train", f"--out={folder}", *flags]
    command_line()


def main() -> None:
    """Serves one attempt after the other."""
    torch.set_num_threads(1)
    warm_up()
    # The page is no part of what is killed and compared here, and takes longer than the run.
    hessprobe.report.page.write_report = lambda run, destination=None: Path(run, "report.html")
    for line in sys.stdin:
        folder, *flags = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                train(Path(folder), flags)
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
