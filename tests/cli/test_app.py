"""How a command ends: 0, 1 for a run that failed, 2 for a mistake, 130 for Ctrl-C; a slip is told with the likely word."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.commands import Answer
from tests.training.runs import attributes, parameters, state, tables

pytestmark = pytest.mark.usefixtures("no_page")


def test_a_misspelt_command_or_flag_is_told_with_the_likely_one(hessprobe):
    answer = hessprobe("trian")
    assert answer.code == 2 and "Did you mean 'train'?" in answer.error and not answer.out
    answer = hessprobe("train", "--prob", "cross_layer")
    assert answer.code == 2 and "--probe" in answer.error


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(hessprobe, small, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hessprobe.training.loop.train", interrupted)
    answer = hessprobe("train", *small)
    assert answer.code == 130
    assert "stopped; the log and the last checkpoint are kept: go on with --resume" in answer.error


class TestLossThatIsNotFinite:
    """The run stops with exit 1, says at which step, and keeps what it logged."""

    @pytest.fixture
    def diverged(self, hessprobe, small) -> Answer:
        words = ["--steps=6", "--set=optimizer.learning_rate=1e30", "--probe=cross_layer"]
        return hessprobe("train", *small, *words, "--out", "runs/a")

    def test_it_stops_and_says_at_which_step(self, diverged):
        assert diverged.code == 1
        *_, last = diverged.error.splitlines()
        assert last.startswith("failed: step ") and "the loss is not finite" in last
        assert "its log is kept in runs/a" in last and "learning_rate" in last
        assert "Traceback" not in diverged.error and diverged.out == ""

    def test_its_log_is_kept_up_to_that_step(self, diverged):
        step = int(diverged.error.splitlines()[-1].split()[2].rstrip(":"))
        found = tables(Path("runs/a"))
        assert found["train"].step.values.tolist() == list(range(step + 1))
        assert torch.isfinite(torch.tensor(found["train"].loss.values[0]))

    def test_its_checkpoint_is_of_a_step_before(self, diverged):
        step = int(diverged.error.splitlines()[-1].split()[2].rstrip(":"))
        assert state(Path("runs/a"))["step"] <= step
        assert torch.isfinite(parameters(Path("runs/a"))).all()


class TestFullDisk:
    """No space left: one line, exit 2, what was recorded stays, and the run goes on once there is space."""

    @pytest.fixture
    def disk(self, tmp_path) -> Iterator[Callable[[str], Path]]:
        """Returns the function size -> a disk of that size; called again it changes the size."""
        path = tmp_path / "disk"
        path.mkdir()
        mounted = False

        def sized(size: str) -> Path:
            nonlocal mounted
            options = f"{'remount,' * mounted}size={size}"
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"needs to mount a small disk, and may not: {done.stderr.strip()}")
            mounted = True
            return path

        yield sized
        if mounted:
            subprocess.run(["umount", str(path)], check=True)

    @pytest.mark.parametrize("size", ["4k", "16k", "100k", "200k"])
    def test_it_is_one_line_and_the_run_goes_on_when_there_is_space(self, hessprobe, small, disk, size):
        folder = disk(size) / "a"
        words = [*small, "--probe=cross_layer", f"--out={folder}"]
        answer = hessprobe("train", *words)
        assert answer.code == 2 and answer.out == "", answer
        assert "Traceback" not in answer.error
        last = answer.error.splitlines()[-1]
        assert last.startswith("error: ") and "space" in last and str(folder) in last
        disk("8m")
        assert hessprobe("train", "--resume", *words).code == 0
        assert hessprobe("train", *small, "--probe=cross_layer", "--out=whole").code == 0
        assert torch.equal(parameters(folder), parameters(Path("whole")))
        assert tables(folder)["train"].step.values.tolist() == [0, 1]
        assert attributes(folder)["seed"] == 0
