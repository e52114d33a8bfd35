"""DeLong's method against the data of his paper, other published figures, its definition, and the bootstrap."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.errors import CxrError
from cxr_tf.evaluate.bootstrap import bootstrap
from cxr_tf.evaluate.delong import DeLongError, delong, delong_test
from cxr_tf.evaluate.metrics import Ranked, auroc_of

# Albumin, total protein, K-G score and outcome of the paper's 43 complete records of patients with ovarian cancer and
# an intestinal obstruction, as SAS/STAT's manual has them (PROC LOGISTIC, "Comparing Receiver Operating
# Characteristic Curves"); outcome 0 is the event.
OVARIAN_TEXT = """
    3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
    3.8 5.7 5 1   3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
    2.3 4.4 6 1   4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
    3.1 6.6 6 1   4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
    3.7 6.1 5 1   3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
    3.3 5.7 6 1   3.7 6.9 5 1  3.6 6.6 5 1
"""
OVARIAN = np.array(OVARIAN_TEXT.split(), np.float64).reshape(-1, 4)


def standard_error(estimate) -> float:
    return (estimate.high - estimate.low) / (2 * 1.959964)


def test_the_paper_s_own_data_as_sas_prints_it() -> None:
    albumin, protein, score, outcome = OVARIAN.T
    labels, patients = 1 - outcome, np.arange(len(OVARIAN))
    for marker, area, error in ((-albumin, 0.7366, 0.0927), (score, 0.7258, 0.1028), (-protein, 0.6478, 0.1000)):
        got = delong(marker, labels, patients)
        assert got.value == pytest.approx(area, abs=1e-4)
        assert standard_error(got) == pytest.approx(error, abs=6e-5)
        assert (got.n, got.patients, got.replicates) == (43, 43, 0)
    test = delong_test(-albumin, score, labels, patients)
    assert test.difference.value == pytest.approx(0.7366 - 0.7258, abs=1e-4)
    assert standard_error(test.difference) == pytest.approx(0.0953, abs=6e-5)
    assert test.z == pytest.approx(test.difference.value / 0.0953, rel=1e-3)
    test = delong_test(-protein, score, labels, patients)
    assert (test.difference.value, standard_error(test.difference)) == pytest.approx((-0.0780, 0.1046), abs=6e-5)
    assert (test.z**2, test.p) == pytest.approx((0.5554, 0.4561), abs=1e-3)


def test_ratings_of_hanley_and_mcneil_as_stata_prints_them() -> None:
    """109 CT scans on a scale of five (Radiology 1982): roctab gives .8932, standard error .0307."""
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    ratings = np.concatenate([np.repeat(np.arange(5.0), normal), np.repeat(np.arange(5.0), abnormal)])
    got = delong(ratings, np.repeat([0.0, 1.0], [58, 51]), np.arange(109))
    assert got.value == pytest.approx(0.8932, abs=5e-5)
    assert (got.low, got.high) == pytest.approx((0.83295, 0.95339), abs=1e-4)


def test_by_hand() -> None:
    # Positives 3, 1 lie above 1 and 1/2 of the negatives 2, 0, and these below 1/2 and 1 of the positives: the variance
    # of either pair is 1/8, and that of the area is 1/8 / 2 + 1/8 / 2.
    got = delong(np.array([3.0, 1, 2, 0]), np.array([1, 1, 0, 0]), np.arange(4), level=0.5)
    assert got.value == 0.75
    assert got.low == pytest.approx(0.75 - 0.6744898 * math.sqrt(1 / 8))
    assert got.high == pytest.approx(0.75 + 0.6744898 * math.sqrt(1 / 8))


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 1000]))
@settings(max_examples=60, deadline=None)
def test_ranks_give_what_the_definition_gives(seed: int, levels: int) -> None:
    """Every positive against every negative, ties as one half, in O(mn)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([1.0, 0.0, np.nan], [rng.integers(2, 15), rng.integers(2, 15), 3]))
    models = rng.integers(0, levels + 1, (2, len(labels))) / levels
    test = delong_test(*models, labels, np.arange(len(labels)))
    x, y = models[:, labels == 1], models[:, labels == 0]
    above = (x[:, :, None] > y[:, None]) + 0.5 * (x[:, :, None] == y[:, None])
    areas = above.mean((1, 2))
    covariance = np.cov(above.mean(2)) / x.shape[1] + np.cov(above.mean(1)) / y.shape[1]
    assert (test.first.value, test.second.value) == pytest.approx(areas)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance > 1e-12:
        assert test.z == pytest.approx((areas[0] - areas[1]) / math.sqrt(variance), abs=1e-6)
        assert 0 <= test.p <= 1
    one = delong(models[0], labels, np.arange(len(labels)))
    ends = ("value", "low", "high")
    assert [getattr(one, end) for end in ends] == pytest.approx([getattr(test.first, end) for end in ends])
    assert 0 <= one.low <= one.value <= one.high <= 1
    other_way = delong_test(models[1], models[0], labels, np.arange(len(labels)))
    assert other_way.difference.value == pytest.approx(-test.difference.value)


def test_agrees_with_the_bootstrap_where_both_hold() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.4) * 1.0
    shared = rng.normal(size=400) + labels
    first, second = shared + 0.5 * rng.normal(size=400), shared + rng.normal(size=400)
    ranked = [Ranked(scores, labels) for scores in (first, second)]

    def statistic(w: np.ndarray) -> dict[str, np.ndarray]:
        a, b = (auroc_of(*one.counts(w)) for one in ranked)
        return {"first": a, "difference": a - b}

    drawn = bootstrap(statistic, np.arange(400), replicates=4000)
    test = delong_test(first, second, labels, np.arange(400))
    for name in drawn:
        estimate = getattr(test, name)
        assert estimate.value == pytest.approx(drawn[name].value)
        assert standard_error(estimate) == pytest.approx(standard_error(drawn[name]), rel=0.06)


def test_several_films_of_a_patient_are_refused() -> None:
    scores, labels = np.arange(6.0), np.array([0, 1, 0, 1, np.nan, 1])
    with pytest.raises(DeLongError, match=r"bootstrap over patients. Received: 1 of 4 patients with several films"):
        delong(scores, labels, np.array([0, 1, 2, 2, 3, 3]))
    assert delong(scores, labels, np.array([0, 1, 2, 4, 3, 3])).measurable  # an unknown film is not counted


def test_what_the_films_cannot_give() -> None:
    one_outcome = delong(np.arange(3.0), np.ones(3), np.arange(3))
    assert (one_outcome.value, one_outcome.low) == (None, None)
    assert "one outcome" in one_outcome.note
    few = delong(np.arange(3.0), np.array([0, 0, 1]), np.arange(3))
    assert (few.value, few.low) == (1, None)
    assert "fewer than two" in few.note
    parted = delong(np.arange(4.0), np.array([0, 0, 1, 1]), np.arange(4))
    assert (parted.low, parted.high) == (1, 1)
    assert "no variance" in parted.note
    same = delong_test(OVARIAN[:, 0], OVARIAN[:, 0], OVARIAN[:, 3], np.arange(43))
    assert (same.difference.value, same.z, same.p) == (0, None, None)
    nothing = delong_test(np.arange(3.0), np.arange(3.0), np.ones(3), np.arange(3))
    assert nothing.difference.value is None
    for test in (same, nothing):
        json.dumps(test.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"scores": np.ones(3)}, r"must be \[n\]"),
        ({"patients": np.ones(3)}, r"must be \[n\]"),
        ({"scores": np.array([np.nan, 1, 2, 3])}, "finite"),
        ({"labels": np.array([0, 1, 2, 1])}, "1, 0 or NaN"),
        ({"level": 95}, "Received: 95"),
    ],
)
def test_bad_arrays_are_named(change: dict, text: str) -> None:
    case = {"scores": np.arange(4.0), "labels": np.array([0, 1, 0, 1]), "patients": np.arange(4)}
    with pytest.raises(CxrError, match=text):
        delong(**(case | change))
    with pytest.raises(DeLongError, match="one shape"):
        delong_test(np.ones(3), np.ones(4), case["labels"], case["patients"])
