"""Processes that a validation starts: the command line under deterministic algorithms, and a loop under fully_shard.

python -m hessprobe.validation.children WORDS...: what `hessprobe WORDS...` does.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hessprobe.validation.modes import prepare

ALONE = [sys.executable, "-m"]
ONE_PROCESS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
COMMAND_LINE = "hessprobe.validation.children"
# A run of some seconds with a checkpoint at every step, on this machine's own text.
TINY = (
    "model.layers=1", "model.width=16", "model.feedforward=32", "model.heads=2", "model.context=16",
    "data.held_out_sequences=4", "optimizer.minibatches=2", "optimizer.sequences=4", "training.checkpoint_every=1",
    "cross_layer.sequences=4", "cross_layer.every=5", "training.threads=1",
)  # fmt: skip


def train_words(folder: Path, text: Path, device: str, steps: int, *more: str) -> list[str]:
    """Returns the words of `hessprobe train` for a tiny run."""
    settings = [f"--set={setting}" for setting in (*TINY, f"data.source={text}", f"training.steps={steps}")]
    return ["train", "--probe=cross_layer", f"--device={device}", f"--out={folder}", *settings, *more]


def write_text(path: Path) -> Path:
    """Writes a text of some 40 kB, the same everywhere, and returns its path."""
    generator = torch.Generator().manual_seed(0)
    words = ["layer", "block", "head", "gradient", "curvature", "matrix", "step", "of", "the", "and"]
    drawn = torch.randint(len(words), (6000,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in drawn), encoding="utf-8")
    return path


class Child:
    """A child process whose output goes into a file, on one thread where it runs on a CPU.

    Args:
        launcher: ALONE or ONE_PROCESS.
        module, words: what it runs.
        log: the file.
    """

    def __init__(self, launcher: Sequence[str], module: str, words: Sequence[str], log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        with open(log, "w", encoding="utf-8") as out:
            # A session of its own: torchrun's workers must go with it.
            self.process = subprocess.Popen(
                [*launcher, module, *words],
                stdout=out,
                stderr=out,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ended(self, seconds: float) -> int:
        """Waits for the end and returns the exit status.

        Raises:
            TimeoutError: it took longer, and was killed.
        """
        try:
            return self.process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{self.log.stem}: still running after {seconds:.0f} s") from None

    def succeeded(self, seconds: float) -> None:
        """Waits for the end.

        Raises:
            TimeoutError: it took longer, and was killed.
            RuntimeError: it failed; with its last words.
        """
        if status := self.ended(seconds):
            raise RuntimeError(f"{self.log.stem} ended with {status}: {self.last_words}")

    def kill(self) -> int:
        """Sends SIGKILL to it and what it has started; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        return self.process.wait()

    def wait_for(self, path: Path, seconds: float) -> bool:
        """Waits until a file exists; returns whether it does, False where the process ended or the time did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None and not path.exists():
            time.sleep(0.01)
        return path.exists()

    @property
    def last_words(self) -> str:
        """The last line that it said, of those that are not torchrun's frame."""
        lines = [
            line.strip(" =-") for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        ]
        said = [line for line in lines if line]
        errors = [line for line in said if "error" in line.lower() or "failed" in line.lower()]
        return (errors or said or ["nothing"])[-1][:300]


def main() -> None:
    """Runs the command line with deterministic algorithms, where torch has them."""
    prepare()
    # Where there is none (cumulative sums of floats on CUDA, in drawing labels) a run goes on with a warning.
    torch.use_deterministic_algorithms(True, warn_only=True)
    runpy.run_module("hessprobe", run_name="__main__")


if __name__ == "__main__":
    main()
