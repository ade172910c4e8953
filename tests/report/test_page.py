"""The page says what the store holds: every number equals one recomputed here; what is missing is said."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.report.page_reading import facts, finding, numbers, script_json
from tests.report.runs import LAYERS

SOUND = [0, 5, 20, 25, 30]  # of the probed steps 0, 5 ... 30: step 10 failed, step 15 holds no number


def stack(text: str, name: str) -> np.ndarray:
    frames = script_json(text, "frame-data")["cross_layer"]
    shape = (len(frames["steps"]), len(frames["blocks"]), len(frames["blocks"]))
    return np.frombuffer(base64.b64decode(frames["stacks"][name]), dtype="<f4").reshape(shape)


@pytest.fixture(scope="module")
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table(log: xr.DataTree) -> xr.Dataset:
    return log["cross_layer"].to_dataset().sel(step=SOUND).load()


def test_the_matrices_behind_the_slider_are_those_stored(text, table):
    frames = script_json(text, "frame-data")["cross_layer"]
    assert frames["steps"] == SOUND and tuple(frames["blocks"]) == LAYERS
    np.testing.assert_allclose(stack(text, "coupling"), table["coupling"], rtol=1e-6)
    np.testing.assert_allclose(stack(text, "coupling_stderr"), table["coupling_stderr"], rtol=1e-6)
    for direction in ("update", "negative_gradient"):
        curvature = table["step_curvature"].sel(direction=direction).values
        whole = curvature.sum(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(stack(text, f"share.{direction}"), curvature / whole, rtol=1e-5)


def test_the_means_by_distance_are_those_of_the_stored_pairs(text, table):
    frames = script_json(text, "frame-data")["cross_layer"]
    assert frames["distances"] == [1, 2, 3, 4, 5]
    for name in ("coupling", "coupling_stderr"):
        shown = np.frombuffer(base64.b64decode(frames["means"][name]), dtype="<f4").reshape(len(SOUND), 5)
        expected = [
            [np.diagonal(matrix, offset=d).mean() for d in range(1, 6)] for matrix in table[name].values
        ]
        np.testing.assert_allclose(shown, expected, rtol=1e-5)


def test_the_lines_over_training_are_those_stored(text, table, log):
    charts = script_json(text, "chart-data")
    energy = charts["off_block_energy"]["data"][0]
    np.testing.assert_array_equal(numbers(energy["x"]), SOUND)
    np.testing.assert_array_equal(numbers(energy["y"]), table["off_block_energy"])
    np.testing.assert_array_equal(numbers(energy["error_y"]["array"]), table["off_block_energy_stderr"])
    for line, direction in zip(charts["cross_share"]["data"], ("update", "negative_gradient"), strict=True):
        matrices = table["step_curvature"].sel(direction=direction).values
        expected = [(m.sum() - np.diag(m).sum()) / m.sum() for m in matrices]
        np.testing.assert_allclose(numbers(line["y"]), expected, rtol=1e-12)
    train = log["train"].to_dataset().load()
    loss, held_out = charts["loss"]["data"]
    np.testing.assert_array_equal(numbers(loss["y"]), train["loss"])
    np.testing.assert_array_equal(numbers(held_out["y"]), train["held_out_loss"].dropna("step"))
    np.testing.assert_array_equal(numbers(charts["step_size"]["data"][0]["y"]), train["step_size"])
    np.testing.assert_array_equal(numbers(charts["decrease"]["data"][0]["y"]), train["actual_decrease"])
    np.testing.assert_array_equal(numbers(charts["decrease"]["data"][1]["y"]), train["predicted_decrease"])
    np.testing.assert_array_equal(numbers(charts["seconds"]["data"][0]["y"]), table["seconds"])


def test_the_loss_can_be_laid_along_every_clock(text, log):
    clocks, train = script_json(text, "frame-data")["training"], log["train"].to_dataset().load()
    assert set(clocks) == {"step", "tokens", "seconds", "gradient_equivalents"}
    evaluated = train.dropna("step", subset=["held_out_loss"])
    for clock, drawn in clocks.items():
        np.testing.assert_array_equal(drawn["x"][0], train[clock])
        np.testing.assert_array_equal(drawn["x"][1], evaluated[clock])
        assert all("step %{customdata}" in hover and "%{y:" in hover for hover in drawn["hover"])
        assert f'name="clock" value="{clock}"' in text
    assert "%{x:,.0f} tokens" in clocks["tokens"]["hover"][1]
    lines = script_json(text, "chart-data")["loss"]["data"]
    assert "step %{x}" in lines[1]["hovertemplate"]


def test_the_findings_state_the_stored_numbers(text, table, log):
    last = table.sel(step=30)
    value, stderr, sentence = finding(text, "off_block_energy")
    assert value == float(last["off_block_energy"])
    assert stderr is not None and stderr == float(last["off_block_energy_stderr"])
    assert f"{100 * value:.1f} ± {100 * stderr:.1f} %" in sentence and "step 30" in sentence
    curvature = last["step_curvature"].sel(direction="update").values
    share = 1 - np.trace(curvature) / curvature.sum()
    value, stderr, sentence = finding(text, "cross_share_update")
    assert value == pytest.approx(share, rel=1e-12) and stderr is None
    assert f"{100 * share:.1f} %" in sentence and f"{100 - 100 * share:.1f} %" in sentence
    off = np.where(np.eye(6, dtype=bool), 0, last["coupling"].values)
    i, j = np.unravel_index(off.argmax(), off.shape)
    value, stderr, sentence = finding(text, "strongest_pair")
    assert value == off.max() and stderr == last["coupling_stderr"].values[i, j]
    assert LAYERS[i] in sentence and LAYERS[j] in sentence
    held_out = log["train"]["held_out_loss"].values
    value, _, sentence = finding(text, "held_out_loss")
    assert value == np.nanmin(held_out)
    assert f"{held_out[0]:.4g}" in sentence and f"{value:.4g}" in sentence
    seconds = float(table["seconds"].sum())
    value, _, sentence = finding(text, "measuring_cost")
    training = float(log["train"]["seconds"][-1])  # of the steps alone
    assert value == pytest.approx(seconds / (training + seconds), rel=1e-12)
    assert f"{seconds:.1f} s" in sentence


def test_the_facts_of_training_costs_and_provenance_are_those_stored(text, table, log):
    shown, train = facts(text), log["train"].to_dataset().load()
    held_out = train["held_out_loss"].dropna("step")
    assert shown["best held-out loss"] == (
        f"{float(held_out.min()):.4g} nats per token, step {int(held_out['step'][held_out.values.argmin()])}"
    )
    assert shown["last held-out loss"] == f"{float(held_out[-1]):.4g} nats per token"
    assert shown["last training loss"] == f"{float(train['loss'][-1]):.4g} nats per token"
    assert shown["training tokens"] == f"{int(train['tokens'][-1]):,}"
    assert shown["line-search tokens"] == f"{int(train['line_search_tokens'][-1]):,}"
    assert shown["gradient equivalents"] == f"{float(train['gradient_equivalents'][-1]):.4g}"
    assert shown["time of training steps"] == f"{float(train['seconds'][-1]):,.1f} s"
    ratio = train["actual_decrease"].values / train["predicted_decrease"].values
    assert shown["real over predicted decrease"] == (
        f"median {np.median(ratio):.2f}, quartiles {np.quantile(ratio, 0.25):.2f} and {np.quantile(ratio, 0.75):.2f}"
    )
    cells = re.findall(
        r"<td>(.*?)</td>", re.findall(r'<section id="costs">.*?</section>', text, re.DOTALL)[0]
    )
    assert cells == [
        "cross_layer", "7", "1", f"{float(table['seconds'].sum()):.4g}",
        f"{float(table['seconds'].median()):.4g}", f"{float(table['gradient_equivalents'].median()):.4g}",
        f"{float(table['peak_memory'].max()) / 2**20:.4g} MiB",
    ]  # fmt: skip
    assert shown["commit"] == "0123abc" and shown["seed"] == "0" and shown["data: sha256"] == "ab12" * 16
    assert shown["data: bytes"] == "12,345,678"
    for word in ("optimizer.inner_steps", "2.13.0", "1,014", "3.0e-07"):
        assert f">{word}<" in text or word in text


def test_failed_rows_are_listed_with_their_reason(text):
    assert "1 row failed" in text and "step 10: out of memory: 8 rows need 3.2 GB" in text


def test_the_page_carries_plotly_once_and_asks_for_nothing(text):
    assert text.count("plotly.js v") == 1
    without_plotly = re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", text, flags=re.DOTALL)
    assert len(without_plotly) < 300_000
    assert not re.search(r'(src|href)\s*=\s*"(https?:)?//', without_plotly)
