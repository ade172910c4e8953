"""Hostile names, missing, empty, failed, damaged and unfinished runs: a page or one clear line, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import zarr

from hessprobe.cli import main
from hessprobe.errors import UserError
from hessprobe.instruments.train.table import train_table
from hessprobe.report import page as page_module
from hessprobe.report.page import write_report
from hessprobe.store.writer import RunWriter
from tests.report.odd_text import HOSTILE
from tests.report.page_reading import facts, script_json
from tests.report.runs import (
    LAYERS,
    STEP_SIZES,
    attributes,
    cross_layer_row,
    cross_layer_table,
    sketches_row,
    train_row,
    write_run,
)


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
    writer.add_table(train_table(STEP_SIZES, 1), range(100))
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


def test_damaged_kernels_leave_everything_else(tmp_path):
    folder = write_run(tmp_path / "run", steps=(0, 10), sketches=(8, 4))
    for chunk in (folder / "log.zarr" / "cross_layer" / "kernel" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:100])
    text = unescape(write_report(folder).read_text(encoding="utf-8"))
    assert "the layer kernels of this row are damaged" in text and "copy the run again" in text
    assert script_json(text, "frame-data")["cross_layer"]["steps"] == [0, 10]


def torn_root(folder: Path) -> None:
    (folder / "log.zarr" / "zarr.json").unlink()


def torn_table(folder: Path) -> None:
    (folder / "log.zarr" / "cross_layer" / "zarr.json").unlink()


def half_a_root(folder: Path) -> None:
    path = folder / "log.zarr" / "zarr.json"
    path.write_text(path.read_text()[:40])


def no_label(folder: Path) -> None:
    shutil.rmtree(folder / "log.zarr" / "cross_layer" / "coupling")
    (folder / "log.zarr" / "cross_layer" / "recorded" / "zarr.json").unlink()


def newer(folder: Path) -> None:
    zarr.open_group(folder / "log.zarr", mode="r+").attrs["schema_version"] = 99


def foreign(folder: Path) -> None:
    shutil.rmtree(folder / "log.zarr")
    zarr.create_group(folder / "log.zarr", attributes={"title": "weather"}).create_array(
        "t", shape=(3,), dtype="f8"
    )


def no_run_at_all(folder: Path) -> None:
    shutil.rmtree(folder / "log.zarr")
    (folder / "notes.txt").write_text("nothing here")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (torn_root, "is torn: its zarr.json is missing"),
        (torn_table, "is torn: its zarr.json is missing"),
        (half_a_root, "is torn: its zarr.json cannot be read"),
        (no_label, "is torn"),
        (newer, "has schema version 99; this hessprobe reads up to version 1. Update hessprobe"),
        (foreign, "is a zarr store but no log of hessprobe"),
        (no_run_at_all, "the folder holds no log.zarr"),
    ],
)
@pytest.mark.parametrize("verb", ["report", "show"])
def test_what_is_no_whole_log_of_ours_is_one_clear_line(tmp_path, harm, said, verb, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", steps=(0,), train_steps=2)
    harm(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["hessprobe", verb, str(folder)])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == "" and told.err.count("\n") == 1
    assert told.err.startswith("error: ") and said in told.err
    assert sorted(folder.rglob("*")) == before  # nothing written, nothing lost


def test_dead_layers_infinities_and_rows_of_nothing_leave_a_page(tmp_path):
    """A layer without curvature gives NaN in its row and column; overflow gives infinities."""
    rng = np.random.default_rng(0)
    writer = RunWriter.create(tmp_path / "run", attributes())
    writer.add_table(train_table(STEP_SIZES, 1), range(6))
    writer.add_table(cross_layer_table(LAYERS, (8, 4)), range(6))
    for step in range(6):
        row = cross_layer_row(LAYERS, step / 6, rng) | sketches_row(LAYERS, step / 6, rng, (8, 4))
        if step == 1:
            for name in ("coupling", "coupling_stderr", "fro2"):
                row[name][2, :] = row[name][:, 2] = np.nan
        if step == 2:
            row = {name: np.full(np.shape(value), np.inf) for name, value in row.items()}
        if step == 3:
            row |= {"step_curvature": np.zeros((2, 6, 6)), "jacobi_radius": np.nan, "loss": np.inf}
        if step == 4:
            writer.fail("cross_layer", step, "overflow in block.2")
            continue
        if step == 5:  # every sketch NaN, the rest whole
            row |= {name: np.full(np.shape(row[name]), np.nan) for name in ("kernel", "alignment")}
        writer.write("cross_layer", step, row)
        writer.write("train", step, train_row(step, 6, True, rng) | ({"loss": np.nan} if step == 1 else {}))
    writer.close()
    path = write_report(tmp_path / "run")
    text = unescape(path.read_text(encoding="utf-8"))
    assert "step 4: overflow in block.2" in text and "1 row failed" in text
    assert "the layer kernels of this row are not finite" in text
    read = re.sub(r"<(script|style).*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf|infinity)\b", read, re.IGNORECASE)
    assert script_json(text, "frame-data")["cross_layer"]["steps"] == [0, 1, 3, 5]
    json.loads((path.parent / "findings.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_tables_and_variables_of_another_version_leave_a_page(tmp_path):
    folder = write_run(tmp_path / "run", steps=(0, 5), train_steps=3)
    log = folder / "log.zarr"
    for name in ("off_block_energy", "off_block_energy_stderr", "step_curvature", "symmetry_gap"):
        shutil.rmtree(log / "cross_layer" / name)
    shutil.copytree(log / "train", log / "unheard_of")
    text = write_report(folder).read_text(encoding="utf-8")
    charts = script_json(text, "chart-data")
    assert "coupling" in charts and "shares" not in charts and "off_block_energy" not in charts
    assert "This table holds no step_curvature" in text


def test_the_page_is_written_whole_or_not_at_all(tmp_path, run, monkeypatch):
    target = write_report(run, tmp_path / "deep" / "page.html")
    before = target.read_text(encoding="utf-8")

    def fails(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(page_module.os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        write_report(run, target)
    assert target.read_text(encoding="utf-8") == before
    names = ["page.findings.json", "page.html", "page.summary.md"]
    assert sorted(path.name for path in target.parent.iterdir()) == names


@pytest.mark.processes
def test_reading_and_reporting_need_no_torch(run, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from rich.console import Console\n"
        "from hessprobe.report.page import write_report\n"
        "from hessprobe.report.figure_set import save_figures\n"
        "from hessprobe.report.terminal import show\n"
        "from hessprobe.analysis import open_run\n"
        "path = Path(sys.argv[1]); write_report(path, Path(sys.argv[2]) / 'page.html')\n"
        "save_figures(open_run(path), Path(sys.argv[2])); show(path, Console())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(run), str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "page.html").stat().st_size > 1_000_000
