"""Figures of merit against scikit-learn, closed forms and cases worked by hand."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from cxr_tf.errors import CxrError
from cxr_tf.evaluate import metrics as m
from cxr_tf.evaluate.metrics import MetricError, Ranked


@st.composite
def weighted(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, labels with both outcomes and unknown ones, weights that keep both outcomes."""
    n = draw(st.integers(2, 40))
    levels = draw(st.sampled_from([2, 4, 1000]))
    scores = np.array(draw(st.lists(st.integers(0, levels), min_size=n, max_size=n))) / levels
    labels = np.array(draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, np.nan]), min_size=n, max_size=n)))
    labels[:2] = [0, 1]
    weights = np.array(draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), np.float64)
    weights[:2] = np.maximum(weights[:2], 1)
    return scores, labels, weights


@given(weighted())
@settings(max_examples=80, deadline=None)
def test_weighted_ranking_figures_equal_scikit_learn(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, labels, weights = case
    counts = Ranked(scores, labels).counts(np.stack([weights, np.ones_like(weights)]))
    known = ~np.isnan(labels)
    for row, w in enumerate([weights, np.ones_like(weights)]):
        args = (labels[known], scores[known])
        assert m.auroc_of(*counts)[row] == pytest.approx(sk.roc_auc_score(*args, sample_weight=w[known]), abs=1e-12)
        assert m.average_precision_of(*counts)[row] == pytest.approx(
            sk.average_precision_score(*args, sample_weight=w[known]), abs=1e-12
        )


@given(weighted())
@settings(max_examples=60, deadline=None)
def test_weights_are_repetitions_and_order_is_nothing(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, labels, weights = case
    rows = np.repeat(np.arange(len(scores)), weights.astype(int))[::-1]
    weighted_counts = Ranked(scores, labels).counts(weights[None])
    repeated = Ranked(scores[rows], labels[rows]).counts(np.ones((1, len(rows))))
    for figure in (m.auroc_of, m.average_precision_of, lambda t, f: m.sensitivity_at_of(t, f, 0.8)):
        assert figure(*weighted_counts)[0] == pytest.approx(figure(*repeated)[0], abs=1e-12)
    x = np.linspace(0, 1, 11)
    for curve in (m.roc_at_of, m.precision_at_of):
        np.testing.assert_allclose(curve(*weighted_counts, x), curve(*repeated, x), atol=1e-12)


@given(weighted(), st.sampled_from([0.0, 0.5, 0.8, 0.9, 1.0]))
@settings(max_examples=60, deadline=None)
def test_sensitivity_at_specificity_against_a_loop(case: tuple, specificity: float) -> None:
    scores, labels, weights = case
    positive, negative = weights * (labels == 1), weights * (labels == 0)
    best = 0.0
    for threshold in [*np.unique(scores), np.inf]:
        called = scores >= threshold
        if (negative * ~called).sum() / negative.sum() >= specificity - 1e-9:
            best = max(best, (positive * called).sum() / positive.sum())
    got = m.sensitivity_at_of(*Ranked(scores, labels).counts(weights[None]), specificity)[0]
    assert got == pytest.approx(best, abs=1e-12)


def test_a_replicate_without_an_outcome_is_undefined() -> None:
    ranked = Ranked(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, 1.0]))
    counts = ranked.counts(np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]], np.float64))
    for figure in (m.auroc_of, m.average_precision_of, lambda t, f: m.sensitivity_at_of(t, f, 0.9)):
        assert np.isnan(figure(*counts)).tolist() == [False, True, True, True]
    nothing = Ranked(np.array([0.5]), np.array([np.nan])).counts(np.ones((2, 1)))
    assert np.isnan(m.auroc_of(*nothing)).all()
    assert np.isnan(m.sensitivity_at_of(*nothing, 0.9)).all()


def test_public_figures_leave_out_what_is_unknown() -> None:
    p = np.array([[0.9, 0.2, 0.3], [0.8, 0.7, 0.4], [0.3, 0.6, 0.5], [0.1, 0.9, 0.6]])
    y = np.array([[1, np.nan, 0], [0, 0, 0], [1, 1, 0], [0, 1, np.nan]])
    assert m.auroc(p, y)[:2] == pytest.approx([0.75, 0.5])
    assert np.isnan(m.auroc(p, y)[2])
    assert np.isnan(m.average_precision(p, y)[2])
    assert m.average_precision(p, y)[0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(m.sensitivity_at_specificity(p, y)[2])
    assert m.brier(p, y)[1] == pytest.approx((0.49 + 0.16 + 0.01) / 3)
    assert m.macro(m.auroc(p, y)) == pytest.approx(0.625)
    assert np.isnan(m.macro(np.array([np.nan])))
    assert np.isnan(m.brier(np.array([0.5]), np.array([np.nan]))[0])


@given(weighted())
@settings(max_examples=60, deadline=None)
def test_brier_and_f1_equal_scikit_learn(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    scores, labels, _ = case
    known = ~np.isnan(labels)
    assert m.brier(scores, labels)[0] == pytest.approx(sk.brier_score_loss(labels[known], scores[known]))
    expected = sk.f1_score(labels[known], scores[known] >= 0.4, zero_division=0)
    assert m.f1(scores, labels, 0.4)[0] == pytest.approx(expected)


@given(weighted())
@settings(max_examples=60, deadline=None)
def test_auroc_is_the_share_of_pairs_in_the_right_order(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Mann and Whitney's U: every positive film against every negative one, ties as one half."""
    scores, labels, weights = case
    positive, negative = labels == 1, labels == 0
    above = np.sign(scores[positive][:, None] - scores[negative][None]) / 2 + 0.5
    assert m.auroc(scores, labels)[0] == pytest.approx(above.mean())
    pairs = weights[positive][:, None] * weights[negative][None]
    got = m.auroc_of(*Ranked(scores, labels).counts(weights[None]))[0]
    assert got == pytest.approx((above * pairs).sum() / pairs.sum())


def test_kappa_by_hand() -> None:
    """Of 50 films 35 are agreed on, and chance agrees on (25 * 30 + 25 * 20) / 50 = 25 of them."""
    assert m.cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx((35 - 25) / (50 - 25))
    # Three grades, one film a cell but the corners: disagreements cost 1 or 4, chance has 4 * 1 + 2 * 4 of nine cells.
    grades = np.array([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]])
    share = np.outer([2, 3, 2], [2, 3, 2]) / 7
    cost = np.array([[0, 1, 4], [1, 0, 1], [4, 1, 0]])
    assert m.cohen_kappa(grades, quadratic=True) == pytest.approx(1 - 4 / (share * cost).sum())


def test_f1_by_hand() -> None:
    p, y = np.array([0.9, 0.6, 0.4, 0.2]), np.array([1, 0, 1, 0])
    assert m.f1(p, y) == pytest.approx([0.5])
    assert m.f1(p, y, 0.4) == pytest.approx([0.8])
    assert m.f1(p, y, np.array([1.0])) == pytest.approx([0.0])
    assert np.isnan(m.f1(p, np.zeros(4))[0])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=60), st.booleans())
@settings(max_examples=60, deadline=None)
def test_kappa_and_confusion_equal_scikit_learn(pairs: list[tuple[int, int]], quadratic: bool) -> None:
    truth, called = np.array(pairs).T
    table = m.confusion_matrix(truth, called, 4)
    np.testing.assert_array_equal(table, sk.confusion_matrix(truth, called, labels=range(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = "quadratic" if quadratic else None
        expected = sk.cohen_kappa_score(truth, called, weights=kind, labels=range(4))
    got = float(m.cohen_kappa(table, quadratic=quadratic))
    if len(set(truth) | set(called)) == 1:
        assert np.isnan(got)
    else:
        assert got == pytest.approx(expected, abs=1e-9)


def test_confusion_leaves_unknown_out_and_refuses_nonsense() -> None:
    assert m.confusion_matrix(np.array([0, -1, 1]), np.array([1, 0, 1]), 2).tolist() == [[0, 1], [0, 1]]
    with pytest.raises(MetricError, match="Class numbers"):
        m.confusion_matrix(np.array([0]), np.array([2]), 2)
    with pytest.raises(MetricError, match="must be \\[n\\]"):
        m.confusion_matrix(np.array([0]), np.array([1, 1]), 2)


def test_roc_and_precision_curves_by_hand() -> None:
    # Falling: 1 0 1 0 -> ROC (0,.5) (.5,.5) (.5,1) (1,1); precision 1, 1/2, 2/3, 1/2 at recall .5 .5 1 1
    counts = Ranked(np.array([0.9, 0.8, 0.7, 0.6]), np.array([1.0, 0, 1, 0])).counts(np.ones((1, 4)))
    assert m.roc_at_of(*counts, np.array([0, 0.25, 0.5, 1])).tolist() == [[0.5, 0.5, 1.0, 1.0]]
    np.testing.assert_allclose(m.precision_at_of(*counts, np.array([0, 0.5, 0.51, 1]))[0], [1, 1, 2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("p", "y", "text"),
    [
        ([[0.5, 0.5]], [[1]], "one shape"),
        ([1.5, 0.2], [1, 0], "Probabilities must lie in 0-1 .* Received: 1.5 in row 0"),
        ([0.5, np.nan], [1, 0], "Received: nan in row 1"),
        ([0.5, 0.2], [1, 2], "Labels must be 1, 0 or NaN .* Received: 2.0 in row 1"),
        ([], [], "nothing to judge"),
        ([[[0.5]]], [[[1]]], "Arrays must be"),
    ],
)
def test_bad_predictions_are_named(p: list, y: list, text: str) -> None:
    with pytest.raises(CxrError, match=text):
        m.auroc(np.array(p), np.array(y))


def test_columns_must_fit_the_classes() -> None:
    with pytest.raises(MetricError, match=r"one column a class \(3\). Received: 2 columns"):
        m.check_predictions(np.ones((1, 2)), np.ones((1, 2)), ["a", "b", "c"])


def test_one_hot_rows() -> None:
    y = np.array([[0, 1], [1, 0], [np.nan, np.nan], [np.nan, 1]])
    assert m.one_hot_rows(y).tolist() == [1, 0, -1, -1]
    with pytest.raises(MetricError, match=r"exactly one class.*Received: 2 classes in row 1"):
        m.one_hot_rows(np.array([[0.0, 1], [1, 1]]))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_mask_scores_equal_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random((3, 5, 6)) < 0.4, rng.random((3, 5, 6)) < 0.3
    b[:, 0, 0] = True
    scores = m.mask_scores(a, b.astype(np.float32))
    for i in range(3):
        assert scores.dice[i] == pytest.approx(sk.f1_score(b[i].ravel(), a[i].ravel()))
        assert scores.iou[i] == pytest.approx(sk.jaccard_score(b[i].ravel(), a[i].ravel()))
        assert scores.dice[i] == pytest.approx(2 * scores.iou[i] / (1 + scores.iou[i]))
        assert (m.dice(a[i], b[i]), m.iou(a[i], b[i])) == pytest.approx((scores.dice[i], scores.iou[i]))


def test_mask_scores_know_empty_from_unknown() -> None:
    predicted = np.zeros((4, 2, 4, 1), bool)
    predicted[:, 0] = True
    truth = np.zeros((4, 2, 4, 1), np.float32)
    truth[0, :, :2] = 1  # half hit
    truth[2] = np.nan
    content = np.ones_like(predicted)
    content[3, :, 2:] = False  # the right half is padding: what is predicted there does not count
    scores = m.mask_scores(predicted, truth, content)
    assert scores.dice[0] == 0.5
    assert scores.iou[0] == pytest.approx(1 / 3)
    assert np.isnan(scores.dice[1:]).all()
    assert scores.false_positive_area[[1, 3]].tolist() == [0.5, 0.5]
    assert np.isnan(scores.false_positive_area[[0, 2]]).all()
    assert scores.known.tolist() == [True, True, False, True]
    assert scores.empty.tolist() == [False, True, False, True]
    both = m.MaskScores.join([scores, scores])
    assert len(both) == 8
    assert both.known.tolist() == [True, True, False, True] * 2


def test_masks_of_another_kind_are_refused() -> None:
    with pytest.raises(MetricError, match="one shape"):
        m.mask_scores(np.zeros((1, 2, 2), bool), np.zeros((1, 2, 3)))
    with pytest.raises(MetricError, match=r"boolean.*Received: float64"):
        m.mask_scores(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)))
    with pytest.raises(MetricError, match="NaN in places"):
        m.mask_scores(np.zeros((1, 1, 2), bool), np.array([[[np.nan, 0]]]))
    with pytest.raises(MetricError, match="one shape"):
        m.dice(np.zeros((2, 2)), np.zeros((2, 3)))
    assert np.isnan(m.dice(np.zeros((2, 2)), np.zeros((2, 2))))


def test_ten_thousand_films_are_fast_enough() -> None:
    """The bound is for 1,000 draws of four classes: 60 s on two cores; here a tenth of one class."""
    rng = np.random.default_rng(0)
    ranked = Ranked(rng.random(10_000), (rng.random(10_000) < 0.3).astype(float))
    weights = rng.integers(0, 3, (100, 10_000)).astype(float)
    start = time.perf_counter()
    counts = ranked.counts(weights)
    m.auroc_of(*counts)
    m.average_precision_of(*counts)
    assert time.perf_counter() - start < 1.5


def test_lesions_are_counted_one_by_one() -> None:
    truth = np.zeros((3, 12, 20))
    truth[0, 1:5, 1:6] = 1  # 20 pixels
    truth[0, 5, 6] = 1  # meets the first at a corner: the same lesion, now 21
    truth[0, 8:11, 10:20] = 1  # 30 pixels
    truth[2] = np.nan
    predicted = np.zeros(truth.shape, bool)
    predicted[0, 8, 10:12] = True  # 2 of 30: not found; it lies on a lesion, so it is no false one
    predicted[0, 1, 1:4] = True  # 3 of 21: found
    predicted[0, 1, 15:18] = True  # nowhere
    predicted[1, ::4, 0] = True  # three on an empty film
    predicted[2] = True
    scores = m.mask_scores(predicted, truth)
    np.testing.assert_array_equal(scores.lesions, [2, 0, np.nan])
    np.testing.assert_array_equal(scores.lesions_found, [1, 0, np.nan])
    np.testing.assert_array_equal(scores.false_lesions, [1, 3, np.nan])
    content = np.ones(truth.shape, bool)
    content[:, :2] = False  # what lies on padding counts nowhere
    inside = m.mask_scores(predicted, truth, content)
    np.testing.assert_array_equal(inside.lesions_found, [0, 0, np.nan])
    np.testing.assert_array_equal(inside.false_lesions, [0, 2, np.nan])
