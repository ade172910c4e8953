"""Groupings from sketches equal dense algebra where sketches are all of G, stand for exact solves where they are a
sample of it, cover the truth with their errors, and say where they are not to be trusted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import xarray as xr
from threadpoolctl import ThreadpoolController

from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.grouping.answer import LEAST_FREEDOM
from hessprobe.instruments.cross_layer.grouping.groupings import (
    block_importance,
    curvature_along,
    greedy_grouping,
    merge_gains,
    relative_decrease,
)
from hessprobe.instruments.cross_layer.grouping.sketch_space import CrossFit
from hessprobe.instruments.cross_layer.grouping.sketched_solve import inner_damping
from hessprobe.instruments.cross_layer.grouping.sketches import Sketches
from hessprobe.instruments.cross_layer.grouping.table import grouping_table, reached_damping
from tests.instruments.cross_layer.grouping.tables import STARTS, drawn, of, table


def dense(w: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Returns G of sketches (rounds, sequences, p)."""
    return np.einsum("rbp,rbq,b->pq", w, w, tokens / tokens.sum()) / len(w)


def newton(
    matrix: np.ndarray, g: np.ndarray, groups: list[tuple[int, ...]], mu: float, starts=STARTS
) -> np.ndarray:
    d = np.zeros_like(g)
    for group in groups:
        index = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])
        d[index] = -np.linalg.solve(matrix[np.ix_(index, index)] + mu * np.eye(len(index)), g[index])
    return d


def dense_decrease(w, g, tokens, groups, mu, keep, starts=STARTS) -> float:
    found = []
    for half in (0, 1):
        built = [b for b in keep if b % 2 == half]
        held = [b for b in keep if b % 2 != half]
        d1, d2 = (
            newton(dense(w[part::2][:, built], tokens[built]), g, groups, mu, starts) for part in (0, 1)
        )
        curved = dense(w[:, held], tokens[held]) + mu * np.eye(len(g))
        curvature = d1 @ curved @ d2  # of two different solves: below zero where they are noise
        found.append((g @ (d1 + d2) / 2) ** 2 / (2 * curvature) if curvature > 0 else np.nan)
    return float(np.mean(found))


GROUPINGS = {
    "layerwise": [(0,), (1,), (2,), (3,)],
    "full": [(0, 1, 2, 3)],
    "between": [(0, 2), (1,), (3,)],
}


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("mu", [1.0, 0.01])
def test_solves_and_every_leave_one_out_equal_dense_algebra(groups, mu):
    w, g, tokens = drawn()
    found = CrossFit(of(w, g, tokens), mu, corrected=False).decrease(groups)
    wanted = [dense_decrease(w, g, tokens, groups, mu, range(6))]
    wanted += [
        dense_decrease(w, g, tokens, groups, mu, [b for b in range(6) if b != out]) for out in range(6)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-8)


def test_with_every_cotangent_enumerated_it_is_the_exact_decrease():
    w, g, tokens = drawn()
    w = np.repeat(w, 2, axis=0)  # either solve sees all of G
    groups, mu, found = GROUPINGS["between"], 0.1, []
    for half in (0, 1):
        d = newton(dense(w[:, half::2], tokens[half::2]), g, groups, mu)
        held = dense(w[:, 1 - half :: 2], tokens[1 - half :: 2]) + mu * np.eye(20)
        found.append((g @ d) ** 2 / (2 * d @ held @ d))
    fit = CrossFit(of(w, g, tokens), mu, corrected=False)
    np.testing.assert_allclose(fit.decrease(groups)[0], np.mean(found), rtol=1e-9)
    answer = relative_decrease(fit, [["a", "c"], ["b"], ["d"]], "layerwise")
    np.testing.assert_allclose(
        answer.value, fit.decrease(groups)[0] / fit.decrease(GROUPINGS["layerwise"])[0]
    )


def test_the_inner_damping_acts_like_the_damping_asked_for():
    w, _, tokens = drawn(rounds=8)
    weights = np.tile(tokens / tokens.sum(), 8) / 8
    gram = w.reshape(48, 20) @ w.reshape(48, 20).T * np.sqrt(np.outer(weights, weights))
    values, vectors = np.linalg.eigh(gram)
    z = inner_damping(values, vectors, weights, 0.8)
    assert 0 < z < 0.8
    assert z / (weights @ (1 - np.diag(gram @ np.linalg.inv(gram + z * np.eye(48))))) == pytest.approx(0.8)
    assert inner_damping(values[-20:], vectors[:20, -20:], np.full(20, 1 / 20), 1e-4) == pytest.approx(1e-7)


LARGE = np.array([0, 40, 80, 120])
LAYERWISE, FULL = [(0,), (1,), (2,)], [(0, 1, 2)]


@pytest.fixture(scope="module")
def repeated() -> dict[str, np.ndarray]:
    """Returns the full structure over many batches: decrease, its error, slope g.d; exact, and with z = mu."""
    rng = np.random.default_rng(5)
    p, count, rounds, mu, batches = 120, 24, 16, 0.3, 30
    shared = np.linalg.qr(rng.standard_normal((p, p)))[0][:, :60] * np.geomspace(2.0, 0.2, 60)
    own = np.broadcast_to(np.diag(np.tile(np.geomspace(0.75, 0.05, 40), 3)), (count, p, p))
    g = shared @ rng.standard_normal(60) + 0.1 * rng.standard_normal(p)
    found = []
    for _ in range(batches):
        # Every sequence has a G of its own: shared directions, mixed at random, and a diagonal.
        tilt = rng.standard_normal((count, 60, 20)) / np.sqrt(20)
        roots = np.concatenate([np.einsum("pk,bkj->bpj", shared, tilt), own], axis=2)
        w = np.einsum("bpj,rbj->rbp", roots, rng.standard_normal((rounds, count, roots.shape[2])))
        matrices, exact, slopes = np.einsum("bpj,bqj->bpq", roots, roots), [], []
        for half in (0, 1):
            d = newton(matrices[half::2].mean(0), g, FULL, mu, LARGE)
            held = matrices[1 - half :: 2].mean(0) + mu * np.eye(p)
            exact.append((g @ d) ** 2 / (2 * d @ held @ d))
            slopes.append(g @ d)
        space = of(w, g, np.full(count, 5.0), LARGE)
        fit, plain = CrossFit(space, mu), CrossFit(space, mu, corrected=False)
        values = fit.decrease(FULL)
        stderr = np.sqrt(np.var(values[1:]) * (count - 1))
        sketched = [np.mean([piece.slope[0] for piece in each.pieces(FULL[0])]) for each in (fit, plain)]
        found.append((np.mean(exact), values[0], stderr, np.mean(slopes), *sketched, fit.freedom(FULL[0])))
    names = ("exact", "value", "stderr", "exact_slope", "slope", "plain_slope", "freedom")
    return dict(zip(names, np.array(found).T, strict=True))


def z_score(off: np.ndarray) -> float:
    return float(off.mean() / (off.std(ddof=1) / np.sqrt(len(off))))


def test_sampled_sketches_stand_for_the_exact_solve_and_uncorrected_ones_do_not(repeated):
    assert repeated["freedom"].min() > 0.3
    assert abs(z_score(repeated["value"] - repeated["exact"])) < 3
    assert abs(z_score(repeated["slope"] - repeated["exact_slope"])) < 3
    assert abs(z_score(repeated["plain_slope"] - repeated["exact_slope"])) > 6


def test_the_stated_error_is_not_below_the_spread_over_batches_and_at_most_twice_it(repeated):
    ratio = np.sqrt(np.mean(repeated["stderr"] ** 2)) / repeated["value"].std(ddof=1)
    assert 0.75 < ratio < 2  # a standard deviation of 30 draws is known to 13 %


def planted(mu: float = 0.5, scale: float = 1.0) -> CrossFit:
    """Returns four blocks of which a and c share all their curvature, b and d none."""
    rng = np.random.default_rng(2)
    starts = np.array([0, 6, 12, 18, 24])
    w = rng.standard_normal((16, 32, 24)) * np.geomspace(2, 0.5, 6).repeat(4).reshape(6, 4).T.reshape(-1)
    w[..., 12:18] = w[..., :6] + 0.1 * rng.standard_normal((16, 32, 6))
    g = np.concatenate([np.ones(6), np.ones(6), np.ones(6), np.ones(6)])
    return CrossFit(of(scale * w, g, np.full(32, 8.0), starts), mu)


def test_the_pair_that_couples_is_found_and_the_others_are_unresolved_or_small():
    fit = planted()
    gains = merge_gains(fit)
    np.testing.assert_array_equal(gains.value, gains.value.T)
    assert np.all(np.diag(gains.value) == 0) and bool(np.diag(gains.resolved).all())
    others = [gains.value[i, j] for i in range(4) for j in range(i) if (i, j) != (2, 0)]
    assert gains.resolved[0, 2] and gains.value[0, 2] > 5 * np.abs(others).max()
    joined = relative_decrease(fit, [["a", "c"], ["b"], ["d"]], "layerwise")
    np.testing.assert_allclose(joined.value - 1, gains.value[0, 2])
    np.testing.assert_allclose(joined.stderr, gains.stderr[0, 2])
    importance = block_importance(fit)
    assert set(np.argsort(-importance.value)[:2]) == {0, 2} and bool(importance.resolved[[0, 2]].all())
    curve = greedy_grouping(fit)
    assert curve.joined[0] == ("a", "c") and curve.groups[0] == (("a",), ("b",), ("c",), ("d",))
    assert curve.groups[-1] == (("a", "b", "c", "d"),) and len(curve.joined) == 3
    np.testing.assert_allclose(curve.relative.value[:2], [1, joined.value])
    np.testing.assert_allclose(curve.relative.value[-1], relative_decrease(fit, "full", "layerwise").value)


def test_every_pair_joined_equals_the_grouping_written_out():
    fit = planted()
    groups = [(0, 1), (2,), (3,)]
    for (first, second), decrease in fit.decreases_joined(groups).items():
        rest = [group for group in groups if group not in (first, second)]
        np.testing.assert_allclose(decrease, fit.decrease([*rest, first + second]), rtol=1e-10)


def test_what_cannot_be_trusted_says_why():
    small = relative_decrease(planted(mu=1e-4, scale=0.05), "full", "layerwise")
    fewer = CrossFit(of(*drawn(rounds=2)), 0.05)
    damped = relative_decrease(fewer, "full", "layerwise")
    assert not damped.resolved and "damping 0.05 is too small for 2 rounds of 6 sequences" in str(
        damped.reason
    )
    noise = relative_decrease(CrossFit(of(*drawn(rounds=8)), 20.0), "full", "layerwise")
    assert not noise.resolved and "within 2 standard errors" in str(noise.reason)
    same = relative_decrease(planted(), "full")
    assert same.resolved and float(same.value) == 1 and float(same.stderr) == 0
    assert small.reason.shape == ()


def test_the_damping_named_as_the_way_out_is_the_smallest_that_is_resolved():
    sketches = of(*drawn(rounds=8))
    least = CrossFit(sketches, 1.0).least_damping((0, 1, 2, 3), LEAST_FREEDOM)
    assert CrossFit(sketches, 1.01 * least).freedom((0, 1, 2, 3)) > LEAST_FREEDOM
    assert CrossFit(sketches, 0.99 * least).freedom((0, 1, 2, 3)) < LEAST_FREEDOM
    said = relative_decrease(CrossFit(sketches, 0.5 * least), "full", "layerwise").reason
    assert f"judge at damping {least:.2g} or above" in str(said)


def test_curvature_along_a_stored_direction_equals_its_definition():
    w, _, tokens = drawn()
    d = np.linspace(-1, 1, 20)
    sketches = of(w, d, tokens)  # the alignment with d
    value, stderr = curvature_along(sketches, sketches.alignment)
    matrix, parts = dense(w, tokens), list(itertools.pairwise(STARTS))
    wanted = [[d[i:j] @ matrix[i:j, k:m] @ d[k:m] for k, m in parts] for i, j in parts]
    np.testing.assert_allclose(value, wanted)
    left = [dense(np.delete(w, b, 1), np.delete(tokens, b)) for b in range(6)]
    along = np.array([d @ matrix @ d for matrix in left])
    whole = relative = np.array(
        [[[d[i:j] @ x[i:j, k:m] @ d[k:m] for k, m in parts] for i, j in parts] for x in left]
    )
    np.testing.assert_allclose(relative.sum((1, 2)), along)
    np.testing.assert_allclose(stderr, np.sqrt(np.var(whole, axis=0) * 5))


def test_a_table_gives_every_answer_for_each_row():
    found = grouping_table(table(), damping=2.0)
    assert dict(found.sizes) == {"step": 2, "block": 4, "other_block": 4, "groups": 4}
    fit = CrossFit(of(*drawn(1, rounds=8)), 2.0)
    row = found.sel(step=10)
    np.testing.assert_allclose(row["merge_gain"], merge_gains(fit).value, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        row["full_over_layerwise"], relative_decrease(fit, "full", "layerwise").value, rtol=1e-4
    )
    np.testing.assert_array_equal(row["importance_resolved"], block_importance(fit).resolved)
    assert [str(x) for x in row["curve_reason"].values] == list(greedy_grouping(fit).relative.reason)
    none = grouping_table(table().isel(step=slice(0, 0)), damping=2.0)
    assert none.sizes["step"] == 0


def test_only_the_answers_asked_for_are_worked_out():
    some = grouping_table(table(), damping=2.0, answers=("importance", "full_over_layerwise"))
    every = grouping_table(table(), damping=2.0)
    assert "merge_gain" not in some and "curve" not in some
    for name in map(str, some.data_vars):
        np.testing.assert_array_equal(some[name], every[name])
    with pytest.raises(UserError, match="no answer named 'gain'.*Valid: full_over_layerwise, merge_gain"):
        grouping_table(table(), damping=2.0, answers=("gain",))


def test_the_curve_says_what_share_of_full_it_captures_and_with_which_groups():
    found = grouping_table(table(), damping=2.0).sel(step=0)
    fit = CrossFit(of(*drawn(0, rounds=8)), 2.0)
    for groups in (4, 3, 2, 1):
        point = found.sel(groups=groups)
        members = [part.split(" + ") for part in str(point["members"].values).split(" | ")]
        assert len(members) == groups
        wanted = relative_decrease(fit, members, "full")
        np.testing.assert_allclose(point["captured"], wanted.value, rtol=1e-4)
        np.testing.assert_allclose(point["captured_stderr"], wanted.stderr, rtol=1e-3, atol=1e-12)
    assert str(found["joined"].values[0]) == "" and " and " in str(found["joined"].values[1])


def test_the_damping_found_is_reached_and_half_of_it_is_not_unless_it_was_asked_for():
    row = table().isel(step=0)
    least = reached_damping(row, 1e-3)
    assert f"{least:.1e}"[0] in "125"
    assert bool(grouping_table(table().isel(step=[0]), damping=least)["captured_reached"].all())
    assert not bool(grouping_table(table().isel(step=[0]), damping=0.4 * least)["captured_reached"].all())
    assert reached_damping(row, 17.3) == 17.3


def test_solves_use_one_blas_thread_whatever_is_set_and_leave_that_as_it_was(monkeypatch):
    blas, seen, eigh = ThreadpoolController(), [], np.linalg.eigh

    def threads() -> set[int]:
        return {pool["num_threads"] for pool in blas.info() if pool["user_api"] == "blas"}

    def watched(*arguments, **options):
        seen.append(threads())
        return eigh(*arguments, **options)

    monkeypatch.setattr(np.linalg, "eigh", watched)
    with blas.limit(limits=2, user_api="blas"):
        before = threads()
        fit = CrossFit(of(*drawn(rounds=8)), 2.0)
        merge_gains(fit)
        fit.least_damping((0, 1), LEAST_FREEDOM)
        assert threads() == before
    assert len(seen) > 20 and all(each == {1} for each in seen)


def test_sketches_a_row_did_not_take_are_left_out_and_too_few_are_unresolved():
    padded, taken = table(), {}
    for step, rounds in ((0, 4), (10, 1)):
        taken[step] = np.asarray(padded.attrs["sketch_round"]) < rounds
        where = xr.DataArray(taken[step], dims="sketch") | (padded["step"] != step)
        padded = padded.assign(
            kernel=padded["kernel"].where(where).where(where.rename(sketch="other_sketch")),
            alignment=padded["alignment"].where(where),
            sequence_tokens=padded["sequence_tokens"].where(where),
        )
    found = grouping_table(padded, damping=2.0)
    w, g, tokens = drawn(0, rounds=8)
    fit = CrossFit(of(w[:4], g, tokens), 2.0)
    np.testing.assert_allclose(found["merge_gain"].sel(step=0), merge_gains(fit).value, rtol=1e-3, atol=1e-5)
    few = found.sel(step=10)
    assert bool(few["importance"].isnull().all()) and not bool(few["merge_gain_resolved"].any())
    assert "at least 2 rounds" in str(few["full_over_layerwise_reason"].values)


def test_mistakes_are_told_with_the_way_out():
    w, g, tokens = drawn()
    with pytest.raises(UserError, match="at least 2 rounds"):
        of(w[:1], g, tokens)
    with pytest.raises(UserError, match="not finite"):
        s = of(w, g, tokens)
        Sketches(**{**vars(s), "alignment": np.where(s.alignment > 1, np.nan, s.alignment)})
    with pytest.raises(UserError, match="4 or more"):
        of(w[:, :3], g, tokens[:3])
    with pytest.raises(UserError, match="wanted kernel"):
        s = of(w, g, tokens)
        Sketches(**{**vars(s), "kernel": s.kernel[:2]})
    with pytest.raises(UserError, match="damping must be positive"):
        CrossFit(of(w, g, tokens), 0.0)
    fit = CrossFit(of(w, g, tokens), 1.0)
    with pytest.raises(UserError, match="missing: d and twice: a"):
        relative_decrease(fit, [["a", "b"], ["a", "c"]])
    with pytest.raises(UserError, match="'e'"):
        relative_decrease(fit, [["a", "b", "c", "d", "e"]])
    with pytest.raises(UserError, match="Valid: layerwise, full"):
        relative_decrease(fit, "half")
    with pytest.raises(UserError, match="no layer kernels"):
        grouping_table(table().drop_vars("kernel"), damping=1.0)
    with pytest.raises(UserError, match="damping must be positive"):
        grouping_table(table(), damping=-1.0)
