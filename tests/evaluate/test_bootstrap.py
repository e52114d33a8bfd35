"""The patient-clustered bootstrap against closed forms, its own laws, and simulation."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
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
    drawn = np.concatenate(seen[1:])
    assert drawn.shape == (20, 4)
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all()
    assert seen[0].tolist() == [[1, 1, 1, 1]]


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
    "settings", [{"replicates": 0}, {"level": 1.0}, {"level": math.nan}, {"seed": -1}, {"used": {"mean": np.ones(3)}}]
)
def test_bad_settings_are_named(settings: dict) -> None:
    with pytest.raises(CxrError, match="Received"):
        bootstrap(mean_of(np.arange(4.0)), np.arange(4), **settings)


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
def test_intervals_of_auroc_cover_the_truth() -> None:
    """A smaller `experiments.coverage`: 93 to 97 %, give or take three standard errors."""
    draws = 400
    found = simulation.coverage(simulation.Case(), draws=draws, replicates=400)["auroc"]
    noise = math.sqrt(0.95 * 0.05 / draws)
    assert found.measurable == draws
    assert 0.93 - 3 * noise <= found.covered <= 0.97 + 3 * noise
    assert abs(found.error / draws) < 0.01
    naive = simulation.coverage(simulation.Case(), draws=draws, replicates=400, by_patient=False)["auroc"]
    assert naive.covered < 0.9  # drawing films instead of patients is too sure of itself
    assert naive.width < found.width
