"""findings.json and summary.md say what the page says, as strict JSON and as Markdown in which names stay text."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
import xarray as xr

from hessprobe.analysis import Finding
from hessprobe.report.findings import findings
from hessprobe.report.page import write_report
from hessprobe.report.summary import findings_json, markdown, summary_markdown
from tests.report.odd_text import HOSTILE
from tests.report.runs import write_run


def strict(text: str):
    def refused(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refused)


def test_the_same_sentences_and_numbers_stand_in_all_three(page: Path, log: xr.DataTree):
    stored = strict((page.parent / "findings.json").read_text(encoding="utf-8"))
    text = page.read_text(encoding="utf-8")
    said = [unescape(each) for each in re.findall(r'class="finding"[^>]*>(.*?)</data>', text, re.DOTALL)]
    found = findings(log)
    assert said == [each["sentence"] for each in stored["findings"]] == [each.sentence for each in found]
    assert [(each["value"], each["stderr"]) for each in stored["findings"]] == [
        (each.value, each.stderr) for each in found
    ]
    assert len(found) >= 7
    lines = (page.parent / "summary.md").read_text(encoding="utf-8").splitlines()
    bullets = [line for line in lines if line.startswith("- ")]
    assert len(bullets) == len(found)
    for bullet, each in zip(bullets, found, strict=True):
        assert re.sub(r"\\(.)", r"\1", bullet).startswith(f"- {each.sentence} ({each.basis}")
        assert ("not resolved)" in bullet) == (not each.resolved)
    assert stored["run"] == "nano-full-gn" and stored["provenance"]["versions"]["torch"] == "2.13.0"
    assert stored["provenance"]["git_commit"] == "0123abc" and "0123abc" in lines[-1]


def test_a_page_of_another_name_has_its_own(run: Path, tmp_path):
    write_report(run, tmp_path / "week-3.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "week-3.findings.json",
        "week-3.html",
        "week-3.summary.md",
    ]


def test_what_is_no_number_is_null_and_a_run_without_rows_says_so(tmp_path):
    odd = Finding(
        name="odd",
        sentence="a",
        value=float("nan"),
        stderr=float("inf"),
        basis="b",
        steps=(1,),
        resolved=False,
    )
    stored = strict(findings_json("x", [odd], {"data": '{"bytes": NaN}', "versions": "{broken"}))
    assert stored["findings"][0]["value"] is None and stored["findings"][0]["stderr"] is None
    assert stored["provenance"] == {"data": {"bytes": None}, "versions": "{broken"}
    folder = write_run(tmp_path / "empty", steps=[], train_steps=0)
    write_report(folder)
    assert strict((folder / "findings.json").read_text(encoding="utf-8"))["findings"] == []
    assert "No measured row yet" in (folder / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [HOSTILE, "a_b*c*", "# x", "[x](javascript:alert(1))", "a|b\n- c", "`x`", "<b>"]
)
def test_names_stay_text_in_markdown(name):
    shown = markdown(name)
    assert not re.search(r"(?<!\\)[`*_\[\]<>#|&]", shown) and "\n" not in shown
    assert re.sub(r"\\(.)", r"\1", shown) == " ".join(name.split())
    found = Finding(
        name="a", sentence=name, value=1.0, stderr=None, basis=name, steps=(), headline="1", label=name
    )
    text = summary_markdown(name, [found], {"device": name})
    assert not re.search(r"(?<!\\)<", text) and len(text.splitlines()) == 9
