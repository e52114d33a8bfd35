"""Temperature, thresholds and calibration error against closed forms."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve

from cxr_tf.evaluate.calibration import (
    CalibrationWarning,
    calibration_error,
    choose_thresholds,
    error_if_calibrated,
    fit_temperature,
    probabilities_of,
    reliability_table,
    threshold_at_specificity,
)
from cxr_tf.evaluate.metrics import MetricError, f1


def test_probabilities_of() -> None:
    z = np.array([[0.0, np.log(3)], [1000.0, 0.0]])
    np.testing.assert_allclose(probabilities_of(z, "multiclass"), [[0.25, 0.75], [1, 0]])
    np.testing.assert_allclose(probabilities_of(z, "multilabel", 2.0), expit(z / 2))
    with pytest.raises(MetricError, match="above 0"):
        probabilities_of(z, "multilabel", 0)
    with pytest.raises(MetricError, match=r"task must be .* Received: 'softmax'"):
        probabilities_of(z, "softmax")  # type: ignore[arg-type]


def test_temperature_in_closed_form() -> None:
    """Two logits, ±a, right with share q: the likeliest temperature makes the sigmoid say q, so T = a / logit(q)."""
    a, q = 4.0, 0.8
    labels = np.array([1.0] * 80 + [0.0] * 20)[:, None]
    logits = np.full((100, 1), a)
    assert fit_temperature(logits, labels, "multilabel") == pytest.approx(a / logit(q), rel=1e-4)
    two = np.concatenate([labels, 1 - labels], 1)
    assert fit_temperature(np.tile([a, 0.0], (100, 1)), two, "multiclass") == pytest.approx(a / logit(q), rel=1e-4)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_temperature_is_found_again(task: str, true: float) -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 4)) * 2
    p = probabilities_of(z, task)  # type: ignore[arg-type]
    if task == "multiclass":
        y = np.eye(4)[[rng.choice(4, p=row) for row in p]]
    else:
        y = (rng.random(p.shape) < p).astype(float)
    unknown = rng.random(4000) < 0.2
    y[unknown] = np.nan
    logits = z * true
    logits[unknown] = -logits[unknown]  # would be noticed
    assert fit_temperature(logits, y, task) == pytest.approx(true, rel=0.08)  # type: ignore[arg-type]


def test_a_temperature_lowers_the_loss_and_keeps_the_ranking() -> None:
    rng = np.random.default_rng(1)
    y = np.eye(3)[rng.integers(3, size=300)]
    z = 6 * (rng.normal(size=(300, 3)) + y)
    t = fit_temperature(z, y, "multiclass")
    raw, cool = (probabilities_of(z, "multiclass", s) for s in (1.0, t))
    assert -np.log((cool * y).sum(1)).mean() < -np.log((raw * y).sum(1)).mean()
    assert (raw.argmax(1) == cool.argmax(1)).all()
    assert calibration_error(cool, y, "multiclass") < calibration_error(raw, y, "multiclass")


@pytest.mark.parametrize(
    ("z", "y", "expected", "text"),
    [
        (np.ones((5, 2)), np.tile([1.0, 0], (5, 1)), 1.0, "5 labeled films are too few"),
        (np.ones((50, 1)), np.full((50, 1), np.nan), 1.0, "0 labeled films"),
        (np.zeros((0, 2)), np.zeros((0, 2)), 1.0, "no labeled film"),
        (np.repeat([[-3.0], [3.0]], 25, 0), np.repeat([[0.0], [1.0]], 25, 0), 1.0, "without error"),
        (np.repeat([[3.0], [-3.0]], 25, 0), np.repeat([[0.0], [1.0]], 25, 0), 20.0, "tell nothing"),
    ],
)
def test_films_that_cannot_tell_a_temperature(z: np.ndarray, y: np.ndarray, expected: float, text: str) -> None:
    with pytest.warns(CalibrationWarning, match=text):
        assert fit_temperature(z, y, "multilabel") == expected


def test_bad_logits_are_named() -> None:
    with pytest.raises(MetricError, match="one shape"):
        fit_temperature(np.ones((30, 2)), np.ones((30, 3)), "multilabel")
    with pytest.raises(MetricError, match="finite"):
        fit_temperature(np.full((30, 1), np.nan), np.ones((30, 1)), "multilabel")
    with pytest.raises(MetricError, match="1, 0 or NaN"):
        fit_temperature(np.zeros((30, 1)), np.full((30, 1), 2.0), "multilabel")


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 1000]))
@settings(max_examples=30, deadline=None)
def test_thresholds_are_best_of_all(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.integers(0, levels + 1, 30) / levels
    y = (rng.random(30) < 0.4).astype(float)
    y[:3] = [0, 1, np.nan]
    known = ~np.isnan(y)
    every = [*np.unique(p), 1.1]

    chosen = choose_thresholds(p, y)[0]
    assert f1(p, y, chosen)[0] == pytest.approx(max(f1(p, y, t)[0] for t in every))

    def rates(t: float) -> tuple[float, float]:
        return (p[known & (y == 1)] >= t).mean(), (p[known & (y == 0)] < t).mean()

    at = threshold_at_specificity(p, y, 0.9)[0]
    assert rates(at)[1] >= 0.9 - 1e-9
    assert rates(at)[0] == pytest.approx(max(rates(t)[0] for t in every if rates(t)[1] >= 0.9 - 1e-9))


def test_thresholds_lie_half_way() -> None:
    p, y = np.array([[0.9, 0.2], [0.7, 0.4], [0.3, 0.6], [0.1, 0.8]]), np.array([[1, 0], [1, 0], [0, 0], [0, 1]])
    assert choose_thresholds(p, y) == pytest.approx([0.5, 0.7])
    near = np.array([0.5, np.nextafter(0.5, 1)])  # half-way rounds to one of the two
    assert (near >= choose_thresholds(near, np.array([0, 1]))).tolist() == [False, True]
    assert threshold_at_specificity(np.array([1.0, 0.2]), np.array([0, 1]))[0] > 1


def test_a_class_of_one_outcome_keeps_the_neutral_threshold() -> None:
    p, y = np.array([[0.9, 0.2], [0.1, 0.4]]), np.array([[1, 0], [0, np.nan]])
    with pytest.warns(CalibrationWarning, match="class 1 has one outcome only"):
        assert choose_thresholds(p, y) == pytest.approx([0.5, 0.5])
    with pytest.raises(MetricError, match="Received: 90"):
        threshold_at_specificity(p, y, 90)


def test_calibration_error_by_hand() -> None:
    # 0.9 said four times, right three times; 0.6 said once, wrong: (4 * 0.15 + 1 * 0.6) / 5
    p = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]])
    y = np.array([[1.0, 0]] * 3 + [[0, 1]] + [[1, 0]])
    assert calibration_error(p, y, "multiclass") == pytest.approx((4 * 0.15 + 0.6) / 5)
    assert calibration_error(p, y, "multiclass", mass=True, bins=2) == pytest.approx((4 * 0.15 + 0.6) / 5)
    first, second = reliability_table(p, y, "multiclass")
    assert (first.n, first.confidence, first.accuracy) == (1, pytest.approx(0.6), 0)
    assert (second.n, second.accuracy) == (4, 0.75)
    assert second.low < 0.9 <= second.high
    assert np.isnan(calibration_error(np.array([0.5]), np.array([np.nan]), "multilabel"))
    with pytest.raises(MetricError, match="at least one bin"):
        calibration_error(p, y, "multiclass", bins=0)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_top_label_calibration_error_against_a_loop(seed: int, mass: bool) -> None:
    """Naeini et al. 2015, Guo et al. 2017: bins of the predicted class's probability, gaps weighted by size."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(4), 150)
    y = np.eye(4)[rng.integers(4, size=150)]
    y[rng.random(150) < 0.2] = np.nan
    known = [(p[i].max(), float(y[i, p[i].argmax()])) for i in range(150) if not np.isnan(y[i]).any()]
    known.sort()
    if mass:
        cuts = [math.ceil(Fraction(len(known) * b, 15)) for b in range(16)]
        bins = [known[first:last] for first, last in itertools.pairwise(cuts)]
    else:
        bins = [[k for k in known if b / 15 < k[0] <= (b + 1) / 15] for b in range(15)]
    gaps = [abs(sum(said - came for said, came in one)) for one in bins]
    got = calibration_error(p, y, "multiclass", mass=mass)
    assert got == pytest.approx(sum(gaps) / len(known), abs=1e-12)


def test_calibration_error_equals_scikit_learns_diagram() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(500)
    y = (rng.random(500) < p**2) * 1.0
    came, said = calibration_curve(y, p, n_bins=15)
    size = np.histogram(p, bins=15, range=(0, 1))[0]
    assert calibration_error(p, y, "multilabel") == pytest.approx((size * np.abs(came - said)).sum() / 500)


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_reliability_equals_scikit_learn_and_loses_nothing(seed: int, mass: bool) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(200)
    y = (rng.random(200) < p).astype(float)
    table = reliability_table(p, y, "multilabel", bins=10, mass=mass)
    assert sum(row.n for row in table) == 200
    assert sum(row.n * row.accuracy for row in table) == pytest.approx(y.sum())
    if mass:
        assert [row.n for row in table] == [20] * 10
    else:
        came, said = calibration_curve(y, p, n_bins=10)
        assert [row.confidence for row in table] == pytest.approx(said)
        assert [row.accuracy for row in table] == pytest.approx(came)


def test_perfect_and_worst_calibration() -> None:
    y = np.array([0.0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration_error(y, y, "multilabel") == 0
        assert calibration_error(1 - y, y, "multilabel") == 1


def test_a_calibrated_model_has_this_error_on_average() -> None:
    rng = np.random.default_rng(3)
    p = rng.uniform(0.05, 0.95, (150, 1))
    found = [calibration_error(p, (rng.random(p.shape) < p).astype(float), "multilabel") for _ in range(300)]
    expected = error_if_calibrated(p, np.zeros(p.shape), "multilabel", draws=2000)
    assert expected == pytest.approx(np.mean(found), rel=0.03)
    assert 0.02 < expected < 0.2
    assert np.isnan(error_if_calibrated(p, np.full(p.shape, np.nan), "multilabel"))
