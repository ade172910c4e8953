"""hessprobe validate: all checks green at small size, every figure on the page, failures and cuts said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.validation import command
from hessprobe.validation.figures import Figure, check, holds, measured, skipped
from hessprobe.validation.page import bars
from hessprobe.validation.runner import Bench, Budget, Stage, Validation, run_stages

pytestmark = pytest.mark.processes


STAGES = (
    "correctness", "harmlessness", "costs", "precision", "instruments", "steps", "throughput", "processes", "peaks",
)  # fmt: skip
FIELDS = {
    "name", "value", "unit", "kind", "limit", "at_least", "passed", "note", "stage", "seconds",
}  # fmt: skip


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "hessprobe", "validate", *words],
        capture_output=True, text=True, cwd=folder, timeout=900,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
    )  # fmt: skip


def test_the_small_run_on_the_cpu_is_green_and_leaves_nothing_out(tmp_path):
    """One test, since the run takes most of two minutes: its figures, its JSON file, its lines and its page."""
    # Time is no matter here: stages give up what does not fit, and on a busy machine nothing would.
    done = run("--device", "cpu", "--small", "--minutes", "60", "--out", "out", folder=tmp_path)
    whole = json.loads((tmp_path / "out" / "validate.json").read_text())
    figures = whole["figures"]
    failed = [f"{f['stage']}: {f['name']} {f['value']} {f['note']}" for f in figures if f["passed"] is False]
    assert done.returncode == 0, "\n".join([*failed, done.stderr])
    assert not failed and "checks passed" in done.stdout
    assert not {f["name"] for f in figures if f["kind"] == "skipped"}
    assert {f["stage"] for f in figures} == set(STAGES)
    every_figure_has_its_fields_and_a_line(whole, done.stdout)
    the_page_shows_every_figure_and_asks_nobody_for_anything(tmp_path / "out", figures)


def every_figure_has_its_fields_and_a_line(whole: dict, said: str) -> None:
    assert whole["finished"] and whole["schema"] == 1 and whole["failed"] == 0
    assert [stage["name"] for stage in whole["stages"]] == list(STAGES)
    assert all(stage["seconds"] > 0 for stage in whole["stages"])
    assert {"device", "versions", "commit", "asked for"} <= set(whole["machine"])
    for figure in whole["figures"]:
        assert set(figure) == FIELDS and figure["kind"] in ("check", "measurement")
        assert (figure["kind"] == "check") == (figure["passed"] is not None) == (figure["limit"] is not None)
        assert figure["name"] in said
    names = [(figure["stage"], figure["name"]) for figure in whole["figures"]]
    assert len(names) == len(set(names))


def the_page_shows_every_figure_and_asks_nobody_for_anything(folder: Path, figures: list[dict]) -> None:
    page = (folder / "validate.html").read_text(encoding="utf-8")
    for figure in figures:
        assert escape(figure["name"], quote=False) in page.replace("&#39;", "'"), figure["name"]
    assert (
        not re.search(r"(src|href)=[\"']?(https?:)?//", page) and "@import" not in page and "url(" not in page
    )
    assert "prefers-color-scheme: dark" in page and page.count('class="bar"') > 20
    assert not (folder / ".validate.html.partial").exists()


# -- the runner --------------------------------------------------------------------------------------------


def bench(folder: Path, seconds: float = 100.0, clock=None) -> Bench:
    budget = Budget(seconds) if clock is None else Budget(seconds, clock)
    return Bench(device=torch.device("cpu"), small=True, folder=folder, budget=budget)


def good(_: Bench) -> Iterator[Figure]:
    yield measured("a speed", 3.0, "gradients")
    yield check("an error", 1e-6, 1e-4)


def bad(_: Bench) -> Iterator[Figure]:
    yield check("an error", 1.0, 1e-4)
    yield check("not a number", float("nan"), 1e-4)
    yield holds("a statement", True)


def raises(_: Bench) -> Iterator[Figure]:
    yield measured("before", 1.0, "s")
    raise RuntimeError("CUDA out of memory\nand more")


def stage(name: str, function, **more) -> Stage:
    return Stage(name=name, title=f"{name}: a stage", run=function, **more)


def ran(folder: Path, *stages: Stage, **given) -> Validation:
    said: list[str] = []
    return run_stages(stages, bench(folder, **given), {"device": "a CPU"}, folder, said.append)


def test_a_stage_that_raises_is_a_failed_check_keeps_its_figures_and_the_next_one_runs(tmp_path):
    found = ran(tmp_path, stage("one", raises), stage("two", good))
    assert [(f.stage, f.name, f.passed) for f in found.figures] == [
        ("one", "before", None),
        ("one", "the rest of the stage", False),
        ("two", "a speed", None),
        ("two", "an error", True),
    ]
    assert found.figures[1].note == "RuntimeError: CUDA out of memory" and len(found.failures) == 1


def test_json_and_page_are_written_after_every_stage(tmp_path):
    seen = []

    def looks(_: Bench) -> Iterator[Figure]:
        whole = json.loads((tmp_path / "validate.json").read_text())
        seen.append((whole["finished"], [f["name"] for f in whole["figures"]]))
        yield measured("later", 1.0, "s")

    ran(tmp_path, stage("one", good), stage("two", looks))
    assert seen == [(False, ["a speed", "an error"])]
    assert json.loads((tmp_path / "validate.json").read_text())["finished"]


def test_a_stage_that_no_longer_fits_is_left_out_and_said(tmp_path):
    now = [0.0]

    def slow(_: Bench) -> Iterator[Figure]:
        now[0] += 95
        yield measured("slow", 95.0, "s")

    found = ran(tmp_path, stage("one", slow), stage("two", good, least=10), clock=lambda: now[0])
    assert found.figures[-1].kind == "skipped" and found.figures[-1].stage == "two"
    assert "5 s are left and it takes 10: give more --minutes" in found.figures[-1].note
    assert "give more --minutes" in (tmp_path / "validate.html").read_text() and not found.failures
    assert found.figures[0].seconds == 95


def test_what_one_stage_leaves_unspent_is_the_others():
    now = [0.0]
    budget = Budget(100, lambda: now[0])
    budget.start_stage(0.25)
    assert budget.stage_left == 25 and budget.fits(25) and not budget.fits(26)
    now[0] = 5
    budget.start_stage(1.0)
    assert budget.stage_left == budget.left == 95


def test_numbers_that_json_has_no_word_for_are_none_and_said(tmp_path):
    ran(tmp_path, stage("one", bad))
    whole = json.loads((tmp_path / "validate.json").read_text())
    assert whole["failed"] == 2
    assert whole["figures"][1]["value"] is None and "nan" in whole["figures"][1]["note"]


def test_bars_are_in_per_cent_of_the_longest_of_a_unit():
    given = [
        measured("a", 4, "gradients"),
        measured("b", 1, "gradients"),
        measured("c", 7, "s"),
        skipped("d", ""),
    ]
    assert bars(given) == {"a": 100.0, "b": 25.0}


# -- the command -------------------------------------------------------------------------------------------


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    from hessprobe.cli import main as command_line

    monkeypatch.setattr(sys, "argv", ["hessprobe", "validate", *words])
    with pytest.raises(SystemExit) as ended:
        command_line()
    return int(ended.value.code or 0)


def test_a_failed_check_ends_with_1_and_names_it_and_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "STAGES", (stage("one", good), stage("two", bad)))
    assert main(monkeypatch, "--device", "cpu", "--small", "--out", str(tmp_path / "v")) == 1
    said = capsys.readouterr().err
    assert said.startswith("failed: 2 of 4 checks, such as two: an error") and "validate.html" in said
    page = (tmp_path / "v" / "validate.html").read_text()
    assert "2 of 4 checks failed" in page and "FAIL" in page


def test_all_green_ends_with_0_and_keeps_the_number_of_threads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "STAGES", (stage("one", good),))
    assert main(monkeypatch, "--device", "cpu", "--small", "--out", str(tmp_path / "v")) == 0
    assert "all 1 checks passed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_a_mistake_in_the_call(tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, "--device", "cuda", "--out", str(tmp_path / "v")) == 2
    assert "error: --device cuda: not to be had here; this machine has auto, cpu" in capsys.readouterr().err
    assert not (tmp_path / "v").exists()


def test_other_mistakes_in_the_call(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--minutes 0: wanted more than 0"):
        command.validate(device="cpu", minutes=0, small=True, folder=tmp_path)
    with pytest.raises(UserError, match="--out .*file: cannot write there"):
        command.validate(device="cpu", minutes=1, small=True, folder=tmp_path / "file")
