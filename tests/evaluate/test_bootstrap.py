"""The patient-clustered bootstrap against closed forms, its own laws, and simulation."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.special import expit

from cxr_tf.errors import CxrError
from cxr_tf.evaluate import metrics as m
from cxr_tf.evaluate.bootstrap import Estimate, bootstrap

# By its path: experiments are not installed.
simulation = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "coverage.py")))


def mean_of(values: np.ndarray):
    return lambda weights: {"mean": weights @ values / weights.sum(1)}


def test_interval_of_a_mean_is_its_normal_interval() -> None:
    values = np.random.default_rng(0).normal(size=400)
    got = bootstrap(mean_of(values), np.arange(400), replicates=4000)["mean"]
    half = 1.96 * values.std() / 20
    assert got.value == pytest.approx(values.mean())
    assert got.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert got.high == pytest.approx(values.mean() + half, abs=0.12 * half)
    assert (got.n, got.patients, got.replicates, got.dropped, got.note) == (400, 400, 4000, 0, "")


def test_patients_are_drawn_with_all_their_films() -> None:
    """Ten copies of each film tell nothing new: the interval is that of the patients, not sqrt(10) narrower."""
    values = np.random.default_rng(0).normal(size=50)
    alone = bootstrap(mean_of(values), np.arange(50))["mean"]
    copied = bootstrap(mean_of(np.repeat(values, 10)), np.repeat(np.arange(50), 10))["mean"]
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert (copied.n, copied.patients) == (500, 50)
    seen = []
    bootstrap(lambda w: (seen.append(w), {"x": w.sum(1)})[1], np.array([7, 3, 7, 5]), replicates=20)
    assert len(seen) == 3
    whole, drawn, left_out = seen
    assert drawn.shape == (20, 4)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all()
    assert whole.tolist() == [[1, 1, 1, 1]]
    assert sorted(left_out.tolist()) == [[0, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]]  # each patient once


def test_many_patients_are_left_out_in_groups() -> None:
    """The cost stays at 200 rows, and every patient is left out once."""
    seen = []
    bootstrap(lambda w: (seen.append(w), {"x": w.sum(1)})[1], np.repeat(np.arange(501), 2), replicates=1)
    left_out = np.concatenate(seen[2:])
    assert left_out.shape == (200, 1002)
    assert (left_out[:, ::2] == left_out[:, 1::2]).all()
    assert ((left_out == 0).sum(0) == 1).all()
    assert set((left_out[:, ::2] == 0).sum(1)) == {2, 3}


def recorded(statistic, patients: int, **how) -> tuple[Estimate, np.ndarray]:
    """The only figure of a statistic, one film a patient, and its draws."""
    seen: list[np.ndarray] = []

    def keep(weights: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(*statistic(weights).values())
        return {"figure": seen[-1]}

    estimate = bootstrap(keep, np.arange(patients), **how)["figure"]
    return estimate, np.concatenate(seen[1:])[: estimate.replicates]


def auroc_along(scores: np.ndarray, labels: np.ndarray, axis: int) -> np.ndarray:
    """AUROC along the last axis, as scipy asks for it."""
    rows = zip(scores.reshape(-1, scores.shape[-1]), labels.reshape(-1, labels.shape[-1]), strict=True)
    return np.reshape([m.auroc(expit(s), y)[0] for s, y in rows], scores.shape[:-1])


@pytest.mark.parametrize("figure", ["mean", "auroc"])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_interval_is_scipys_bca_at_the_level_of_a_t_distribution(figure: str, level: float) -> None:
    """Of the same draws. Only the widening is not scipy's: Satterthwaite's degrees of freedom, 2 n / (kurtosis - 1)."""
    rng, n = np.random.default_rng(3), 60
    values, labels = rng.exponential(size=n), (np.arange(n) < 9) * 1.0
    scores = rng.normal(size=n) + 1.5 * labels
    ranked = m.Ranked(scores, labels)
    data, along, statistic = {
        "mean": ((values,), lambda x, axis: x.mean(axis), mean_of(values)),
        "auroc": ((scores, labels), auroc_along, lambda w: {"auroc": m.auroc_of(*ranked.counts(w))}),
    }[figure]
    got, draws = recorded(statistic, n, replicates=4000, level=level)
    draws = draws[~np.isnan(draws)]
    without = [along(*(np.delete(column, i) for column in data), axis=-1) for i in range(n)]
    freedom = min(n - 1, 2 * n / (stats.kurtosis(without, fisher=False) - 1))
    reach = stats.t.ppf((1 + level) / 2, freedom) * math.sqrt((freedom + 1) / freedom)
    assert reach > 1.02 * stats.norm.ppf((1 + level) / 2)
    expected = stats.bootstrap(
        data,
        along,
        paired=True,
        vectorized=True,
        n_resamples=0,  # none of its own
        bootstrap_result=SimpleNamespace(bootstrap_distribution=draws),
        confidence_level=2 * stats.norm.cdf(reach) - 1,
        method="BCa",
    ).confidence_interval
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=0.02 * draws.std())
    plain = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    assert np.abs(np.array([got.low, got.high]) - plain).max() > 0.2 * draws.std()


@settings(max_examples=40, deadline=None)
@given(
    values=arrays(float, st.integers(2, 12), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1)),
    factor=st.sampled_from([-3.0, -1.0, 0.5, 2.0]),
    level=st.floats(0.01, 0.999),
    replicates=st.integers(1, 60),
)
def test_laws_of_an_interval(values: np.ndarray, factor: float, level: float, replicates: int) -> None:
    """It holds its figure, ends at draws (or the figure), grows with the level, and turns with the figure's sign."""
    n = len(values)
    got, draws = recorded(mean_of(values), n, replicates=replicates, level=level)
    seen = np.append(draws, got.value)
    assert seen.min() <= got.low <= got.value <= got.high <= seen.max()
    wider, _ = recorded(mean_of(values), n, replicates=replicates, level=(1 + level) / 2)
    assert wider.low <= got.low <= got.high <= wider.high
    turned, _ = recorded(mean_of(factor * values + 1), n, replicates=replicates, level=level)
    ends = sorted([factor * got.low + 1, factor * got.high + 1])
    assert (turned.low, turned.high) == pytest.approx(ends, abs=1e-6)


def test_a_biased_figure_is_moved_back() -> None:
    """|mean| is biased upwards about 0 as a calibration error is: its draws are further off than the figure."""
    values = np.random.default_rng(0).normal(size=50)
    values -= values.mean() - 0.02
    got, draws = recorded(lambda w: {"size": np.abs(w @ values) / w.sum(1)}, 50)
    assert (draws > got.value).mean() > 0.8
    assert got.low <= got.value <= got.high < np.quantile(draws, 0.9)


def test_interval_is_wide_where_few_patients_decide() -> None:
    """One patient in ten has the lesion: the share found has the width of ten patients, however many are healthy."""
    rng = np.random.default_rng(2)
    found = rng.random(10)

    def width(healthy: int) -> float:
        ill = np.append(np.ones(10), np.zeros(healthy))
        values = np.append(found, np.zeros(healthy))
        estimate, draws = recorded(lambda w: {"found": m.ratio(w @ values, w @ ill)}, 10 + healthy, replicates=4000)
        return (estimate.high - estimate.low) / (2 * np.nanstd(draws))

    assert width(0) > 2.2
    assert width(190) == pytest.approx(width(0), rel=0.1)


def test_figure_undefined_without_one_patient() -> None:
    """Leaving out any patient of the only group that gives the figure is passed over, as is a draw without it."""
    values = np.arange(30.0)
    whole = mean_of(values)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        lone = (weights[:, 7] == 0) & (weights.sum(1) == 29)
        return {"mean": np.where(lone, np.nan, whole(weights)["mean"])}

    got, draws = recorded(statistic, 30)
    assert got.note == ""
    assert draws.min() < got.low < got.value < got.high < draws.max()
    nowhere, draws = recorded(lambda w: {"mean": np.where(w.sum(1) == 29, np.nan, whole(w)["mean"])}, 30)
    assert draws.min() < nowhere.low < nowhere.value < nowhere.high < draws.max()


def test_seeded_and_independent_of_the_order_of_films_and_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, patients = rng.normal(size=90), rng.integers(30, size=90)
    first = bootstrap(mean_of(values), patients, seed=5)["mean"]
    order = rng.permutation(90)
    again = bootstrap(mean_of(values[order]), patients[order], seed=5)["mean"]
    assert (again.low, again.high) == pytest.approx((first.low, first.high))
    assert bootstrap(mean_of(values), patients, seed=6)["mean"].low != first.low
    monkeypatch.setattr("cxr_tf.evaluate.bootstrap._CHUNK", 90 * 7)
    chunked = bootstrap(mean_of(values), patients, seed=5)["mean"]
    assert (chunked.low, chunked.high) == pytest.approx((first.low, first.high))
    wider = bootstrap(mean_of(values), patients, seed=5, level=0.99)["mean"]
    assert wider.low < first.low < first.high < wider.high


def test_replicates_without_a_class_are_dropped_and_counted() -> None:
    """With k positive patients of n, a draw has none with probability (1 - k/n)^n."""

    def figure(positives: int) -> Estimate:
        labels = np.zeros(200)
        labels[:positives] = 1
        ranked = m.Ranked(np.random.default_rng(1).random(200), labels)
        return bootstrap(lambda w: {"auroc": m.auroc_of(*ranked.counts(w))}, np.arange(200), replicates=2000)["auroc"]

    rare = figure(2)
    assert rare.dropped == pytest.approx(2000 * (1 - 2 / 200) ** 200, rel=0.15)
    assert not rare.measurable
    assert (rare.low, rare.high) == (None, None)
    assert rare.value is not None
    assert f"{rare.dropped:,} of 2,000" in rare.note
    assert str(rare).endswith("(interval not measurable)")
    some = figure(4)
    assert 0 < some.dropped <= 100
    assert some.measurable


def test_what_the_data_cannot_give() -> None:
    nothing = bootstrap(lambda w: {"x": np.full(len(w), np.nan)}, np.arange(5))["x"]
    assert nothing.value is None
    assert "not measurable" in nothing.note
    assert str(nothing) == "not measurable"
    one = bootstrap(mean_of(np.arange(4.0)), np.zeros(4))["mean"]
    assert (one.value, one.low) == (1.5, None)
    assert "one patient" in one.note
    few = bootstrap(mean_of(np.arange(4.0)), np.arange(4))["mean"]
    assert few.measurable
    assert few.note.startswith("4 patients")
    same = bootstrap(mean_of(np.ones(40)), np.arange(40))["mean"]
    assert (same.low, same.high) == (1, 1)
    assert "every draw" in same.note
    for estimate in (nothing, one, few, same):
        assert json.loads(json.dumps(estimate.to_json(), allow_nan=False))["note"] == estimate.note


def test_counts_are_of_the_films_that_a_figure_is_over() -> None:
    used = {"mean": np.array([True, True, False, True])}
    got = bootstrap(mean_of(np.arange(4.0)), np.array([0, 0, 1, 2]), used=used)["mean"]
    assert (got.n, got.patients) == (3, 2)
    assert str(got).startswith("1.500 (")


@pytest.mark.parametrize(
    "wrong", [{"replicates": 0}, {"level": 1.0}, {"level": math.nan}, {"seed": -1}, {"used": {"mean": np.ones(3)}}]
)
def test_bad_settings_are_named(wrong: dict) -> None:
    with pytest.raises(CxrError, match="Received"):
        bootstrap(mean_of(np.arange(4.0)), np.arange(4), **wrong)


def test_bad_clusters_are_named() -> None:
    for clusters in (np.zeros((2, 2)), np.zeros(0)):
        with pytest.raises(CxrError, match=r"Received: shape"):
            bootstrap(mean_of(np.arange(4.0)), clusters)


def test_the_population_of_the_simulation_is_what_its_closed_form_says() -> None:
    """Coverage is measured against this truth: one very large draw agrees with it."""
    for case in (
        simulation.Case(patients=100_000, separation=1.5),
        simulation.Case(patients=100_000, ill=0.1, changing=True),
    ):
        scores, labels, who = simulation.draw(case, np.random.default_rng(0))
        assert m.auroc(expit(scores), labels)[0] == pytest.approx(simulation.truth(case)["auroc"], abs=0.004)
        assert m.average_precision(expit(scores), labels)[0] == pytest.approx(
            simulation.truth(case)["average_precision"], abs=0.01
        )
        assert set(np.bincount(who)) == {1, 2, 3, 4, 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        simulation.Case(separation=2.0),
        simulation.Case(ill=0.1),
        simulation.Case(patients=30),
    ],
    ids=str,
)
def test_intervals_of_auroc_cover_the_truth(case) -> None:
    """A smaller `experiments.coverage`: 93 to 97 %, give or take three standard errors."""
    draws = 400
    found = simulation.coverage(case, draws=draws, replicates=400)["auroc"]
    noise = math.sqrt(0.95 * 0.05 / draws)
    assert found.measurable > 0.98 * draws
    assert 0.93 - 3 * noise <= found.covered <= 0.97 + 3 * noise
    assert abs(found.error / draws) < 0.02


@pytest.mark.slow
def test_intervals_of_films_are_too_sure_of_themselves() -> None:
    by_patient, by_film = (
        simulation.coverage(simulation.Case(), draws=100, replicates=400, by_patient=how)["auroc"]
        for how in (True, False)
    )
    assert by_film.covered < 0.9 < by_patient.covered
    assert by_film.width < by_patient.width


def test_intervals_of_few_patients_hold_the_truth_more_often_than_plain_quantiles() -> None:
    """The quick law, of 30 patients whom a good model tells apart."""
    case = simulation.Case(patients=30, separation=2.0)
    truth = simulation.truth(case)["auroc"]
    held = np.zeros(2)
    for seed in range(200):
        scores, labels, who = simulation.draw(case, np.random.default_rng([seed, 1]))
        ranked, seen = m.Ranked(scores, labels), []

        def statistic(weights: np.ndarray, ranked=ranked, seen=seen) -> dict[str, np.ndarray]:
            seen.append(m.auroc_of(*ranked.counts(weights)))
            return {"auroc": seen[-1]}

        got = bootstrap(statistic, who, replicates=200, seed=seed)["auroc"]
        low, high = np.nanquantile(seen[1], [0.025, 0.975])
        held += got.low <= truth <= got.high, low <= truth <= high
    assert held[1] < 0.9 * 200
    assert held[0] >= (0.93 - 3 * math.sqrt(0.05 * 0.95 / 200)) * 200
    assert held[0] > held[1] + 2
