"""What the page says of groupings equals dense algebra on sketches rebuilt from the stored kernels; what cannot be had
says which flag records it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.optimize import brentq

from hessprobe.analysis import open_run
from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers
from hessprobe.instruments.cross_layer.grouping.study import study_groupings
from hessprobe.instruments.cross_layer.pictures import pictures
from hessprobe.pictures.matplotlib_pen import draw, save
from hessprobe.reading.labelled import Labelled
from hessprobe.report.findings import findings
from hessprobe.report.page import write_report
from tests.pictures.drawn import grid_on_paper, lines_on_paper
from tests.report.page_reading import finding, numbers, script_json
from tests.report.runs import LAYERS, write_run

Groups = list[tuple[int, ...]]
K = len(LAYERS)
ALONE: Groups = [(i,) for i in range(K)]
FULL: Groups = [tuple(range(K))]


@pytest.fixture(scope="module")
def text(sketched: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(sketched, tmp_path_factory.mktemp("page") / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def last(sketched: Path) -> xr.Dataset:
    return open_run(sketched)["cross_layer"].to_dataset().sel(step=30).load()


def oracle(row: xr.Dataset, mu: float) -> Callable[[Groups], np.ndarray]:
    """Returns the function groups -> held-out decrease of all sequences, then with each left out, by dense solves.

    Sketches and gradients are any vectors with the stored inner products; a damped solve in a sketched G that is meant to
    act like one at mu is z (G + z)^-1 g / mu, where 1 / mu is the mean of the diagonal of (K + z)^-1.
    """
    sequence, rounds = np.array(row.attrs["sketch_sequence"]), np.array(row.attrs["sketch_round"])
    count = sequence.max() + 1
    blocks = []
    for i in range(K):
        a = -row["alignment"].sel(direction="negative_gradient").values[i][:, None]
        gram = np.block([[row["kernel"].values[i], a], [a.T, row["gradient_norm2"].values[i, None, None]]])
        values, vectors = np.linalg.eigh(gram)
        keep = values > 1e-6 * values[-1]
        blocks.append((vectors * np.sqrt(np.maximum(values, 0)))[:, keep])
    together = {
        group: np.hstack([blocks[i] for i in group]) for size in range(1, K + 1) for group in _of(size)
    }

    def curvature(w: np.ndarray, sequences: list[int], which: np.ndarray) -> np.ndarray:
        chosen = np.isin(sequence, sequences) & np.isin(rounds, which)
        return w[:-1][chosen].T @ w[:-1][chosen] / chosen.sum()  # the tokens are equal

    @cache
    def damping(group: tuple[int, ...], half: int, part: int) -> float:
        w = together[group]
        chosen = (sequence % 2 == half) & (rounds % 2 == part)
        gram, one = w[:-1][chosen] @ w[:-1][chosen].T / chosen.sum(), np.eye(chosen.sum())

        def excess(t: float) -> float:
            return np.diag(np.linalg.inv(gram + np.exp(t) * one)).mean() - 1 / mu

        return float(np.exp(brentq(excess, np.log(1e-3 * mu), np.log(mu), xtol=1e-13)))  # pyright: ignore

    @cache
    def solved(group: tuple[int, ...], half: int, out: int | None, part: int) -> np.ndarray:
        w, z = together[group], damping(group, half, part)
        left = [b for b in range(half, count, 2) if b != out]
        g = w[-1]
        return -z / mu * np.linalg.solve(curvature(w, left, np.arange(part, 4, 2)) + z * np.eye(len(g)), g)

    def decrease(groups: Groups) -> np.ndarray:
        w = np.hstack([together[group] for group in groups])
        g, found = w[-1], []
        for out in [None, *range(count)]:
            ways = []
            for half in (0, 1):
                # A sequence left out of the other half leaves the solves as they are.
                kept = out if out is not None and out % 2 == half else None
                d1, d2 = (np.concatenate([solved(group, half, kept, r) for group in groups]) for r in (0, 1))
                judge = [b for b in range(1 - half, count, 2) if b != out]
                seen = w[:-1][np.isin(sequence, judge)]
                bent = (seen @ d1) @ (seen @ d2) / len(seen) + mu * d1 @ d2
                ways.append((g @ (d1 + d2) / 2) ** 2 / (2 * bent))
            found.append(np.mean(ways))
        return np.array(found)

    return decrease


def _of(size: int) -> list[tuple[int, ...]]:
    return list(combinations(range(K), size))


def jackknife(values: np.ndarray) -> float:
    return float(
        np.sqrt(((values[1:] - values[1:].mean()) ** 2).sum() * (len(values) - 2) / (len(values) - 1))
    )


@pytest.fixture(scope="module")
def decrease(last: xr.Dataset) -> Callable[[Groups], np.ndarray]:
    known: dict[tuple, np.ndarray] = {}
    ask = oracle(last, 2.0)

    def asked(groups: Groups) -> np.ndarray:
        key = tuple(sorted(groups))
        if key not in known:
            known[key] = ask(sorted(groups))
        return known[key]

    return asked


def joined(i: int, j: int) -> Groups:
    return [(i, j), *((k,) for k in range(K) if k not in (i, j))]


def drawn(chart: dict[str, Any], error: str) -> dict[Any, tuple[float, float, str]]:
    """Returns {label: (value, error, hover's last line)} of a chart of dots with errors."""
    horizontal = error == "error_x"
    found = {}
    for trace in chart["data"]:
        if error not in trace:
            continue
        labels, values = (trace["y"], trace["x"]) if horizontal else (trace["x"], trace["y"])
        labels = labels if horizontal else numbers(labels).astype(int).tolist()
        errors = numbers(trace[error]["array"])
        for label, value, stderr, custom in zip(
            labels, numbers(values), errors, trace["customdata"], strict=True
        ):
            assert float(custom[0].strip(" ±%")) / 100 == pytest.approx(stderr, rel=0.06, abs=1e-9)
            found[label] = (float(value), float(stderr), str(custom[-1]))
    return found


def test_the_gains_of_pairs_their_errors_and_their_order(text, decrease):
    chart = script_json(text, "chart-data")["merge_gains"]
    shown = drawn(chart, "error_x")
    base, expected = decrease(ALONE), {}
    for i in range(K):
        for j in range(i + 1, K):
            gain = decrease(joined(i, j)) / base - 1
            expected[f"{LAYERS[i]} × {LAYERS[j]}"] = (gain[0], jackknife(gain))
    assert shown.keys() == expected.keys()
    for pair, (value, stderr) in expected.items():
        assert shown[pair][0] == pytest.approx(value, rel=1e-2, abs=2e-5)
        assert shown[pair][1] == pytest.approx(stderr, rel=2e-2, abs=2e-5)
        assert ("within 2 standard errors" in shown[pair][2]) == (abs(value) <= 2 * stderr)
    ranking = sorted(shown, key=lambda pair: -shown[pair][0])
    assert chart["layout"]["yaxis"]["categoryarray"] == ranking[::-1]
    beyond = sum(value > 2 * stderr for value, stderr in expected.values())
    assert f"Of 15 pairs,\n    {beyond} add and 0 cost something beyond two errors (of noise" in text


def test_the_curve_from_layerwise_to_full(text, decrease):
    shown = drawn(script_json(text, "chart-data")["grouping_curve"], "error_y")
    assert sorted(shown) == list(range(1, K + 1))
    groups, full = list(ALONE), decrease(FULL)
    for count in range(K, 0, -1):
        share = decrease(groups) / full
        assert shown[count][0] == pytest.approx(share[0], rel=1e-3)
        assert shown[count][1] == pytest.approx(jackknife(share), rel=2e-2, abs=1e-6)
        if count > 1:
            pairs = [(a, b) for i, a in enumerate(groups) for b in groups[:i]]
            best = max(pairs, key=lambda pair: _merged(decrease, groups, pair)[0])
            groups = sorted([g for g in groups if g not in best] + [tuple(sorted(best[0] + best[1]))])
            names = {" + ".join(LAYERS[i] for i in part) for part in best}
            assert all(name in shown[count - 1][2] for name in names)
    assert "layerwise" in shown[K][2]


def _merged(decrease, groups: Groups, pair) -> np.ndarray:
    return decrease([g for g in groups if g not in pair] + [tuple(sorted(pair[0] + pair[1]))])


def test_the_importance_of_blocks_over_training(text, sketched):
    heat, dots = script_json(text, "chart-data")["importance"]["data"]
    assert heat["x"] == ["0", "10", "30"] and heat["y"] == list(LAYERS)  # step 20 failed
    values, errors = (np.array(numbers_of(heat[key])).reshape(K, 3) for key in ("z", "customdata"))
    assert np.isnan(values[:, 0]).all()  # the sketches of step 0 do not reach the damping of step 30
    table, marked = open_run(sketched)["cross_layer"].to_dataset(), set()
    for column, step in ((1, 10), (2, 30)):
        ask = oracle(table.sel(step=step).load(), 2.0)
        full = ask(FULL)
        for i in range(K):
            lost = 1 - ask([(i,), tuple(k for k in range(K) if k != i)]) / full
            assert values[i, column] == pytest.approx(lost[0], rel=1e-2, abs=2e-5)
            assert errors[i, column] == pytest.approx(jackknife(lost), rel=2e-2, abs=2e-5)
            if abs(lost[0]) > 2 * jackknife(lost):
                marked.add((str(step), LAYERS[i]))
    assert set(zip(dots["x"], dots["y"], strict=True)) == marked
    assert "Blank: this damping is too small" in text


def numbers_of(packed) -> list[float]:
    if isinstance(packed, dict):
        return numbers(packed).tolist()
    return [np.nan if value is None else value for row in packed for value in row]


def test_the_findings_on_groupings(text, decrease):
    ratio = decrease(FULL) / decrease(ALONE)
    value, stderr, sentence = finding(text, "full_over_layerwise")
    assert value == pytest.approx(ratio[0] - 1, rel=1e-2) and stderr == pytest.approx(
        jackknife(ratio), rel=1e-2
    )
    assert abs(value) < 2 * stderr and "cannot be told apart" in sentence
    gains = {pair: decrease(joined(*pair)) / decrease(ALONE) - 1 for pair in _of(2)}
    i, j = max(gains, key=lambda pair: gains[pair][0])
    value, stderr, sentence = finding(text, "best_merge")
    assert value == pytest.approx(gains[i, j][0], rel=1e-2)
    assert stderr == pytest.approx(jackknife(gains[i, j]), rel=2e-2)
    assert f"{LAYERS[i]} and {LAYERS[j]} ({100 * value:.1f} ± {100 * stderr:.1f} %)" in sentence
    assert "cannot be told apart within their errors" in sentence
    assert "damping 2, the smallest of 1, 2, 5 …" in text
    assert 'data-name="groups_needed"' not in text  # there is no resolved gap to close


def test_the_stable_layerwise_step_stands_beside_the_chosen_step_sizes(text, sketched, last):
    lower, upper, chosen = script_json(text, "chart-data")["jacobi_radius"]["data"]
    log = open_run(sketched)
    rows = log["cross_layer"].to_dataset().sel(step=[0, 10, 30])
    np.testing.assert_allclose(numbers(lower["y"]), 2 / rows["jacobi_radius"].values)
    np.testing.assert_allclose(numbers(upper["y"]), 2 / rows["jacobi_radius_held_out"].values)
    np.testing.assert_array_equal(numbers(chosen["y"]), log["train"]["step_size"].values)
    value, stderr, sentence = finding(text, "jacobi_radius")
    low, high = float(last["jacobi_radius_held_out"]), float(last["jacobi_radius"])
    assert value == low and stderr is None
    assert f"{low:.3g} to {high:.3g} times" in sentence and f"{2 / high:.2g} to {2 / low:.2g}" in sentence


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sketches": (6, 1)}, "--set cross_layer.rounds=4"),
        ({"sketches": (3, 4)}, "measure with 4 or more"),
        ({}, "--set cross_layer.method=kernels --set cross_layer.rounds=4"),
        ({"sketches": (6, 4), "blocks": ["all"]}, "one block has nothing to be joined with"),
    ],
)
def test_what_cannot_be_said_names_the_way_out(tmp_path, arguments, said):
    path = write_report(write_run(tmp_path / "run", steps=(0, 5), **arguments))
    text = unescape(path.read_text(encoding="utf-8"))
    assert said in text and "Nothing can be said of groupings" in text
    assert "merge_gains" not in script_json(text, "chart-data")
    found = json.loads((path.parent / "findings.json").read_text(encoding="utf-8"))["findings"]
    assert not {"full_over_layerwise", "best_merge"} & {each["name"] for each in found}


def test_many_blocks_give_the_ends_of_the_ranking_and_too_many_say_what_is_left_out(tmp_path, monkeypatch):
    blocks = ("embedding", *(f"block.{i}" for i in range(6)), "head")
    folder = write_run(tmp_path / "run", steps=(0, 5), blocks=blocks, sketches=(8, 4))
    text = write_report(folder).read_text(encoding="utf-8")
    shown = drawn(script_json(text, "chart-data")["merge_gains"], "error_x")
    assert len(shown) == 16 and "the 12 highest and 4 lowest are drawn" in text
    monkeypatch.setattr("hessprobe.instruments.cross_layer.grouping.study.SOLVES_OF_THE_LAST", 100)
    text = write_report(folder).read_text(encoding="utf-8")
    charts = script_json(text, "chart-data")
    assert "merge_gains" not in charts and "importance" in charts
    assert (
        "the pairs of 8 blocks with 32 sketches are left to hessprobe.instruments.cross_layer.grouping.table"
        in text
    )


def test_the_figures_draw_what_the_page_does(sketched, text, tmp_path):
    run, charts = open_run(sketched), script_json(text, "chart-data")
    answers = CrossLayerAnswers(run["cross_layer"].to_dataset())
    runs = [Labelled(label="", answers=answers, compared=answers, run=run)]
    figures = {each.name: draw(each) for each in pictures(runs)}
    names = [label.get_text() for label in figures["merge_gains"].axes[0].get_yticklabels()]
    assert names == charts["merge_gains"]["layout"]["yaxis"]["categoryarray"][::-1]
    containers: Any = figures["merge_gains"].axes[0].containers
    dots = np.concatenate([container.lines[0].get_xdata() for container in containers])
    on_page = [value for value, _, _ in drawn(charts["merge_gains"], "error_x").values()]
    np.testing.assert_allclose(np.sort(dots[np.isfinite(dots)]), np.sort(on_page))
    curve = lines_on_paper(figures["grouping_curve"])[0]
    on_page = drawn(charts["grouping_curve"], "error_y")
    np.testing.assert_allclose(curve["y"], [on_page[int(count)][0] for count in curve["x"]])
    heat = charts["importance"]["data"][0]
    values = np.reshape(numbers_of(heat["z"]), (K, 3))
    assert np.isnan(values[:, 0]).all()
    np.testing.assert_allclose(grid_on_paper(figures["importance"]), 100 * values)
    lines = lines_on_paper(figures["jacobi_radius"])
    for line, chart in zip(lines, charts["jacobi_radius"]["data"], strict=True):
        np.testing.assert_allclose(line["y"], numbers(chart["y"]))
    for name in ("jacobi_radius", "merge_gains"):
        assert all(path.stat().st_size > 1000 for path in save(figures[name], tmp_path, name))


def test_findings_are_the_same_whether_the_study_is_given_or_not(sketched):
    run = open_run(sketched)
    study = study_groupings(run["cross_layer"].to_dataset())
    assert [f.sentence for f in findings(run)] == [f.sentence for f in findings(run, study)]
