"""Hostile names, missing, empty, failed, damaged and unfinished runs: a page or one clear line, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from html import unescape

import numpy as np
import pytest

from hessprobe.errors import UserError
from hessprobe.report import page as page_module
from hessprobe.report.page import write_report
from hessprobe.store.writer import RunWriter
from tests.report.runs import (
    LAYERS,
    attributes,
    cross_layer_row,
    cross_layer_table,
    train_row,
    train_table,
    write_run,
)
from tests.report.test_page import facts, script_json

HOSTILE = '</script><script>window.pwned=1</script><img src=x onerror="window.pwned=1"><b>x</b>&amp;'


def test_no_name_can_inject_markup(tmp_path):
    blocks = [f"{HOSTILE}{i}" for i in range(3)]
    recipe = json.dumps({HOSTILE: HOSTILE, "nested": {"key": HOSTILE}})
    folder = write_run(
        tmp_path / "run", blocks=blocks, name=HOSTILE, recipe=recipe, device=HOSTILE, git_commit=HOSTILE,
        versions=json.dumps({HOSTILE: HOSTILE}), data=json.dumps({"source": HOSTILE}), created=HOSTILE,
        failed={5: HOSTILE},
    )  # fmt: skip
    text = write_report(folder).read_text(encoding="utf-8")
    assert "window.pwned=1</script>" not in text and "<img" not in text and "<b>" not in text
    assert script_json(text, "frame-data")["cross_layer"]["blocks"] == blocks
    # Plotly reads its texts as HTML of its own, so names reach it escaped once more.
    assert unescape(script_json(text, "chart-data")["coupling"]["data"][0]["x"][0]) == blocks[0]
    assert "<" not in script_json(text, "chart-data")["coupling"]["data"][0]["x"][0]


def test_a_missing_table_says_which_flag_records_it(tmp_path):
    text = write_report(write_run(tmp_path / "run", steps=None)).read_text(encoding="utf-8")
    assert "hessprobe train --probe cross_layer records it" in unescape(text)
    assert "Training" in text and "best held-out loss" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"steps": [0], "failed": {0: "no memory"}}, "could be measured (step 0: no memory)"),
        ({"steps": [0, 5], "blank": [0, 5]}, "holds a number yet"),
        ({"steps": [], "train_steps": 0}, "holds no recorded row yet"),
        ({"steps": [0], "blocks": ["all"]}, "1 measured"),
        ({"steps": [0], "blocks": ["mine", "yours"]}, "These blocks have no depth"),
        ({"recipe": "not json", "partition": '{"a": "b"}', "data": "{}", "versions": "[1]"}, "not recorded"),
    ],
)
def test_empty_and_odd_runs_give_a_page(tmp_path, arguments, said):
    text = write_report(write_run(tmp_path / "run", **arguments)).read_text(encoding="utf-8")
    assert said in unescape(text) and "How to read this page" in text
    script_json(text, "chart-data")


def test_a_run_without_attributes_or_tables_gives_a_page(tmp_path):
    RunWriter.create(tmp_path / "bare", {}).close()
    text = write_report(tmp_path / "bare").read_text(encoding="utf-8")
    assert "bare" in text and "No measured row yet" in text


def test_a_run_in_progress_gives_the_page_so_far(tmp_path):
    rng = np.random.default_rng(0)
    writer = RunWriter.create(tmp_path / "run", attributes())
    writer.add_table(train_table(), range(100))
    writer.add_table(cross_layer_table(), None)
    writer.write("train", 0, train_row(0, 100, True, rng))
    writer.write("cross_layer", 0, cross_layer_row(LAYERS, 0.0, rng))
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert facts(text)["steps recorded"] == "1 of 31: in progress, or cut off"
    writer.write("cross_layer", 10, cross_layer_row(LAYERS, 0.5, rng))
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert script_json(text, "frame-data")["cross_layer"]["steps"] == [0, 10]
    writer.close()


def test_no_run_there_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        write_report(tmp_path / "nothing")


def test_a_damaged_table_is_one_clear_line(tmp_path):
    folder = write_run(tmp_path / "run")
    chunk = next(
        p for p in (folder / "log.zarr" / "cross_layer" / "coupling" / "c").rglob("*") if p.is_file()
    )
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(UserError, match="table 'cross_layer' is damaged"):
        write_report(folder)


def test_the_page_is_written_whole_or_not_at_all(tmp_path, run, monkeypatch):
    target = write_report(run, tmp_path / "deep" / "page.html")
    before = target.read_text(encoding="utf-8")

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(page_module.os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        write_report(run, target)
    assert target.read_text(encoding="utf-8") == before
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_reading_and_reporting_need_no_torch(run, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from rich.console import Console\n"
        "from hessprobe.report.page import write_report\n"
        "from hessprobe.report.figures import coupling_heatmap\n"
        "from hessprobe.report.terminal import show\n"
        "from hessprobe.analysis import open_run\n"
        "path = Path(sys.argv[1]); write_report(path, Path(sys.argv[2]) / 'page.html')\n"
        "coupling_heatmap(open_run(path)); show(path, Console())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(run), str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
