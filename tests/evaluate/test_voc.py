"""VOC-2010 average precision against the development kit's algorithm and a case worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxr_tf.evaluate.metrics import MetricError, Ranked, average_precision
from cxr_tf.evaluate.voc import voc_average_precision, voc_average_precision_of


def devkit(scores: np.ndarray, labels: np.ndarray) -> float:
    """A detection evaluation as the development kit does it: one dummy box a study, then `VOCap`."""
    order = np.argsort(-scores, kind="stable")
    hits = labels[order]
    recall = np.cumsum(hits) / hits.sum()
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    mrec, mpre = [0.0, *recall, 1.0], [0.0, *precision, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])


def test_by_hand() -> None:
    # Falling: right, wrong, wrong, right, right. Precision at the hits: 1, 2/4, 3/5; the envelope lifts 2/4 to 3/5.
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1.0, 0, 0, 1, 1])
    assert voc_average_precision(scores, labels)[0] == pytest.approx((1 + 0.6 + 0.6) / 3)
    assert average_precision(scores, labels)[0] == pytest.approx((1 + 0.5 + 0.6) / 3)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60))
@settings(max_examples=100, deadline=None)
def test_equals_the_development_kit(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(n) / n  # no ties: the kit leaves their order to the sort
    labels = (rng.random(n) < 0.4).astype(float)
    labels[:2] = [0, 1]
    assert voc_average_precision(scores, labels)[0] == pytest.approx(devkit(scores, labels), abs=1e-12)
    assert voc_average_precision(scores, labels)[0] >= average_precision(scores, labels)[0] - 1e-12


def test_four_classes_of_studies_and_the_mean() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(4, size=80)
    p = rng.dirichlet(np.ones(4), 80)
    y = np.eye(4)[truth]
    got = voc_average_precision(p, y)
    assert got == pytest.approx([devkit(p[:, c], y[:, c]) for c in range(4)])


def test_ties_do_not_depend_on_order() -> None:
    scores = np.full(6, 0.5)
    for labels in ([1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]):
        assert voc_average_precision(scores, np.array(labels))[0] == pytest.approx(1 / 3)


def test_weights_are_repetitions_and_unknown_is_left_out() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random(30), (rng.random(30) < 0.4).astype(float)
    labels[5] = np.nan
    weights = rng.integers(0, 3, 30)
    rows = np.repeat(np.arange(30), weights)
    got = voc_average_precision_of(*Ranked(scores, labels).counts(weights[None].astype(float)))[0]
    assert got == pytest.approx(voc_average_precision(scores[rows], labels[rows])[0])


def test_one_outcome_is_nan_and_bad_input_is_named() -> None:
    assert np.isnan(voc_average_precision(np.array([0.2, 0.3]), np.ones(2))[0])
    with pytest.raises(MetricError, match="logits"):
        voc_average_precision(np.array([3.0]), np.array([1]))
